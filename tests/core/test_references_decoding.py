"""Reference sets and decoded views on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cap4d_core.diffusion import decoding
from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.decoding import _Decoder, compiled_decoder, decode_views
from cap4d_core.diffusion.network_setup import load_autoencoder
from cap4d_core.diffusion.pictures import (
    bytes_on_device,
    contact_sheet,
    evenly_spaced,
    image_from_network,
)
from cap4d_core.diffusion.references import crop_references, encode_references
from cap4d_core.diffusion.view_plan import plan_views
from cap4d_core.diffusion.view_plan_file import read_plan
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import (
    read_json,
    read_npz,
    read_safetensors,
    sha256_file,
    write_safetensors,
)
from cap4d_core.files.image_set import read_image_set
from cap4d_core.files.images import read_rgb
from cap4d_core.progress import Progress
from cap4d_core.settings import SamplingSettings
from tests.core.sampling_fixtures import TINY, tiny_settings, world


def check_index(folder: Path, index: Path) -> dict[str, str]:
    files: dict[str, str] = read_json(index)["files"]
    for name, digest in files.items():
        assert sha256_file(folder / name) == digest
    return files


def test_encoded_references(tmp_path: Path) -> None:
    w, settings = world(), tiny_settings()
    for name in ("a", "b"):
        encode_references(w.tracking, w.head_model, w.mmdm, tmp_path / name, settings)
    files = check_index(tmp_path / "a", tmp_path / "a" / "index.json")
    items = read_image_set(tmp_path / "a")
    assert len(items) == 4 and len(files) == 4 * 3 + 1
    assert all(read_rgb(item.image).shape == (32, 32, 3) for item in items)
    latents = read_safetensors(tmp_path / "a" / "latents.safetensors")[0]["latents"]
    assert latents.shape == (4, 4, 8, 8) and torch.isfinite(latents).all()
    # Noise of the posterior belongs to the seed and the frame.
    assert torch.equal(
        latents, read_safetensors(tmp_path / "b" / "latents.safetensors")[0]["latents"]
    )
    encode_references(w.tracking, w.head_model, w.mmdm, tmp_path / "b", tiny_settings(seed=1))
    other = read_safetensors(tmp_path / "b" / "latents.safetensors")[0]["latents"]
    assert not torch.equal(latents, other)
    # Images are round trips of the crops beside them.
    autoencoder, _ = load_autoencoder(w.mmdm, settings, torch.device("cpu"))
    decoded = image_from_network(autoencoder.decode(latents[1:2])[0].numpy())
    np.testing.assert_array_equal(decoded, read_rgb(items[1].image))
    written = read_npz(items[2].image.parents[1] / "flame" / "00002.npz")
    assert written["extr"].dtype == np.float32 and written["crop_box"].shape == (4,)
    assert int(written["timestep_id"]) == items[2].parameters.timestep_id


def test_crops_alone_need_no_model(tmp_path: Path) -> None:
    w, settings = world(), tiny_settings(resolution=48)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00009.png").write_bytes(b"left over")
    crop_references(w.tracking, w.head_model, tmp_path, settings)
    items = read_image_set(tmp_path)
    assert len(items) == 4 and read_rgb(items[0].image).shape == (48, 48, 3)
    check_index(tmp_path, tmp_path / "index.json")
    encode_references(w.tracking, w.head_model, w.mmdm, tmp_path / "e", tiny_settings())
    crop_references(w.tracking, w.head_model, tmp_path / "c", tiny_settings())
    np.testing.assert_array_equal(
        read_rgb(tmp_path / "c/images/00003.png"), read_rgb(tmp_path / "e/crops/00003.png")
    )


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.npz"
    plan_views(world().tracking, world().head_model, path, tiny_settings(), "ana")
    return path


def shard_file(path: Path, ids: list[int], next_step: int = 10) -> Path:
    latents = torch.randn(len(ids), 4, 8, 8, generator=torch.Generator().manual_seed(ids[0]))
    tensors = {"latents": latents, "view_ids": torch.tensor(ids)}
    write_safetensors(path, tensors, {"next_step": str(next_step)})
    return path


def test_decoded_views(plan_file: Path, tmp_path: Path) -> None:
    settings = tiny_settings()
    output = tmp_path / "generated"
    for shard, ids in enumerate([[1, 2, 5, 7], [0, 3, 4, 6]]):
        latents = shard_file(tmp_path / f"{shard}.safetensors", ids)
        index = output / "index" / f"{shard}.json"
        decode_views(plan_file, [latents], world().mmdm, output, index, settings)
        files = check_index(output, index)
        assert set(files) == {
            f"{part}/{i:05d}.{suffix}"
            for i in ids
            for part, suffix in (("images", "png"), ("flame", "npz"))
        }
        assert index.with_suffix(".png").exists()
        assert not index.with_suffix(".partial.json").exists()
    items = read_image_set(output)
    plan = read_plan(plan_file)
    for item, view in zip(items, plan.views, strict=True):
        np.testing.assert_array_equal(item.parameters.expr, view.expr)
        np.testing.assert_array_equal(item.parameters.extr, view.extr)
    assert read_npz(output / "flame/00000.npz")["extr"].dtype == np.float64
    with pytest.raises(InputFileError, match="after 3 steps"):
        early = shard_file(tmp_path / "early.safetensors", [0], next_step=3)
        decode_views(plan_file, early, world().mmdm, output, index, settings)


def test_interrupted_decoding_goes_on(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "VIEWS_PER_UPDATE", 1)
    latents = shard_file(tmp_path / "s.safetensors", list(range(8)))
    done: list[int] = []

    class Killed(Exception):
        pass

    def run(folder: str, stop: int) -> None:
        def tell(progress: Progress) -> None:
            done.append(progress.done)
            if progress.done == stop:
                raise Killed

        decode_views(
            plan_file, latents, world().mmdm, tmp_path / folder, tmp_path / folder / "i.json",
            tiny_settings(), callback=tell,
        )  # fmt: skip

    run("whole", 99)
    done.clear()
    with pytest.raises(Killed):
        run("cut", 5)
    assert not (tmp_path / "cut" / "i.json").exists()
    (tmp_path / "cut" / "images" / "00001.png").write_bytes(b"damaged")
    run("cut", 99)
    assert done == [1, 2, 3, 4, 5, 5, 6, 7, 8]  # views 1 (damaged) and 5 to 7 once more
    assert check_index(tmp_path / "cut", tmp_path / "cut" / "i.json") == check_index(
        tmp_path / "whole", tmp_path / "whole" / "i.json"
    )


def test_published_bytes_are_cut_off() -> None:
    ramp = np.linspace(-1.2, 1.2, 3 * 64).reshape(3, 8, 8)
    unit = np.clip((ramp + 1) / 2, 0, 1).transpose(1, 2, 0)
    np.testing.assert_array_equal(image_from_network(ramp, truncate=True), np.floor(unit * 255))
    np.testing.assert_array_equal(image_from_network(ramp), np.rint(unit * 255))


def test_contact_sheet_keeps_order() -> None:
    colours = [np.full((4, 4, 3), 40 * i, np.uint8) for i in range(5)]
    sheet = contact_sheet(colours, tile=8, columns=3)
    assert sheet.shape == (18, 28, 3)
    assert [int(sheet[10 * (i // 3) + 4, 10 * (i % 3) + 4, 0]) for i in range(5)] == [
        0, 40, 80, 120, 160
    ]  # fmt: skip
    assert evenly_spaced(100, 5) == [0, 25, 50, 74, 99] and evenly_spaced(3, 8) == [0, 1, 2]
    assert TINY.image_size == 32


@pytest.mark.parametrize("truncate", [False, True])
def test_bytes_are_the_same_wherever_they_are_made(truncate: bool) -> None:
    values = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    # Halves between two levels, where rounding decides.
    values[0, 0] = (torch.arange(64) + 0.5) / 255 * 2 - 1
    expected = image_from_network(values.numpy(), truncate)
    np.testing.assert_array_equal(bytes_on_device(values, truncate).numpy(), expected)


class _Overflowing(torch.nn.Module):
    """Gives infinity in half precision and the latent itself otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))

    def decode(self, latents: torch.Tensor, tiled: bool) -> torch.Tensor:
        image = latents[:, :3] * self.factor.float()
        return image / 0 if self.factor.dtype == torch.float16 else image


def test_what_overflows_in_half_precision_is_decoded_in_full() -> None:
    latent = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
    network: Any = _Overflowing()
    with torch.no_grad():
        made = _Decoder(network, torch.device("cpu"), True, SamplingSettings()).start(latent)()
    np.testing.assert_array_equal(made, image_from_network(latent[0, :3].numpy()))


@pytest.mark.slow
def test_compiled_decoder_is_kept_and_computes_the_same(tmp_path: Path) -> None:
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for seed, loaded in ((0, False), (1, True)):
        torch.manual_seed(seed)
        autoencoder = Autoencoder(TINY.autoencoder).eval().requires_grad_(False)
        decode = compiled_decoder(autoencoder, tmp_path)
        with torch.no_grad():
            torch.testing.assert_close(decode(latent), autoencoder.decode(latent))
        assert decode.is_compiled and decode.was_loaded == loaded


def test_compiling_is_worth_it_for_many_large_views() -> None:
    def worth_it(num_views: int, **values: Any) -> bool:
        return decoding._is_worth_compiling(SamplingSettings(**values), num_views)

    assert worth_it(105) and not worth_it(28)
    assert not worth_it(224, resolution=128) and worth_it(1, compile="on")
    assert not worth_it(840, low_memory=True) and not worth_it(840, compile="off")
