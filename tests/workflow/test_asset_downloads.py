"""FLAME and its companions through the real rules, from sites on this machine."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
import yaml

from cap4d_core.flame.assets import COMPANIONS
from cap4d_core.flame.model import HeadModel
from tests.core.synthetic_head import head_source
from tests.core.test_flame_download import hashes
from tests.download_server import running_server
from tests.flame_site import PASSWORD, USERNAME, running_site
from tests.workflow.snakemake_runs import dry_run, run_snakemake

pytestmark = pytest.mark.workflow


def write_config(folder: Path, flame_url: str, companions_url: str) -> Path:
    (folder / "photos").mkdir()
    (folder / "subjects.tsv").write_text("subject\treference\nana\tphotos\n")
    head_model = {
        "path": "download",
        "url": flame_url,
        "companions_url": companions_url,
        "companions_sha256": hashes(),
    }
    content = {
        "subjects": "subjects.tsv", "head_model": head_model, "sampling": {"num_views": 0}
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def test_head_model_comes_from_its_sites(tmp_path: Path) -> None:
    assets = head_source() / "data/assets"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as content:
        content.write(assets / "flame/flame2023_no_jaw.pkl", "FLAME2023/flame2023_no_jaw.pkl")
    with running_site() as site, running_server() as mirror:
        site.archive = archive.getvalue()
        mirror.strict = True
        for path in assets.rglob("*"):
            if path.name in COMPANIONS:
                mirror.files[f"/assets/{path.relative_to(assets)}"] = path.read_bytes()
        config = write_config(tmp_path, site.url, mirror.url.replace("file.bin", "assets/"))
        counts = dry_run(tmp_path, config, "--until", "prepare_head_model")
        assert counts["download_flame"] == counts["download_companions"] == 1
        words = ["prepare_head_model", "--cores", "2", "--configfile", str(config)]
        login = {"FLAME_USERNAME": USERNAME, "FLAME_PASSWORD": "not-this-one"}
        refused = run_snakemake(tmp_path, *words, environment=login)
        assert refused.returncode == 1 and "does not accept user name and password" in (
            refused.stdout
        )
        login["FLAME_PASSWORD"] = PASSWORD
        result = run_snakemake(tmp_path, *words, environment=login)
        assert result.returncode == 0, result.stdout
    model = HeadModel.load(tmp_path / "results/assets/head_model")
    assert model.num_shape == 150
    # Results, logs, job files, Snakemake's own records: the login is in none of them.
    written = refused.stdout.encode() + result.stdout.encode()
    written += b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (USERNAME, PASSWORD, "not-this-one"):
        assert secret.encode() not in written
