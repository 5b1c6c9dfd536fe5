"""FLAME and its companions from sites on this machine that behave like the real ones."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import shutil
import ssl
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cap4d_core.check import check_head_model_source
from cap4d_core.config import load_config
from cap4d_core.errors import ConfigError, InputFileError, MissingAssetError, UserError
from cap4d_core.files.basic import read_npz
from cap4d_core.flame.assets import COMPANIONS, find_model
from cap4d_core.flame.companions_download import RELEASED_SHA256, download_companions
from cap4d_core.flame.flame_download import download_flame, find_credentials
from cap4d_core.flame.pickle_reader import REQUIRED_KEYS
from tests.core.synthetic_head import head_source
from tests.core.test_pickle_reader import flame_dict
from tests.download_server import Server, running_server
from tests.flame_site import LOGIN_PAGE, OTHER_PAGE, PASSWORD, USERNAME, Site, running_site

LOGIN = {"FLAME_USERNAME": USERNAME, "FLAME_PASSWORD": PASSWORD}


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def chumpy_pickle() -> bytes:
    """A head as in the original files: arrays inside chumpy objects, protocol 2."""
    arrays = flame_dict()
    module = types.ModuleType("chumpy.ch")

    class Ch:
        def __init__(self, x: np.ndarray) -> None:
            self.x = x

    Ch.__module__, Ch.__qualname__ = "chumpy.ch", "Ch"
    module.Ch = Ch  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))
        patch.setitem(sys.modules, "chumpy.ch", module)
        for key in ("v_template", "shapedirs", "weights"):
            arrays[key] = Ch(arrays[key])
        return pickle.dumps(arrays, protocol=2)


@pytest.fixture(scope="module")
def archive(chumpy_pickle: bytes) -> bytes:
    return zipped(
        {
            "FLAME2023/readme.txt": b"FLAME",
            "FLAME2023/flame2023.pkl": b"with jaw rotation",
            "FLAME2023/flame2023_no_jaw.pkl": chumpy_pickle,
        }
    )


@pytest.fixture
def site(archive: bytes) -> Iterator[Site]:
    with running_site() as instance:
        instance.archive = archive
        yield instance


def fetch(site: Site, folder: Path, **options: Any) -> Path:
    output = folder / "flame.npz"
    options = {"environment": LOGIN, "retries": 0, **options}
    download_flame(site.url, output, folder, **options)
    return output


def everything_written(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_model_arrives_and_is_converted(
    site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        output = fetch(site, tmp_path)
    arrays, truth = read_npz(output), flame_dict()
    assert set(arrays) == set(REQUIRED_KEYS)
    for key in ("v_template", "shapedirs", "weights", "f"):
        assert np.array_equal(arrays[key], truth[key].astype(arrays[key].dtype))
    assert find_model(output) == output
    (request,) = site.seen
    assert (request["username"], request["password"]) == (USERNAME, PASSWORD)
    assert USERNAME not in request["path"] and "username" not in request["path"]
    # Nothing anywhere shows the login, nor parts of it.
    written = everything_written(tmp_path) + caplog.text.encode()
    for secret in (USERNAME, PASSWORD, "ana%2Btest", "p%26ss"):
        assert secret.encode() not in written
    assert {p.name for p in tmp_path.iterdir()} == {
        "flame.npz", "FLAME2023.zip", "FLAME2023.zip.json"
    }  # fmt: skip


def test_nothing_is_fetched_twice(site: Site, tmp_path: Path) -> None:
    fetch(site, tmp_path).unlink()  # as Snakemake does before it repeats a job
    fetch(site, tmp_path, environment={"NETRC": str(tmp_path / "none")})
    assert len(site.seen) == 1


@pytest.mark.parametrize("etag", [None, '"abc"'])
def test_interrupted_download_goes_on(site: Site, tmp_path: Path, etag: str | None) -> None:
    site.etag, site.cut_after = etag, [100_000, 0]
    with pytest.raises(UserError, match=r"FLAME: .*0\.1 MB are kept"):
        fetch(site, tmp_path)
    assert (tmp_path / "FLAME2023.zip.part").stat().st_size == 100_000
    fetch(site, tmp_path)
    assert site.seen[-1]["range"] == "bytes=100000-" and site.seen[-1]["method"] == "POST"
    assert site.seen[-1]["password"] == PASSWORD  # the second request logs in, too
    assert (tmp_path / "FLAME2023.zip").read_bytes() == site.archive


def test_expired_login_does_not_spoil_what_was_received(site: Site, tmp_path: Path) -> None:
    site.cut_after = [100_000, 0]
    with pytest.raises(UserError, match="are kept"):
        fetch(site, tmp_path)
    with pytest.raises(UserError, match="does not accept"):
        fetch(site, tmp_path, environment={**LOGIN, "FLAME_PASSWORD": "old"})
    assert (tmp_path / "FLAME2023.zip.part").stat().st_size == 100_000


def test_pieces_of_different_versions_are_noticed(
    site: Site, tmp_path: Path, chumpy_pickle: bytes
) -> None:
    """Nothing identifies the version, so it is continued; the checksums in the zip tell."""
    site.cut_after = [100_000, 0]
    with pytest.raises(UserError, match="are kept"):
        fetch(site, tmp_path)
    site.archive = zipped({"new/flame2023_no_jaw.pkl": chumpy_pickle})
    with pytest.raises(InputFileError, match=r"damaged archive .*run again"):
        fetch(site, tmp_path)
    fetch(site, tmp_path)


@pytest.mark.parametrize("with_status", [False, True])
def test_wrong_password(site: Site, tmp_path: Path, with_status: bool) -> None:
    site.rejects_with_status = with_status
    wrong = {**LOGIN, "FLAME_PASSWORD": "guess-me"}
    with pytest.raises(
        UserError, match=r"does not accept user name and password \(from FLAME_USERNAME and"
    ) as caught:
        fetch(site, tmp_path, environment=wrong)
    assert "guess-me" not in str(caught.value) and USERNAME not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_licence_not_accepted(site: Site, tmp_path: Path) -> None:
    site.licence_accepted = False
    with pytest.raises(UserError, match=r"has not accepted the licence.*flame\.is\.tue\.mpg\.de"):
        fetch(site, tmp_path)


def test_other_pages_are_named(site: Site, tmp_path: Path) -> None:
    site.page = OTHER_PAGE
    with pytest.raises(UserError, match=r"web page \('Down for maintenance'\)"):
        fetch(site, tmp_path)
    # The same, declared as a file.
    site.page_type = "application/octet-stream"
    with pytest.raises(UserError, match=r"web page \('Down for maintenance'\)"):
        fetch(site, tmp_path)
    site.page = LOGIN_PAGE
    with pytest.raises(UserError, match="does not accept"):
        fetch(site, tmp_path)
    assert not (tmp_path / "FLAME2023.zip").exists()


def test_wrong_address(site: Site, tmp_path: Path) -> None:
    url = site.url.replace("FLAME2023", "FLAME1999")
    with pytest.raises(UserError, match=r"not found .*head_model\.path"):
        download_flame(url, tmp_path / "o.npz", tmp_path, environment=LOGIN, retries=0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no zip"])
def test_damaged_archive_is_discarded(site: Site, tmp_path: Path, damage: str) -> None:
    whole = site.archive
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    site.archive = {"cut": whole[:-500], "flipped": bytes(flipped), "no zip": b"x" * 5000}[damage]
    with pytest.raises(InputFileError, match=r"damaged archive .*discarded; run again"):
        fetch(site, tmp_path)
    assert not (tmp_path / "FLAME2023.zip").exists() and not (tmp_path / "flame.npz").exists()
    (tmp_path / "FLAME2023.zip.json").unlink(missing_ok=True)
    site.archive = whole
    fetch(site, tmp_path)


def test_archive_without_a_model(site: Site, tmp_path: Path) -> None:
    site.archive = zipped({"FLAME_masks.pkl": b"x", "a/b.pkl": b"y"})
    with pytest.raises(InputFileError, match=r"pickles: FLAME_masks\.pkl, b\.pkl"):
        fetch(site, tmp_path)


def test_malicious_archive_executes_and_overwrites_nothing(site: Site, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    content = pickle.dumps(Evil())
    site.archive = zipped({"../../../escaped/flame2023_no_jaw.pkl": content})
    with pytest.raises(InputFileError, match="a pickle that refers to"):
        fetch(site, tmp_path / "a/b/c")
    assert not (tmp_path / "executed").exists() and not list(tmp_path.rglob("*escaped*"))


def test_expected_hash(site: Site, tmp_path: Path) -> None:
    right = hashlib.sha256(site.archive).hexdigest()
    with pytest.raises(UserError, match=rf"SHA-256 .*{right}, expected 0000"):
        fetch(site, tmp_path, sha256="0" * 64)
    assert not (tmp_path / "FLAME2023.zip").exists()
    fetch(site, tmp_path, sha256=right.upper())
    record = json.loads((tmp_path / "FLAME2023.zip.json").read_text())
    assert record["sha256"] == right and record["verified"] == "head_model.sha256"


def test_first_download_is_trusted_and_later_ones_compared(
    site: Site, tmp_path: Path, chumpy_pickle: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fetch(site, tmp_path)
    first = hashlib.sha256(site.archive).hexdigest()
    assert f"sha256: {first}" in caplog.text and "taken on trust" in caplog.text
    (tmp_path / "FLAME2023.zip").unlink()
    site.archive = zipped({"flame2023_no_jaw.pkl": chumpy_pickle})
    with pytest.raises(UserError, match=rf"first download was {first}.*delete that record"):
        fetch(site, tmp_path)
    assert not (tmp_path / "FLAME2023.zip").exists()
    (tmp_path / "FLAME2023.zip.json").unlink()
    fetch(site, tmp_path)


def test_login_from_netrc(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "my-netrc"
    file.write_text(f'machine localhost login {USERNAME} password "{PASSWORD}"\n')
    file.chmod(0o600)
    fetch(site, tmp_path / "out", environment={"NETRC": str(file)})
    assert site.seen[-1]["password"] == PASSWORD
    # The environment comes first.
    found = find_credentials(site.url, {**LOGIN, "FLAME_PASSWORD": "e", "NETRC": str(file)})
    assert found.password == "e"
    assert repr(found) == "Credentials(source='FLAME_USERNAME and FLAME_PASSWORD')"


@pytest.mark.parametrize(
    ("environment", "netrc", "message"),
    [
        ({}, None, r"FLAME needs a login: register.*machine localhost login NAME"),
        ({}, "machine example.org login a password b", "FLAME needs a login"),
        ({"FLAME_USERNAME": "a"}, None, "FLAME_PASSWORD is not set"),
        ({"FLAME_PASSWORD": "a"}, None, "FLAME_USERNAME is not set"),
        ({}, "machine localhost login a\n wrong secret\n", r"n:\d+: no valid netrc entry"),
    ],
)
def test_missing_login_is_explained_before_anything_is_sent(
    site: Site, tmp_path: Path, environment: dict[str, str], netrc: str | None, message: str
) -> None:
    file = tmp_path / "n"
    if netrc is not None:
        file.write_text(netrc)
    with pytest.raises(UserError, match=message) as caught:
        fetch(site, tmp_path / "out", environment={**environment, "NETRC": str(file)})
    assert not site.seen and "secret" not in str(caught.value)


def test_password_is_sent_to_verified_servers_only(tmp_path: Path, archive: bytes) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with running_site((certificate, key)) as site:
        site.archive = archive
        with pytest.raises(UserError, match="certificate is not trusted"):
            fetch(site, tmp_path / "out")
        assert not site.seen
        context = ssl.create_default_context(cafile=str(certificate))
        fetch(site, tmp_path / "out", tls_context=context)
    with pytest.raises(UserError, match="only https"):
        download_flame("http://example.org/f.zip", tmp_path / "x.npz", tmp_path, environment=LOGIN)


# Companions --------------------------------------------------------------------------------------


@pytest.fixture
def mirror() -> Iterator[Server]:
    """The public folder, with the files of the synthetic head."""
    with running_server() as instance:
        instance.strict = True
        for path in (head_source() / "data/assets").rglob("*"):
            if path.name in COMPANIONS:
                instance.files["/" + str(path.relative_to(head_source()))] = path.read_bytes()
        yield instance


def base(server: Server) -> str:
    return server.url.replace("file.bin", "data/assets")


def hashes() -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (head_source() / "data/assets").rglob("*")
        if path.name in COMPANIONS
    }


def test_all_companions_arrive_verified(mirror: Server, tmp_path: Path) -> None:
    record = tmp_path / "companions" / "download.json"
    assert download_companions(base(mirror), record, hashes(), retries=0) == record.parent
    assert {p.name for p in record.parent.iterdir()} == {*COMPANIONS, "download.json"}
    found = json.loads(record.read_text())
    assert {name: entry["sha256"] for name, entry in found.items()} == hashes()
    assert found["gen_data.npz"]["url"].endswith("/data/assets/datasets/gen_data.npz")
    # What is there and right is not fetched again; what is wrong is.
    count = len(mirror.seen)
    (record.parent / "jaw_regressor.npy").write_bytes(b"spoiled")
    download_companions(base(mirror), record, hashes(), retries=0)
    assert len(mirror.seen) == count + 1


def test_flat_mirror_and_interruption(mirror: Server, tmp_path: Path) -> None:
    mirror.files = {"/own/" + path.rpartition("/")[2]: c for path, c in mirror.files.items()}
    mirror.cut_after = []
    record = tmp_path / "download.json"
    url = mirror.url.replace("file.bin", "own/")
    download_companions(url, record, hashes(), retries=0)
    (tmp_path / "cap4d_flame_template.obj").unlink()
    mirror.cut_after = [50_000]
    download_companions(url, record, hashes(), retries=1)
    assert mirror.seen[-1]["range"] == "bytes=50000-"


def test_released_hashes_are_expected(mirror: Server, tmp_path: Path) -> None:
    assert set(RELEASED_SHA256) == set(COMPANIONS)
    with pytest.raises(UserError, match=r"Companion files.*expected [0-9a-f]{64}.*companions_url"):
        download_companions(base(mirror), tmp_path / "download.json", retries=0)
    assert not (tmp_path / "download.json").exists()


def test_released_files_have_these_hashes(real_data: Path) -> None:
    for name, expected in RELEASED_SHA256.items():
        content = (real_data / "head_model/assets" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == expected, name


def test_missing_companion_is_named(mirror: Server, tmp_path: Path) -> None:
    del mirror.files["/data/assets/flame/jaw_regressor.npy"]
    with pytest.raises(UserError, match=r"no jaw_regressor\.npy there, nor in flame/"):
        download_companions(base(mirror), tmp_path / "download.json", hashes(), retries=0)


def test_unpinned_companions_say_their_hash(
    mirror: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        download_companions(base(mirror), tmp_path / "download.json", {}, retries=0)
    assert caplog.text.count("not verified") == len(COMPANIONS)


# Configuration -----------------------------------------------------------------------------------


def config_of(tmp_path: Path, head_model: dict[str, Any]) -> Any:
    (tmp_path / "subjects.tsv").write_text("subject\treference\nana\tphotos\n")
    raw = {
        "subjects": "subjects.tsv", "head_model": head_model, "results": str(tmp_path / "results"),
        "sampling": {"num_views": 0},
    }  # fmt: skip
    return load_config(raw, tmp_path / "config.yaml")


def test_check_names_missing_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LOGIN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config = config_of(tmp_path, {"path": "download"})
    assert config.settings.head_model.companions == "download"
    with pytest.raises(UserError, match="FLAME needs a login"):
        check_head_model_source(config)
    model = tmp_path / "results/assets/downloads/flame/flame.npz"
    model.parent.mkdir(parents=True)
    model.touch()
    check_head_model_source(config)  # no login is needed any more
    own = config_of(tmp_path, {"path": str(tmp_path / "empty"), "companions": "download"})
    with pytest.raises(MissingAssetError, match=r"or set head_model\.path: download"):
        check_head_model_source(own)


def test_hashes_and_addresses_are_checked(tmp_path: Path) -> None:
    head_model = {
        "path": "download", "url": "http://example.org/flame.zip", "sha256": "12",
        "companions_sha256": {"gen_data.npz": "x"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, head_model)
    for key in ("head_model.url", "head_model.sha256", "companions_sha256.gen_data.npz"):
        assert key in str(caught.value)
