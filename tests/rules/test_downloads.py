"""The download jobs, through their scripts, against a server on this machine."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cap4d_core.avatar.lpips import STAGES, TAP_CHANNELS, Lpips
from cap4d_core.avatar.lpips_download import HEADS
from cap4d_core.diffusion.checkpoint import load_mmdm
from cap4d_core.diffusion.mmdm_download import downloaded_checkpoint
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import read_safetensors
from cap4d_core.job import Job
from tests.core.synthetic_head import head_folder
from tests.download_server import CONTENT, SHA256, Server, running_server
from tests.workflow.tiny_mmdm import CONFIG, write_tiny_checkpoint
from workflow_scripts import (
    download_lpips,
    download_mmdm,
    evaluate_avatar,
    fit_avatar,
    prepare_mmdm,
)

# Numbers of the convolutions in torchvision's VGG16.
VGG_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as instance:
        yield instance


def address(server: Server, name: str) -> str:
    return server.url.replace("file.bin", name)


def mmdm_job(tmp_path: Path, url: str, **params: Any) -> Job:
    record = tmp_path / "assets" / "downloads" / "mmdm" / "download.json"
    params = {"url": url, "config_url": None, "sha256": None, "retries": 0, **params}
    return Job("download_mmdm", {}, {"record": [str(record)]}, params)


def test_checkpoint_and_config_arrive_verified(server: Server, tmp_path: Path) -> None:
    server.files["/config_dump.yaml"] = b"model: {}\n"
    job = mmdm_job(
        tmp_path,
        address(server, "cap4d_mmdm_100k.ckpt?download=1"),
        config_url=address(server, "config_dump.yaml"),
        sha256=SHA256,
    )
    download_mmdm.main(job)
    checkpoint = downloaded_checkpoint(job.output_file("record"))
    assert checkpoint.name == "cap4d_mmdm_100k.ckpt" and checkpoint.read_bytes() == CONTENT
    assert (checkpoint.parent / "config_dump.yaml").read_text() == "model: {}\n"
    assert json.loads(job.output_file("record").read_text())["sha256"] == SHA256


def test_downloaded_weights_are_prepared(server: Server, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "source")
    for name in ("tiny.ckpt", "config_dump.yaml"):
        server.files[f"/{name}"] = (folder / name).read_bytes()
    config_url = address(server, "config_dump.yaml")
    job = mmdm_job(tmp_path, address(server, "tiny.ckpt"), config_url=config_url)
    download_mmdm.main(job)
    inputs = {"source": [], "download": job.output["record"], "head_model": [str(head_folder())]}
    outputs = {"folder": [str(tmp_path / "mmdm")]}
    prepare_mmdm.main(Job("prepare_mmdm", inputs, outputs, {"sha256": None}))
    model = load_mmdm(tmp_path / "mmdm")
    assert model.config.views_per_call == CONFIG.views_per_call
    assert "config_dump.yaml" in model.provenance["config_source"]


def test_unpinned_checkpoint_says_its_hash(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        download_mmdm.main(mmdm_job(tmp_path, server.url))
    assert f"sha256: {SHA256}" in caplog.text and "not verified" in caplog.text


def test_pinning_the_hash_downloads_nothing_again(server: Server, tmp_path: Path) -> None:
    job = mmdm_job(tmp_path, server.url)
    download_mmdm.main(job)
    job.output_file("record").unlink()  # as Snakemake does before a job
    download_mmdm.main(mmdm_job(tmp_path, server.url, sha256=SHA256))
    assert len(server.seen) == 1
    other = address(server, "other/file.bin")  # same name, another address
    download_mmdm.main(mmdm_job(tmp_path, other))
    assert len(server.seen) == 2


def test_wrong_hash_fails_the_job(server: Server, tmp_path: Path) -> None:
    job = mmdm_job(tmp_path, server.url, sha256="0" * 64)
    with pytest.raises(UserError, match=f"is {SHA256}, expected 0000"):
        download_mmdm.main(job)
    assert not job.output_file("record").exists()


def test_interrupted_checkpoint_goes_on_in_the_next_job(server: Server, tmp_path: Path) -> None:
    server.cut_after = [120_000]
    server.statuses = []
    job = mmdm_job(tmp_path, server.url, sha256=SHA256)

    class Died(Exception):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Died

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        patch.setattr("random.uniform", die)  # the job dies in the wait before another attempt
        download_mmdm.main(job)
    download_mmdm.main(job)
    assert server.seen[-1]["range"] == "bytes=120000-"
    assert downloaded_checkpoint(job.output_file("record")).read_bytes() == CONTENT


def test_no_network_says_what_to_set(tmp_path: Path) -> None:
    # Port 9 (discard) refuses connections.
    with pytest.raises(UserError, match=r"Diffusion weights: .*mmdm\.path and remove mmdm\.url"):
        download_mmdm.main(mmdm_job(tmp_path, "http://127.0.0.1:9/m.ckpt"))
    with pytest.raises(UserError, match=r"LPIPS weights: .*fitting\.lpips_weights"):
        download_lpips.main(lpips_job(tmp_path, "http://127.0.0.1:9/vgg16-397923af.pth"))


def test_deleted_checkpoint_is_explained(server: Server, tmp_path: Path) -> None:
    job = mmdm_job(tmp_path, server.url)
    download_mmdm.main(job)
    record = job.output_file("record")
    downloaded_checkpoint(record).unlink()
    with pytest.raises(InputFileError, match=r"Delete .*download\.json to download it again"):
        downloaded_checkpoint(record)


def lpips_job(tmp_path: Path, url: str) -> Job:
    weights = tmp_path / "assets" / "lpips" / "vgg.safetensors"
    return Job("download_lpips", {}, {"weights": [str(weights)]}, {"url": url, "retries": 0})


@pytest.fixture(scope="module")
def vgg16() -> bytes:
    """A file as torchvision's, without the classifier: the values do not matter here."""
    widths = [3, *(width for stage in STAGES for width in stage)]
    tensors = {}
    for number, (i, o) in zip(VGG_LAYERS, itertools.pairwise(widths), strict=True):
        tensors[f"features.{number}.weight"] = torch.full((o, i, 3, 3), 1e-3)
        tensors[f"features.{number}.bias"] = torch.arange(o).float()
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def test_lpips_is_joined_with_its_heads(server: Server, tmp_path: Path, vgg16: bytes) -> None:
    name = f"vgg16-{hashlib.sha256(vgg16).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = vgg16
    server.cut_after = [1_000_000]
    job = lpips_job(tmp_path, address(server, name))
    download_lpips.main(job)
    assert server.seen[-1]["range"] == "bytes=1000000-"
    model = Lpips.load(job.output_file("weights"))
    assert torch.equal(model.convolutions[12].bias, torch.arange(512).float())
    heads, metadata = read_safetensors(HEADS)
    for index, channels in enumerate(TAP_CHANNELS):
        head = heads[f"lin{index}.model.1.weight"]
        assert head.shape == (1, channels, 1, 1) and bool((head >= 0).all())
        assert torch.equal(model.heads[index], head)
    assert metadata["license"] == "BSD-2-Clause"
    assert "Richard Zhang" in (HEADS.parent / "LICENSE").read_text()
    # The half gigabyte that it was made from is not kept.
    assert not list((tmp_path / "assets" / "downloads").rglob("*.p*"))


def test_lpips_of_another_hash_than_its_name_is_refused(server: Server, tmp_path: Path) -> None:
    job = lpips_job(tmp_path, address(server, "vgg16-397923af.pth"))
    with pytest.raises(UserError, match=f"is {SHA256}, expected it to begin with 397923af"):
        download_lpips.main(job)
    assert not job.output_file("weights").exists()


def test_lpips_without_a_hash_is_allowed_and_checked(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = lpips_job(tmp_path, address(server, "mirror.pth"))
    with caplog.at_level(logging.WARNING), pytest.raises(InputFileError, match="unreadable"):
        download_lpips.main(job)
    assert SHA256 in caplog.text


@pytest.mark.parametrize("lpips", [[], ["results/assets/lpips/vgg.safetensors"]])
def test_fit_and_evaluation_take_the_file(
    lpips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the setting says 'download', the file is known to the rules only."""
    seen: list[object] = []

    def fit(*arguments: Any, **_: Any) -> None:
        seen.append(arguments[2].lpips_weights)

    def evaluate(*_: Any, lpips_weights: Path | None, **__: Any) -> None:
        seen.append(lpips_weights and str(lpips_weights))

    def stand_in(*_: Any, **__: Any) -> Any:
        return []

    monkeypatch.setattr("cap4d_core.avatar.fitting.fit_avatar", fit)
    monkeypatch.setattr("cap4d_core.evaluation.evaluate.evaluate_avatar", evaluate)
    monkeypatch.setattr("cap4d_core.files.image_set.read_image_index", stand_in)
    monkeypatch.setattr("cap4d_core.flame.model.HeadModel.load", stand_in)
    monkeypatch.setattr("cap4d_core.avatar.gaussians.GaussianAvatar.load", stand_in)
    inputs = {name: ["x/x"] for name in ("references", "head_model", "avatar", "held_out")}
    settings = {"lpips_weights": "download" if lpips else None}
    outputs = {name: [str(tmp_path / name)] for name in ("avatar", "metrics")}
    job = Job("fit", {**inputs, "lpips": lpips}, outputs, {"settings": settings, "lower_jaw": True})
    fit_avatar.main(job)
    evaluate_avatar.main(replace(job, params={"settings": {}, "lower_jaw": True}))
    assert seen == [next(iter(lpips), None)] * 2
