"""The alternative tracker through the real rules and its installer.

A checkout made here runs scripts of the same names and arguments; they leave the recorded output
of the goldens where the real ones leave theirs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from cap4d_core.files.images import read_rgb
from cap4d_core.files.tracking import read_fit, read_tracked_subject
from tests.core.synthetic_head import head_source
from tests.core.tracker_pictures import demo_subject, save
from tests.workflow.snakemake_runs import ROOT, dry_run, run_snakemake

pytestmark = pytest.mark.workflow

GOLDENS = ROOT / "tests" / "goldens" / "avatar"
_SCRIPT = """
import os, pathlib, shutil, sys
here = pathlib.Path(__file__).resolve().parents[1]
kind = pathlib.Path(__file__).name
with open(here / "calls.txt", "a") as handle:
    print(kind, *sys.argv[1:], file=handle)
assert os.getcwd() == str(here) == os.environ["PIXEL3DMM_CODE_BASE"]
if kind == "run_preprocessing.py":
    frames = pathlib.Path(sys.argv[sys.argv.index("--video_or_images_path") + 1])
    assert len(list(frames.glob("*.png"))) == len(list((here / "golden/frames").iterdir()))
    out = pathlib.Path(os.environ["PIXEL3DMM_PREPROCESSED_DATA"]) / frames.name
    shutil.copytree(here / "golden/preprocess", out)
if kind == "track.py":
    name = sys.argv[1].partition("=")[2]
    out = pathlib.Path(os.environ["PIXEL3DMM_TRACKING_OUTPUT"]) / (name + "_nV1_noPho_uv2000.0")
    shutil.copytree(here / "golden/tracking", out)
"""


def make_checkout(folder: Path, kind: str) -> Path:
    for name in ("run_preprocessing.py", "network_inference.py", "track.py"):
        (folder / "scripts").mkdir(parents=True, exist_ok=True)
        (folder / "scripts" / name).write_text(_SCRIPT)
    (folder / "src" / "pixel3dmm").mkdir(parents=True)
    (folder / "src" / "pixel3dmm" / "__init__.py").touch()
    shutil.copytree(GOLDENS / f"G_pixel3dmm_{kind}", folder / "golden")
    return folder


def write_photos(folder: Path, count: int) -> None:
    """Faces in pictures of the size of the goldens' frames (150 x 180)."""
    pictures = sorted((demo_subject() / "images/cam0").iterdir())
    for i in range(count):
        face = read_rgb(pictures[i % 2])
        save(folder / f"{i}.png", np.asarray(cv2.resize(face, (180, 180))[:, 15:165], np.uint8))


def write_config(folder: Path) -> Path:
    write_photos(folder / "photos", 3)
    (folder / "subjects.tsv").write_text("subject\treference\nana\tphotos\n")
    content = {
        "subjects": "subjects.tsv",
        "head_model": {"path": str(head_source())},
        "tracking": {"backend": "pixel3dmm", "pixel3dmm_path": "checkout"},
        "sampling": {"num_views": 0},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_golden_output_becomes_a_fit(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    environment = {"PIXEL3DMM_PYTHON": sys.executable, "PIXEL3DMM_PATH": ""}
    # Nothing is there: the check names it, and no script of it runs.
    check = subprocess.run(
        [sys.executable, "-m", "cap4d_core", "check", "--configfile", str(config)],
        cwd=tmp_path, env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert check.returncode == 1
    assert "tracking.backend: Pixel3DMM cannot be run; missing: the checkout" in (
        check.stdout + check.stderr
    )
    checkout = make_checkout(tmp_path / "checkout", "images")
    assert dry_run(tmp_path, config, "--until", "track_all")["place_landmarks"] == 1
    result = run_snakemake(
        tmp_path, "track_all", "--cores", "2", "--configfile", str(config), environment=environment
    )
    assert result.returncode == 0, result.stdout
    calls = (checkout / "calls.txt").read_text().splitlines()
    assert [call.split()[0] for call in calls] == [
        "run_preprocessing.py", "network_inference.py", "network_inference.py", "track.py"
    ]  # fmt: skip
    folder = tmp_path / "results/ana/tracking"
    golden = np.load(GOLDENS / "G5_convert_images.npz")
    fit = read_fit(folder / "fit.npz")
    for name in ("fx", "fy", "cx", "cy", "extr"):
        assert np.allclose(getattr(fit, name), golden[f"out.fit.{name}"], atol=1e-3), name
    assert fit.resolutions.tolist() == golden["out.fit.resolutions"].tolist() == [[180, 150]]
    assert fit.expr.shape == golden["out.fit.expr"].shape
    assert fit.shape.shape == (150,) and np.isfinite(fit.expr).all()
    references = json.loads((folder / "reference_images.json").read_text())
    assert sorted(references) == json.loads(str(golden["out.reference_images_json"]))
    # The published fit ends at the error that the golden records; this one is closer.
    log = next((tmp_path / "results/logs/track_subject").glob("ana.log")).read_text()
    error = float(log.partition("head model fitted to the meshes: ")[2].split()[0])
    assert error <= 1.1 * float(golden["out.mean_vertex_error_mm"][0])
    assert len(read_tracked_subject(folder).references) == 3


# The installer ----------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """A repository with the scripts, and one of a preprocessing network."""
    for name, kind in (("main", "images"), ("network", "video")):
        folder = make_checkout(tmp_path / "upstream" / name, kind)
        shutil.rmtree(folder / "golden")
        (folder / "pyproject.toml").write_text(
            "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
            "[project]\nname = 'pixel3dmm'\nversion = '0'\n"
            "[tool.setuptools.packages.find]\nwhere = ['src']\n"
        )
        git(folder, "init", "--quiet")
        git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", "first")
    return tmp_path / "upstream"


def install(tmp_path: Path, target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CAP4D_PIXEL3DMM_COMMITS": str(tmp_path / "commits.tsv"),
        "CAP4D_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    return subprocess.run(
        ["bash", str(ROOT / "tools/install_pixel3dmm.sh"), str(target)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_installer_pins_commits_and_keeps_to_them(tmp_path: Path, upstream: Path) -> None:
    # A Python that has everything: pip must not reach for the network.
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f'#!/bin/bash\n[ "$2" = venv ] && {{ mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; exit; }}\n'
        f'[ "$2" = pip ] && {{ echo "$@" >> {tmp_path}/pip.txt; exit; }}\n'
        f'case "$2" in *find_spec\\(\\\'*) exit 0;; esac\nexec {sys.executable} "$@"\n'
    )
    stand_in.chmod(0o755)
    commits = tmp_path / "commits.tsv"
    commits.write_text(
        f"# list\nfolder\taddress\tcommit\n.\tfile://{upstream}/main\t-\n"
        f"src/pixel3dmm/preprocessing/MICA\tfile://{upstream}/network\t-\n"
    )
    first = install(tmp_path, tmp_path / "one", PIXEL3DMM_PYTHON=str(stand_in))
    assert first.returncode == 0, first.stderr
    assert "Pixel3DMM is complete." in first.stdout
    head = git(upstream / "main", "rev-parse", "HEAD")
    lines = commits.read_text().splitlines()
    assert lines[0] == "# list" and lines[2].split("\t")[2] == head and "-" not in lines[3:4]
    assert (tmp_path / "one/src/pixel3dmm/preprocessing/MICA/scripts/track.py").is_file()
    assert "--editable" in (tmp_path / "pip.txt").read_text()
    # Upstream moves on; the pinned commit is installed all the same.
    (upstream / "main/scripts/track.py").write_text("changed")
    git(upstream / "main", "commit", "--quiet", "-am", "second")
    second = install(tmp_path, tmp_path / "two", PIXEL3DMM_PYTHON=str(stand_in))
    assert second.returncode == 0, second.stderr
    assert git(tmp_path / "two", "rev-parse", "HEAD") == head
    assert (tmp_path / "two/scripts/track.py").read_text() == _SCRIPT
    again = install(tmp_path, tmp_path / "two", PIXEL3DMM_PYTHON=str(stand_in))
    assert again.returncode == 0 and commits.read_text().splitlines() == lines


def test_installer_says_what_it_lacks(tmp_path: Path, upstream: Path) -> None:
    commits = tmp_path / "commits.tsv"
    commits.write_text(f"folder\taddress\tcommit\n.\tfile://{upstream}/main\t{'0' * 40}\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "git", "dirname", "mkdir", "cat", "awk", "mv"):
        (tools / name).symlink_to(shutil.which(name) or "")
    none = install(tmp_path, tmp_path / "three", PATH=str(tools), PIXEL3DMM_PYTHON="")
    assert none.returncode == 1 and "conda, mamba or micromamba is needed" in none.stderr
    wrong = install(tmp_path, tmp_path / "three", PIXEL3DMM_PYTHON=sys.executable)
    assert wrong.returncode == 1 and f"has no commit {'0' * 40}" in wrong.stderr


def test_environment_and_commits_are_complete() -> None:
    environment = yaml.safe_load((ROOT / "envs/pixel3dmm.yaml").read_text())
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert all("==" in line for line in pip if not line.startswith("--"))
    lines = (ROOT / "envs/pixel3dmm-commits.tsv").read_text().splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    assert rows[0] == ["folder", "address", "commit"] and rows[1][0] == "."
    assert all(row[1].startswith("https://") for row in rows[1:])
