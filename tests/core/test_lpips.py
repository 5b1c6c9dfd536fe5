"""LPIPS: layouts of weight files, scaling, gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cap4d_core.avatar.lpips import STAGES, TAP_CHANNELS, Lpips
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import write_safetensors

# Numbers of the convolutions in torchvision's VGG16 and in the shift-tolerant variant.
VGG = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SHIFT_TOLERANT = (0, 2, 6, 8, 12, 14, 16, 20, 22, 24, 28, 30, 32)


@pytest.fixture(scope="module")
def model() -> Lpips:
    generator = torch.Generator().manual_seed(0)
    model = Lpips()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim == 4 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (2 / fan_in) ** 0.5 if parameter.ndim == 4 else 0.05 * noise)
        for head in model.heads:
            head.abs_()
    return model


def _slice_of(index: int) -> int:
    ends = [sum(map(len, STAGES[: i + 1])) for i in range(len(STAGES))]
    return 1 + sum(index >= end for end in ends)


def _layout(model: Lpips, name: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    numbers = SHIFT_TOLERANT if name == "shift_tolerant" else VGG
    for index, (number, layer) in enumerate(zip(numbers, model.convolutions, strict=True)):
        prefix = "features" if name == "torchvision" else f"net.slice{_slice_of(index)}"
        result[f"{prefix}.{number}.weight"] = layer.weight.detach().clone()
        result[f"{prefix}.{number}.bias"] = layer.bias.detach().clone()
    for index, head in enumerate(model.heads):
        result[f"lin{index}.model.1.weight"] = head.detach().clone()
    if name == "shift_tolerant":
        blur = torch.tensor([1.0, 2.0, 1.0])
        blur = torch.outer(blur, blur) / 16
        for stage, number in zip((2, 3, 4, 5), (5, 11, 19, 27), strict=True):
            channels = TAP_CHANNELS[stage - 2]
            result[f"net.slice{stage}.{number}.filt"] = blur.repeat(channels, 1, 1, 1)
    result["scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    return result


def _pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, 32, 40, generator=generator) for _ in "ab")  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["torchvision", "lpips", "own"])
def test_layouts_give_the_same_distance(model: Lpips, layout: str, tmp_path: Path) -> None:
    a, b = _pair()
    if layout == "own":
        model.save(path := tmp_path / "lpips.safetensors")
    else:
        torch.save(_layout(model, layout), path := tmp_path / "weights.pth")
    loaded = Lpips.load(path)
    assert torch.equal(loaded(a, b), model(a, b))


def test_backbone_and_heads_may_be_two_files(model: Lpips, tmp_path: Path) -> None:
    tensors = _layout(model, "torchvision")
    heads = {n: t for n, t in tensors.items() if n.startswith("lin")}
    torch.save(heads, tmp_path / "vgg.pth")
    backbone = {n: t for n, t in tensors.items() if n.startswith("features")}
    write_safetensors(tmp_path / "vgg16.safetensors", backbone)
    a, b = _pair()
    assert torch.equal(Lpips.load(tmp_path)(a, b), model(a, b))


def test_shift_tolerant_weights_blur_when_pooling(model: Lpips, tmp_path: Path) -> None:
    torch.save(_layout(model, "shift_tolerant"), tmp_path / "st.pth")
    loaded = Lpips.load(tmp_path / "st.pth")
    a, b = _pair()
    assert len(loaded.blurs) == 4
    # Same weights, other pooling: related, not equal.
    ratio = loaded(a, b) / model(a, b)
    assert ((ratio > 0.3) & (ratio < 3)).all() and not torch.allclose(ratio, torch.ones(2))


def test_distance_is_zero_symmetric_and_per_image(model: Lpips) -> None:
    a, b = _pair()
    assert torch.equal(model(a, a), torch.zeros(2))
    assert torch.allclose(model(a, b), model(b, a))
    # Same arithmetic, other blocking of the convolutions.
    assert torch.allclose(model(a, b)[1:], model(a[1:], b[1:]), rtol=1e-4)
    assert torch.allclose(model.distances(a, b).sum(1), model(a, b))


def test_parity_scales_images_differently(model: Lpips) -> None:
    parity = Lpips(parity=True)
    parity.load_state_dict(model.state_dict())
    a, b = _pair()
    assert torch.allclose(parity(2 * a - 1, 2 * b - 1), model(a, b), rtol=1e-4)


def test_black_features_have_a_finite_gradient(model: Lpips) -> None:
    """All features zero: the published formula gives NaN here."""
    silent = Lpips()
    silent.load_state_dict(model.state_dict())
    for layer in silent.convolutions:
        layer.bias.data.fill_(-100.0)
    a, b = _pair()
    silent(a.requires_grad_(), b).sum().backward()
    assert a.grad is not None and torch.isfinite(a.grad).all()


def test_weights_are_frozen(model: Lpips) -> None:
    a, b = _pair()
    model(a.requires_grad_(), b).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_bad_files_are_explained(model: Lpips, tmp_path: Path) -> None:
    tensors = _layout(model, "torchvision")
    torch.save({n: t for n, t in tensors.items() if "lin" not in n}, tmp_path / "no_heads.pth")
    with pytest.raises(InputFileError, match="folder"):
        Lpips.load(tmp_path / "no_heads.pth")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "no_vgg.pth")
    with pytest.raises(InputFileError, match="0 VGG16 convolutions"):
        Lpips.load(tmp_path / "no_vgg.pth")
    tensors["features.0.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(tensors, tmp_path / "shape.pth")
    with pytest.raises(InputFileError, match="shape"):
        Lpips.load(tmp_path / "shape.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputFileError, match="unreadable"):
        Lpips.load(tmp_path / "text.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match="without weights"):
        Lpips.load(tmp_path / "empty")
