"""LPIPS, the learned perceptual distance (Zhang et al. 2018), on VGG16, without torchvision.

Weights come from a file of the user. Layouts understood (told apart by their keys):
    torchvision VGG16 (`features.0.weight`, ...) with the linear heads of the LPIPS release
        (`lin0.model.1.weight`, ...) in the same file or in a second file of the same folder;
    a whole LPIPS model (`net.slice1.0.weight`, ... and heads);
    shift-tolerant LPIPS (Ghildyal & Liu 2022): as before, with blur filters for pooling;
    safetensors written by `Lpips.save` (`convolutions.0.weight`, ...).
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_safetensors, require_file, write_safetensors

# Width of the 13 convolutions; taps follow the last convolution of every stage.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
TAP_CHANNELS = tuple(stage[-1] for stage in STAGES)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10
WHAT = "LPIPS weights (VGG16 and five linear heads)"


class Lpips(nn.Module):
    """Perceptual distance of images in 0..1; frozen.

    Args:
        parity: reproduce the published fit, which feeds 0..1 where -1..1 is expected and adds the
            epsilon outside the root (infinite gradient where all features are zero).
        blur_pooling: pooling of shift-tolerant LPIPS (blur filters instead of plain max pooling).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, parity: bool = False, blur_pooling: bool = False) -> None:
        super().__init__()
        widths = [3, *(width for stage in STAGES for width in stage)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths)
        )
        self.heads = nn.ParameterList(torch.zeros(1, c, 1, 1) for c in TAP_CHANNELS)
        self.blurs = nn.ParameterList(
            torch.zeros(c, 1, 3, 3) for c in (TAP_CHANNELS[:-1] if blur_pooling else ())
        )
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.parity = parity
        self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features at the five taps of (B, 3, H, W) images in 0..1."""
        x = images if self.parity else 2 * images - 1
        x = (x - self.shift) / self.scale
        taps: list[Tensor] = []
        convolutions = iter(self.convolutions)
        for stage, widths in enumerate(STAGES):
            if stage:
                x = self._pool(x, stage - 1)
            for _ in widths:
                x = F.relu(next(convolutions)(x))
            taps.append(self._normalise(x))
        return taps

    def _pool(self, x: Tensor, stage: int) -> Tensor:
        if not len(self.blurs):
            return F.max_pool2d(x, 2)
        x = F.pad(F.max_pool2d(x, 2, 1), (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, self.blurs[stage], stride=2, groups=x.shape[1])

    def _normalise(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(1, keepdim=True)
        if self.parity:
            return x / (squares.sqrt() + NORM_EPS)
        return x.float() / (squares + NORM_EPS).sqrt()

    def distances(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance per image and tap, (B, 5)."""
        with torch.no_grad():
            wanted = self.features(target)
        layers = [
            ((have - want).square() * head).sum(1).mean((1, 2))
            for have, want, head in zip(self.features(image), wanted, self.heads, strict=True)
        ]
        return torch.stack(layers, dim=1)

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Distance per image, (B,). Gradients flow to `image` only."""
        if image.is_cuda and not self.parity:
            # The network is a fixed ruler: half precision changes it by less than 1 %.
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return self.distances(image, target).sum(1)
        return self.distances(image, target).sum(1)

    @classmethod
    def load(cls, path: str | Path, *, parity: bool = False, device: str = "cpu") -> Lpips:
        """Loads weights from a file, or from a folder whose files hold backbone and heads.

        Raises:
            InputFileError: unreadable, or a tensor is missing or has the wrong shape.
        """
        source = Path(path)
        files = [source]
        if source.is_dir():
            suffixes = (".pth", ".pt", ".safetensors")
            files = sorted(f for f in source.iterdir() if f.suffix in suffixes)
            if not files:
                raise InputFileError(source, "a folder without weights", WHAT)
        raw: dict[str, Tensor] = {}
        for file in files:
            raw.update(read_weight_file(file))
        if "lin0.model.1.weight" not in raw and source.is_file():
            raise_if_no_heads(raw, source)
        return cls.from_tensors(raw, source, parity=parity).to(device)

    @classmethod
    def from_tensors(
        cls, raw: dict[str, Tensor], source: str | Path, *, parity: bool = False
    ) -> Lpips:
        """Builds the network from tensors of any known layout; `source` is for messages.

        Raises:
            InputFileError: a tensor is missing or has the wrong shape.
        """
        weights = convert_lpips_weights(raw, source)
        blur = any(name.startswith("blurs.") for name in weights)
        model = cls(parity=parity, blur_pooling=blur)
        expected = model.state_dict()
        for name, tensor in expected.items():
            if name not in weights:
                raise InputFileError(source, f"no tensor for '{name}'", WHAT)
            if weights[name].shape != tensor.shape:
                found = f"'{name}' of shape {tuple(weights[name].shape)}"
                raise InputFileError(source, found, f"shape {tuple(tensor.shape)}")
        model.load_state_dict({name: weights[name].float() for name in expected})
        return model

    def save(self, path: str | Path) -> None:
        """Writes the weights as safetensors."""
        write_safetensors(path, self.state_dict(), {"format": "lpips-vgg16"})


def raise_if_no_heads(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises InputFileError when a file holds the backbone but not the linear heads."""
    if not any(re.search(r"lins?\.?0|heads\.0", name) for name in tensors):
        raise InputFileError(
            path,
            "no linear heads (lin0.model.1.weight, ...)",
            WHAT,
            "Put the VGG16 file and the heads (lpips v0.1 vgg.pth) into one folder and give the "
            "folder.",
        )


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file (safetensors, or torch without pickled code).

    Raises:
        InputFileError: missing or unreadable.
    """
    require_file(path, WHAT)
    if path.suffix == ".safetensors":
        return read_safetensors(path, WHAT)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a bad file
        raise InputFileError(path, f"unreadable content ({error})", WHAT) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise InputFileError(path, f"a {type(content).__name__}", "a dictionary of tensors")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def convert_lpips_weights(raw: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Renames tensors of any known layout to this module's names; others are left out.

    Convolutions are taken in the order of their numbers, blur filters likewise.

    Raises:
        InputFileError: no 13 convolutions of known names.
    """
    if "convolutions.0.weight" in raw:
        return dict(raw)
    numbered: dict[tuple[int, int], str] = {}
    blurs: dict[int, Tensor] = {}
    converted: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        if found := re.fullmatch(r"(?:.*\.)?features\.(\d+)\.weight", name):
            numbered[0, int(found[1])] = name
        elif found := re.fullmatch(r"(?:net\.)?slice(\d)\.(\d+)\.weight", name):
            numbered[int(found[1]), int(found[2])] = name
        elif found := re.fullmatch(r"(?:net\.)?slice(\d)\.\d+\.filt", name):
            blurs[int(found[1])] = tensor
        elif found := re.fullmatch(r"(?:lins\.|lin)(\d)\.model\.1\.weight", name):
            converted[f"heads.{found[1]}"] = tensor
    if len(numbered) != sum(map(len, STAGES)):
        raise InputFileError(path, f"{len(numbered)} VGG16 convolutions", f"13, as part of {WHAT}")
    for index, key in enumerate(sorted(numbered)):
        name = numbered[key]
        converted[f"convolutions.{index}.weight"] = raw[name]
        bias = name.removesuffix("weight") + "bias"
        if bias in raw:
            converted[f"convolutions.{index}.bias"] = raw[bias]
    for index, key_stage in enumerate(sorted(blurs)):
        converted[f"blurs.{index}"] = blurs[key_stage]
    return converted
