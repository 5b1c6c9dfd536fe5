"""Downloads against a server on this machine that misbehaves on demand."""

from __future__ import annotations

import errno
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cap4d_core import download as module
from cap4d_core.download import download
from cap4d_core.errors import UserError
from tests.download_server import CONTENT, SHA256, Server, running_server


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as instance:
        yield instance


def fetch(server: Server, target: Path, sha256: str | None = SHA256, **options: Any) -> list[float]:
    """Downloads without really waiting; returns the waits."""
    waits: list[float] = []
    options = {"timeout_s": 5.0, "chunk_bytes": 1 << 14, **options}
    download(server.url, target, sha256, sleep=waits.append, **options)
    return waits


def test_plain_download(server: Server, tmp_path: Path) -> None:
    seen = []
    target = tmp_path / "new" / "file.bin"
    assert fetch(server, target, callback=seen.append) == []
    assert target.read_bytes() == CONTENT
    assert [f.name for f in target.parent.iterdir()] == ["file.bin"]
    assert seen[-1].unit == "MB" and len(seen) > 10


def test_nothing_is_fetched_twice(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    fetch(server, target)
    fetch(server, target)
    fetch(server, target, sha256=None)
    assert len(server.seen) == 1
    target.write_bytes(b"something else")
    fetch(server, target)  # a wrong hash is
    assert target.read_bytes() == CONTENT and len(server.seen) == 2


def test_cut_connections_are_continued(server: Server, tmp_path: Path) -> None:
    server.cut_after = [100_000, 50_000, 1]
    target = tmp_path / "file.bin"
    assert len(fetch(server, target)) == 3
    assert target.read_bytes() == CONTENT
    starts = [request.get("range") for request in server.seen]
    assert starts == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]
    assert {request.get("if-range") for request in server.seen[1:]} == {'"v1"'}


def test_progress_resets_the_count_of_failures(server: Server, tmp_path: Path) -> None:
    server.cut_after = [1000] * 20
    fetch(server, tmp_path / "file.bin", retries=1)
    assert len(server.seen) == 21


def test_interrupted_program_continues_later(server: Server, tmp_path: Path) -> None:
    server.cut_after = [120_000]
    server.statuses = []
    target = tmp_path / "file.bin"

    def give_up(_seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url, target, SHA256, sleep=give_up)
    assert not target.exists()
    assert (tmp_path / "file.bin.part").stat().st_size == 120_000
    fetch(server, target)
    assert server.seen[-1]["range"] == "bytes=120000-"
    assert target.read_bytes() == CONTENT


def test_changed_file_is_not_joined_to_old_bytes(server: Server, tmp_path: Path) -> None:
    server.cut_after = [120_000]
    target = tmp_path / "file.bin"
    with pytest.raises(UserError, match="gave up"):
        # The file changes while the download waits; the next attempts fail.
        download(
            server.url,
            target,
            retries=0,
            sleep=lambda _s: server.statuses.append(503),
            timeout_s=5.0,
        )
    server.content, server.etag = CONTENT[::-1], '"v2"'
    fetch(server, target, sha256=None)
    assert target.read_bytes() == CONTENT[::-1]


def test_server_that_ignores_ranges(server: Server, tmp_path: Path) -> None:
    server.accepts_ranges = False
    server.cut_after = [100_000, 200_000]
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_strong_validator(server: Server, tmp_path: Path, etag: str | None) -> None:
    """Bytes are joined only if a hash can tell whether they belong together."""
    server.etag = etag
    server.cut_after = [100_000]
    fetch(server, tmp_path / "a.bin")
    assert server.seen[-1]["range"] == "bytes=100000-" and "if-range" not in server.seen[-1]
    server.cut_after = [100_000]
    fetch(server, tmp_path / "b.bin", sha256=None)
    assert "range" not in server.seen[-1]
    assert (tmp_path / "b.bin").read_bytes() == CONTENT


def test_part_that_is_complete_already(server: Server, tmp_path: Path) -> None:
    note = {"url": server.url, "validator": '"v1"'}
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    (tmp_path / "file.bin.part.json").write_text(json.dumps(note))
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_part_that_is_too_long_starts_again(server: Server, tmp_path: Path) -> None:
    note = {"url": server.url, "validator": '"v1"'}
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.bin.part.json").write_text(json.dumps(note))
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_part_of_another_address_is_not_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    (tmp_path / "file.bin.part.json").write_text('{"url": "https://other", "validator": "v"}')
    fetch(server, tmp_path / "file.bin", sha256=None)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_wrong_hash(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"is {SHA256}, expected {'0' * 64}"):
        fetch(server, tmp_path / "file.bin", sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        fetch(server, tmp_path / "file.bin", sha256="abc")


def test_wrong_hash_keeps_the_existing_file(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"precious")
    with pytest.raises(UserError, match="SHA-256"):
        fetch(server, target, sha256="0" * 64)
    assert target.read_bytes() == b"precious"


def test_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429, 500]
    server.headers = {"Retry-After": "7"}
    waits = fetch(server, tmp_path / "file.bin", backoff_s=0.1)
    assert len(waits) == 3 and all(7 * 0.8 <= wait <= 7 * 1.2 for wait in waits)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_waits_double(server: Server, tmp_path: Path) -> None:
    server.statuses = [503] * 6
    waits: list[float] = []
    with pytest.raises(UserError, match="gave up after 5 attempts"):
        download(server.url, tmp_path / "f", retries=4, backoff_s=1.0, sleep=waits.append)
    for wait, expected in zip(waits, [1, 2, 4, 8], strict=True):
        assert expected * 0.8 <= wait <= expected * 1.2


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "not found"), (410, "not found"), (403, "access denied"), (400, "refused the request")],
)
def test_final_answers_are_not_repeated(
    server: Server, tmp_path: Path, status: int, message: str
) -> None:
    server.statuses = [status]
    with pytest.raises(UserError, match=message):
        fetch(server, tmp_path / "file.bin")
    assert len(server.seen) == 1


def test_web_page_instead_of_a_file(server: Server, tmp_path: Path) -> None:
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(UserError, match="a login or licence page"):
        fetch(server, tmp_path / "file.bin", sha256=None)
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    waits: list[float] = []
    with pytest.raises(UserError, match=r"cannot connect .*Check the network.*file\.bin"):
        download(f"http://127.0.0.1:{port}/", tmp_path / "file.bin", retries=2, sleep=waits.append)
    assert len(waits) == 2


def test_silent_server_times_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(UserError, match="gave up"):
            download(url, tmp_path / "f", retries=0, timeout_s=0.2, sleep=lambda _s: None)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/file",
        "file:///etc/passwd",
        "ftp://example.org/x",
        "/some/path",
        "http://127.0.0.1.example.org/x",
    ],
)
def test_unsafe_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="only https"):
        download(url, tmp_path / "file.bin")


def test_redirect_to_an_unsafe_address_is_refused(server: Server, tmp_path: Path) -> None:
    server.statuses = [302]
    server.headers = {"Location": "http://example.org/file"}
    with pytest.raises(UserError, match=r"http://example\.org/file: only https"):
        fetch(server, tmp_path / "file.bin")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A fresh self-signed certificate for localhost, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def test_certificates_are_verified(
    server: Server, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://localhost:{server.server_address[1]}/file.bin"
    with pytest.raises(UserError, match="certificate is not trusted"):
        download(url, tmp_path / "file.bin", SHA256, sleep=lambda _s: None)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    download(url, tmp_path / "file.bin", SHA256, tls_context=trusting)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_disk_without_space(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**9, 10**9, 100))
    with pytest.raises(UserError, match="no space left; about 0 MB are missing"):
        fetch(server, tmp_path / "file.bin")


def test_disk_that_fills_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left.*run again: the download continues"):
        fetch(server, tmp_path / "file.bin")
    monkeypatch.undo()
    fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
