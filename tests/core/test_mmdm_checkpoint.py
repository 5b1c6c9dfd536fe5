"""Importing checkpoints in the released layout, and our folders."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from cap4d_core.diffusion.checkpoint import load_mmdm, prepare_mmdm, save_mmdm
from cap4d_core.diffusion.denoiser import AutoencoderConfig, MMDMConfig
from cap4d_core.diffusion.model_weights import read_released
from cap4d_core.diffusion.released_config import config_from_released
from cap4d_core.diffusion.released_layout import (
    TABLE_NAMES,
    UNUSED_NAMES,
    autoencoder_key_map,
    denoiser_key_map,
    export_released_state_dict,
    is_pointwise_convolution,
    random_released_state_dict,
    write_released_checkpoint,
)
from cap4d_core.errors import UserError
from cap4d_core.files.basic import sha256_file
from cap4d_core.files.safetensors_stream import write_safetensors_stream
from tests.core.mmdm_models import TINY_RELEASED, random_frames, triangle_tables

GOLDENS = Path(__file__).parents[1] / "goldens" / "mmdm"
KEY_TABLE = GOLDENS / "C_state_dict_keys.tsv"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_released_state_dict(TINY_RELEASED, triangle_tables(), seed=3)


def write(folder: Path, state: dict[str, Any], name: str = "model.ckpt") -> Path:
    path = folder / name
    write_released_checkpoint(path, state)
    return path


def test_key_map_is_the_published_one() -> None:
    """Every one of the 830 released keys, its shape and its counterpart."""
    rows = [line.split("\t") for line in KEY_TABLE.read_text().splitlines()[1:]]
    key_map = denoiser_key_map(MMDMConfig()) | autoencoder_key_map(AutoencoderConfig())
    assert set(key_map) | set(TABLE_NAMES) | UNUSED_NAMES == {row[0] for row in rows}
    for released, _kind, _dtype, _shape, ours, note in rows:
        if ours:
            assert key_map[released] == ours
        assert is_pointwise_convolution(released) == note.startswith("1x1 conv")


def test_prepared_folder_is_the_same_network(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = write(tmp_path, state)
    prepare_mmdm(source, tmp_path / "mmdm", config=TINY_RELEASED)
    direct = load_mmdm(source, config=TINY_RELEASED)
    prepared = load_mmdm(tmp_path / "mmdm")
    assert prepared.config == direct.config == TINY_RELEASED
    inputs = random_frames(TINY_RELEASED, batch=1, num_references=1)
    assert torch.equal(prepared.denoiser(*inputs), direct.denoiser(*inputs))
    image = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    assert torch.equal(prepared.autoencoder.encode(image), direct.autoencoder.encode(image))
    assert prepared.tables is not None and direct.tables is not None
    for name, table in triangle_tables().items():
        assert torch.equal(prepared.tables[name], table) and torch.equal(direct.tables[name], table)


def test_export_returns_the_original_state_dict(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Importing and exporting again loses nothing."""
    model = load_mmdm(write(tmp_path, state), config=TINY_RELEASED)
    assert model.tables is not None
    exported = export_released_state_dict(model.denoiser, model.autoencoder, model.tables)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)


def test_golden_weights_as_a_checkpoint_file(tmp_path: Path) -> None:
    """A file in the released layout, with its YAML, predicts what the published network does."""
    entries = {e["file"]: e for e in json.loads((GOLDENS / "manifest.json").read_text())["files"]}
    state = {}
    parts = (
        ("C_unet_small_weights.npz", "model.diffusion_model."),
        ("D_vae_small_weights.npz", "first_stage_model."),
    )
    for name, prefix in parts:
        with np.load(GOLDENS / name) as arrays:
            state |= {prefix + k: torch.from_numpy(arrays[k].astype(np.float32)) for k in arrays}
    state |= {key: triangle_tables()[name] for key, name in TABLE_NAMES.items()}
    state["logvar"] = torch.zeros(1000)
    (tmp_path / "checkpoints").mkdir()
    source = write(tmp_path / "checkpoints", state)
    settings = {
        "network": {"params": entries["C_unet_small_weights.npz"]["notes"]},
        "autoencoder": {"params": {"ddconfig": entries["D_vae_small_weights.npz"]["notes"]}},
    }
    (tmp_path / "config_dump.yaml").write_text(yaml.safe_dump(settings))
    prepare_mmdm(source, tmp_path / "mmdm")
    with np.load(GOLDENS / "C_unet_small_io.npz") as golden:
        io = {key: torch.from_numpy(golden[key]) for key in golden if not key.startswith("act")}
    cond = {key: io[key] for key in ("pos_enc", "z_input", "ref_mask")}
    for path in (source, tmp_path / "mmdm"):
        model = load_mmdm(path)
        actual = model.denoiser(io["x"], io["timesteps"], cond)
        torch.testing.assert_close(actual, io["y"], atol=3e-5, rtol=0)  # as in the manifest
        assert model.config.views_per_call == io["x"].shape[1]
        assert model.schedule.config.num_frames == 8


def test_folder_contents(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = write(tmp_path, state)
    seen = []
    out = tmp_path / "mmdm"
    prepare_mmdm(
        source,
        out,
        head_tables=triangle_tables(),
        dtype="bf16",
        config=TINY_RELEASED,
        sha256=sha256_file(source),
        callback=seen.append,
    )
    assert {f.name for f in out.iterdir()} == {
        "denoiser.safetensors",
        "autoencoder.safetensors",
        "conditioning.safetensors",
        "config.json",
        "provenance.json",
    }
    assert {t.dtype for t in load_file(out / "denoiser.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(out / "autoencoder.safetensors").values()} == {torch.float32}
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["source"] == {
        "name": "model.ckpt",
        "sha256": sha256_file(source),
        "bytes": source.stat().st_size,
    }
    assert provenance["tables"]["differences"] == []
    assert seen[-1].done == seen[-1].total == len(seen)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    prepare_mmdm(source, out, triangle_tables(), dtype="bf16", config=TINY_RELEASED)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_bf16_storage_rounds_weights_once(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    source = write(tmp_path, state)
    prepare_mmdm(source, tmp_path / "half", dtype="bf16", config=TINY_RELEASED)
    stored = load_mmdm(tmp_path / "half", dtype=torch.bfloat16).denoiser.state_dict()
    cast = load_mmdm(source, dtype=torch.bfloat16, config=TINY_RELEASED).denoiser.state_dict()
    assert all(torch.equal(stored[key], cast[key]) for key in cast)
    with caplog.at_level(logging.WARNING):
        load_mmdm(tmp_path / "half", dtype=torch.float32)
    assert "bfloat16" in caplog.text


def test_prepared_folder_can_be_converted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = write(tmp_path, state)
    prepare_mmdm(source, tmp_path / "full", config=TINY_RELEASED)
    prepare_mmdm(source, tmp_path / "direct", dtype="bf16", config=TINY_RELEASED)
    prepare_mmdm(tmp_path / "full", tmp_path / "via", dtype="bf16")
    for name in ("denoiser.safetensors", "config.json"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "via" / name).read_bytes()
    with pytest.raises(UserError, match="another output folder"):
        prepare_mmdm(tmp_path / "full", tmp_path / "full")


def test_save_and_load(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model = load_mmdm(write(tmp_path, state), config=TINY_RELEASED)
    tables = {name: table.numpy() for name, table in triangle_tables().items()}
    save_mmdm(tmp_path / "out", model.denoiser, model.autoencoder, tables, {"made_by": "test"})
    again = load_mmdm(tmp_path / "out")
    assert again.provenance["made_by"] == "test"
    inputs = random_frames(TINY_RELEASED, batch=1, num_references=2)
    assert torch.equal(again.denoiser(*inputs), model.denoiser(*inputs))


def test_all_missing_unexpected_and_misshapen_tensors_are_listed(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    broken = dict(state)
    gone = [
        "model.diffusion_model.out.0.bias",
        "first_stage_model.decoder.norm_out.weight",
        "cond_stage_model.renderer.props",
    ]
    for key in gone:
        del broken[key]
    broken["model_ema.decay"] = torch.zeros(1)
    broken["model.diffusion_model.middle_block.1.norm.weight"] = torch.zeros(7)
    source = write(tmp_path, broken)
    with pytest.raises(UserError) as error:
        prepare_mmdm(source, tmp_path / "out", config=TINY_RELEASED)
    text = str(error.value)
    assert "5 tensors" in text
    for key in gone:
        assert f"missing: {key}" in text
    assert "unexpected: model_ema.decay" in text
    assert "shape: model.diffusion_model.middle_block.1.norm.weight is (7,), expected (64,)" in text
    assert not (tmp_path / "out").exists()


def test_something_else_than_this_model_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path, {"weight": torch.zeros(3)})
    with pytest.raises(UserError, match="Is it the released MMDM checkpoint"):
        load_mmdm(source)


def test_nested_state_dict_is_accepted(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    assert load_mmdm(tmp_path / "model.ckpt", config=TINY_RELEASED).config == TINY_RELEASED


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, state: dict[str, Tensor], zipped: bool
) -> None:
    trap = tmp_path / "was_run"
    content = {**state, "extra": Malicious(trap)}
    torch.save(content, tmp_path / "bad.ckpt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(content))
    for name in ("bad.ckpt", "raw.ckpt"):
        with pytest.raises(UserError, match=name):
            prepare_mmdm(tmp_path / name, tmp_path / "out")
        assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"", "an empty file"),
        (b"\x00" * 4096, "besides tensors, or no torch file|unreadable"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=found):
        load_mmdm(tmp_path / "model.ckpt")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.9999])
def test_truncated_file(tmp_path: Path, state: dict[str, Tensor], share: float) -> None:
    source = write(tmp_path, state)
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"model\.ckpt.*(truncated|no torch file)"):
        load_mmdm(source)


def test_flipped_bit_in_the_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = write(tmp_path, state)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 4
    source.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.ckpt: found damaged content"):
        load_mmdm(source, config=TINY_RELEASED)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {}, {"a": 1.0}])
def test_not_a_dict_of_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"model\.ckpt: found .*expected an MMDM checkpoint"):
        load_mmdm(tmp_path / "model.ckpt")


def test_wrong_hash_and_nan_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = write(tmp_path, state)
    with pytest.raises(UserError, match="SHA-256"):
        prepare_mmdm(source, tmp_path / "out", config=TINY_RELEASED, sha256="0" * 64)
    damaged = dict(state)
    key = "model.diffusion_model.out.2.bias"
    damaged[key] = torch.full_like(state[key], float("nan"))
    with pytest.raises(UserError, match=r"1 tensors hold NaN(.|\n)*conv_out\.bias"):
        prepare_mmdm(write(tmp_path, damaged), tmp_path / "out", config=TINY_RELEASED)
    assert not (tmp_path / "out" / "denoiser.safetensors").exists()


def test_checkpoint_in_a_folder(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "checkpoints", state, "a.ckpt")
    assert load_mmdm(tmp_path, config=TINY_RELEASED).provenance["source"]["name"] == "a.ckpt"
    write(tmp_path / "checkpoints", state, "b.ckpt")
    with pytest.raises(UserError, match=r"several checkpoints \(.*a.ckpt.*b.ckpt"):
        load_mmdm(tmp_path, config=TINY_RELEASED)
    with pytest.raises(UserError, match="nothing there"):
        load_mmdm(tmp_path / "absent.ckpt")


RELEASED_YAML = {
    "model": {
        "target": "some.Model",
        "params": {
            "timesteps": 500,
            "linear_start": 0.001,
            "n_frames": 5,
            "sqrt_shift": False,
            "image_size": 16,
            "scale_factor": 0.2,
            "unet_config": {
                "target": "some.Network",
                "params": {
                    "image_size": 16,
                    "temporal_mode": "3d",
                    "model_channels": 32,
                    "channel_mult": [1, 2],
                    "num_res_blocks": 1,
                    "attention_resolutions": [1],
                    "num_head_channels": 16,
                    "condition_channels": 10,
                    "time_steps": 4,
                },
            },
            "first_stage_config": {
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "ch": 32,
                        "ch_mult": [1, 2],
                        "num_res_blocks": 1,
                        "z_channels": 4,
                        "in_channels": 3,
                        "attn_resolutions": [],
                    },
                }
            },
            "cond_stage_config": {
                "params": {"super_resolution": 3, "std_expr_deformation": 0.02},
            },
        },
    }
}


def test_config_comes_from_the_yaml_beside_the_checkpoint(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    source = write(tmp_path / "checkpoints", state)
    (tmp_path / "config_dump.yaml").write_text(yaml.safe_dump(RELEASED_YAML))
    config = read_released(source).config
    assert (config.head_channels, config.views_per_call, config.latent_size) == (16, 4, 16)
    assert config.attention_levels == (0,)
    schedule = config.schedule
    assert (schedule.num_train_timesteps, schedule.num_frames, schedule.image_size) == (500, 5, 16)
    assert (schedule.beta_start, schedule.sqrt_shift, schedule.zero_snr) == (0.001, False, True)
    assert config.autoencoder.scaling_factor == 0.2
    assert config.conditioning.super_resolution == 3


def test_config_that_contradicts_the_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    source = write(tmp_path, state)
    wrong = TINY_RELEASED.model_copy(update={"condition_channels": 50, "attention_levels": (1,)})
    with pytest.raises(UserError) as error:
        load_mmdm(source, config=wrong)
    assert "condition_channels: the config says 50, the weights have 10" in str(error.value)
    assert "attention_levels" in str(error.value)


def test_sizes_are_read_from_shapes_without_a_config(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    """Only head size, views per call, latent size and schedule fall back to the released ones."""
    with pytest.raises(UserError, match=r"head_channels = 64(.|\n)*config_dump\.yaml"):
        load_mmdm(write(tmp_path, state))
    wide = TINY_RELEASED.model_copy(update={"model_channels": 64, "head_channels": 64})
    source = write(tmp_path, random_released_state_dict(wide, triangle_tables()))
    expected = wide.model_copy(update={"views_per_call": 8, "latent_size": 64})
    assert load_mmdm(source).config == expected


def test_unsupported_variants_are_refused() -> None:
    with pytest.raises(UserError, match="temporal_mode"):
        config_from_released({"model_channels": 32, "temporal_mode": "1d"})


def test_differing_head_tables_are_reported(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    head = triangle_tables()
    head["props"][1, 2] += 0.25
    head["faces"] = head["faces"][:1]
    source = write(tmp_path, state)
    with caplog.at_level(logging.WARNING):
        prepare_mmdm(source, tmp_path / "out", head, config=TINY_RELEASED)
    assert "by up to 0.25" in caplog.text and "faces: shape (2, 3)" in caplog.text
    tables = load_mmdm(tmp_path / "out").tables
    assert tables is not None
    assert torch.equal(tables["props"], triangle_tables()["props"])  # the file's are kept


def test_checkpoint_without_tables(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    bare = {key: value for key, value in state.items() if key not in TABLE_NAMES}
    source = write(tmp_path, bare)
    assert load_mmdm(source, config=TINY_RELEASED).tables is None
    with pytest.raises(UserError, match=r"missing: cond_stage_model\.renderer\.faces"):
        prepare_mmdm(source, tmp_path / "out", config=TINY_RELEASED)
    prepare_mmdm(source, tmp_path / "out", triangle_tables(), config=TINY_RELEASED)
    assert load_mmdm(tmp_path / "out").tables is not None


def test_inconsistent_tables_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    broken = dict(state)
    broken["cond_stage_model.renderer.props"] = torch.zeros(3, 3)
    with pytest.raises(UserError, match="face corners 0 to 3, 3 vertices"):
        load_mmdm(write(tmp_path, broken), config=TINY_RELEASED)


def test_damaged_folder(tmp_path: Path, state: dict[str, Tensor]) -> None:
    out = tmp_path / "mmdm"
    prepare_mmdm(write(tmp_path, state), out, config=TINY_RELEASED)
    weights = out / "denoiser.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"denoiser\.safetensors: found unreadable"):
        load_mmdm(out)
    weights.write_bytes(content)
    config = json.loads((out / "config.json").read_text())
    config["model"]["num_res_blocks"] = 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"missing: down_blocks\.0\.resnets\.1"):
        load_mmdm(out)
    (out / "config.json").write_text(json.dumps({"format_version": 0}))
    with pytest.raises(UserError, match="format version 0"):
        load_mmdm(out)


def test_streaming_writer_is_readable_and_strict(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b.empty": torch.zeros(0, 3),
        "c": torch.tensor([True, False]),
        "d": torch.arange(5),
        "e": torch.tensor(2.5),
    }
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    path = tmp_path / "x.safetensors"
    write_safetensors_stream(path, layout, tensors.items(), {"note": "yes"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="tensor d was not given"):
        write_safetensors_stream(path, layout, list(tensors.items())[:3])
    with pytest.raises(ValueError, match="expected a"):
        write_safetensors_stream(path, layout, [("a", torch.zeros(3))])
    assert load_file(path).keys() == tensors.keys()  # failures leave the old file


FULL_SIZE = """
import sys, torch
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.released_layout import *
with torch.device("meta"):
    config = MMDMConfig()
    state = export_released_state_dict(
        MMDMDenoiser(config), Autoencoder(config.autoencoder), {}.fromkeys(TABLE_NAMES.values(), 0)
    )
torch.manual_seed(0)
block = torch.randn(1 << 20) * 0.02
def fill(t):
    return block.repeat(-(-t.numel() // block.numel()))[: t.numel()].reshape(t.shape).clone()
tables = {
    "freqs": 2.0 ** torch.arange(7), "faces": torch.randint(0, 5223, (10316, 3)),
    "faces_uvs": torch.randint(0, 5223, (10316, 3)), "face_mask": torch.rand(10316) > 0.5,
    "props": torch.randn(5223, 3),
}
state = {k: tables[TABLE_NAMES[k]] if k in TABLE_NAMES else fill(t) for k, t in state.items()}
write_released_checkpoint(sys.argv[1], state)
"""

IMPORT = """
import resource, sys, time
from cap4d_core.diffusion.checkpoint import prepare_mmdm
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = time.monotonic()
prepare_mmdm(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(base, peak, time.monotonic() - start)
"""


@pytest.mark.full_size
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_full_size_import_fits_in_memory(tmp_path: Path, dtype: str) -> None:
    """A random checkpoint of the released size; peak memory below 1.5 times the file."""
    source = tmp_path / "full.ckpt"
    try:
        subprocess.run([sys.executable, "-c", FULL_SIZE, str(source)], check=True)
        size = source.stat().st_size
        assert size > 3.59e9
        done = subprocess.run(
            [sys.executable, "-c", IMPORT, str(source), str(tmp_path / "out"), dtype],
            check=True,
            capture_output=True,
            text=True,
        )
        base, peak, seconds = (float(word) for word in done.stdout.split())
        print(
            f"{dtype}: file {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB "
            f"({base / 1e9:.2f} before), {seconds:.0f} s"
        )
        assert peak < 1.5 * size
        key = "conv_in.weight"
        stored = load_file(tmp_path / "out" / "denoiser.safetensors")[key]
        original = torch.load(source, mmap=True, weights_only=True)
        expected = original["model.diffusion_model.input_blocks.0.0.weight"]
        assert torch.equal(stored, expected.to(stored.dtype))
    finally:
        source.unlink(missing_ok=True)
        for file in tmp_path.glob("out/*"):
            file.unlink()
