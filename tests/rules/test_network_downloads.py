"""Face networks from a server on this machine, and where they go."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cap4d_core.batch.asset_cache import CACHE_VARIABLE
from cap4d_core.config import load_config
from cap4d_core.errors import ConfigError, InputFileError, UserError
from cap4d_core.job import Job
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.face_models_download import networks_folder
from cap4d_core.tracking.observe import FaceObserver
from tests.core.own_networks import own_networks
from tests.download_server import Server, running_server
from workflow_scripts import download_networks, place_landmarks, track_driving, track_subject


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as instance:
        yield instance


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    folder = own_networks(tmp_path / "own")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for path in folder.iterdir():
            content.write(path, f"../../own/{path.name}")
        content.writestr("readme.txt", "hello")
    return buffer.getvalue()


def job(tmp_path: Path, server: Server, content: bytes, **params: Any) -> Job:
    server.files["/networks.zip"] = content
    record = tmp_path / "assets/downloads/networks/download.json"
    params = {
        "url": server.url.replace("file.bin", "networks.zip"),
        "sha256": hashlib.sha256(content).hexdigest(),
        "retries": 0,
        **params,
    }
    return Job("download_networks", {}, {"record": [str(record)]}, params)


def test_networks_arrive_verified_and_are_used(
    server: Server, tmp_path: Path, archive: bytes
) -> None:
    task = job(tmp_path, server, archive)
    server.cut_after = [300]  # resumed
    download_networks.main(task)
    assert server.seen[-1]["range"] == "bytes=300-"
    record = task.output_file("record")
    assert json.loads(record.read_text())["networks"] == ["selfie_segmentation"]
    # Names inside the archive do not decide where it goes; only networks are unpacked.
    assert {p.name for p in record.parent.iterdir()} == {
        "download.json", "networks.zip", "provenance.json",
        "selfie_segmentation.json", "selfie_segmentation.safetensors",
    }  # fmt: skip
    folder = networks_folder([record])
    assert folder == str(record.parent) and networks_folder([Path(folder)]) == folder
    assert networks_folder([]) is None
    FaceObserver(TrackingSettings(networks=folder))  # detector and landmarks: the shipped ones
    record.unlink()
    download_networks.main(task)
    assert len(server.seen) == 2  # kept, so not fetched again


def test_wrong_hash_and_damage_are_refused(server: Server, tmp_path: Path, archive: bytes) -> None:
    with pytest.raises(UserError, match=r"Face networks: .*expected 0000.*shipped ones are used"):
        download_networks.main(job(tmp_path, server, archive, sha256="0" * 64))
    with pytest.raises(InputFileError, match="damaged archive"):
        download_networks.main(job(tmp_path, server, archive[:-60]))
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as content:
        content.writestr("provenance.json", '{"models": {"other": {}}}')
    with pytest.raises(InputFileError, match=r"no known network.*selfie_segmentation"):
        download_networks.main(job(tmp_path, server, empty.getvalue()))
    assert not (tmp_path / "assets/downloads/networks/download.json").exists()


def test_jobs_hand_the_networks_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(
        "cap4d_core.tracking.track.track_subject", lambda *a, **_: seen.append(a[3].networks)
    )
    monkeypatch.setattr(
        "cap4d_core.tracking.track.track_driving", lambda *a, **_: seen.append(a[3].networks)
    )
    monkeypatch.setattr(
        "cap4d_core.tracking.correspondence.load_or_compute", lambda *a: seen.append(a[3])
    )
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    (tmp_path / "download.json").touch()
    inputs: dict[str, list[str]] = {
        name: ["x/x"] for name in ("recording", "head_model", "landmarks")
    }
    inputs |= {"fit": [], "networks": [str(tmp_path / "download.json")]}
    outputs = {name: [str(tmp_path / "o" / name)] for name in ("fit", "landmarks")}
    settings = TrackingSettings(networks="download", networks_sha256="0" * 64).model_dump()
    params = {"settings": settings, "start_frame": 0, "num_frames": None, "version": 1}
    for script in (track_subject, track_driving, place_landmarks):
        script.main(Job("job", inputs, outputs, params))
    assert seen == [str(tmp_path)] * 3


def test_download_needs_address_and_hash(tmp_path: Path) -> None:
    (tmp_path / "subjects.tsv").write_text("subject\treference\nana\tphotos\n")
    raw = {
        "subjects": "subjects.tsv", "sampling": {"num_views": 0},
        "tracking": {"networks": "download", "networks_url": "https://example.org/n.zip"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"networks_url and tracking\.networks_sha256"):
        load_config(raw, tmp_path / "config.yaml")
    raw["tracking"] |= {"networks_sha256": "0" * 64}  # type: ignore[operator]
    config = load_config(raw, tmp_path / "config.yaml")
    assert config.settings.tracking.networks == "download"
    own = {**raw, "tracking": {"networks": "own"}}
    config = load_config(own, tmp_path / "config.yaml")
    assert Path(str(config.settings.tracking.networks)).resolve() == tmp_path / "own"
