"""Downloading large assets: resumed, verified, atomic.

Bytes go to `name.part` beside the destination; `name.part.json` remembers which version of the
remote file they belong to, so that an interrupted download continues only if the file has not
changed. The destination appears when everything is there and its hash is right.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import json
import logging
import os
import random
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cap4d_core import __version__
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import sha256_file
from cap4d_core.progress import Progress, ProgressCallback

logger = logging.getLogger(__name__)

# Server trouble that may pass; everything else in 400..599 is final.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_WAIT_S = 60.0


class NotFoundError(UserError):
    """There is no such file at the address."""


class AccessDeniedError(UserError):
    """The server wants a login, or the account may not have the file."""


class WebPageError(UserError):
    """A web page came instead of a file; `text` is its beginning."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class _TransientError(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass
class _Part:
    """The incomplete file and what is known about its origin."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def validator(self, url: str) -> str | None:
        """Strong ETag or date of the version that the bytes belong to, if they are of `url`."""
        with contextlib.suppress(OSError, ValueError):
            note = json.loads(self.note.read_text("utf-8"))
            if isinstance(note, dict) and note.get("url") == url:
                return note.get("validator") or None
        return None

    def remember(self, url: str, headers: Mapping[str, str]) -> None:
        etag = headers.get("ETag", "")
        # Weak tags say "equivalent", which is not enough to join bytes.
        validator = headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag
        self.note.write_text(json.dumps({"url": url, "validator": validator}), "utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def download(
    url: str,
    destination: str | Path,
    sha256: str | None = None,
    *,
    retries: int = 5,
    timeout_s: float = 30.0,
    backoff_s: float = 1.0,
    chunk_bytes: int = 1 << 20,
    form: Mapping[str, str] | None = None,
    is_self_checking: bool = False,
    tls_context: ssl.SSLContext | None = None,
    callback: ProgressCallback | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Downloads a file, continuing an interrupted attempt.

    Args:
        url: https address; http only for this machine itself (localhost).
        destination: file to write. If it is there already (with the right hash, when one is
            given) nothing is fetched.
        sha256: expected hash in hex.
        retries: attempts in a row without any new byte before giving up.
        timeout_s: of connecting and of each read.
        backoff_s: wait before the second attempt; doubles up to a minute.
        chunk_bytes: size of one read.
        form: fields to POST (a login); they are sent to this address only, not to where it may
            redirect, and written nowhere.
        is_self_checking: the format itself tells damage (a zip does) and the caller looks, so an
            interrupted download may be continued although nothing identifies the version.
        tls_context: for servers with a private certificate authority; default: the system's.
        callback: progress in megabytes, when the server tells the size.
        sleep: waits between attempts.

    Returns:
        The destination.

    Raises:
        UserError: address not allowed, not found, access denied, no network, wrong hash, disk full.
            What was received stays in the .part file, unless it is wrong.
    """
    destination = Path(destination)
    expected = _checked_hash(sha256)
    if destination.is_dir():
        raise InputFileError(destination, "a folder", "a file name to download to")
    if destination.exists():
        if expected is None or sha256_file(destination) == expected:
            return destination
        logger.warning("%s has another SHA-256 than expected; downloading it again", destination)
    opener = _opener(url, tls_context)
    _require_space(destination, 0)
    part = _Part(destination.with_name(destination.name + ".part"))
    request = _Request(url, form, expected is not None or is_self_checking)
    failures = 0
    while True:
        before = part.size
        try:
            _fetch(opener, request, part, timeout_s, chunk_bytes, callback)
            break
        except _TransientError as error:
            failures = 0 if part.size > before else failures + 1
            if failures > retries:
                raise UserError(
                    f"{url}: {error}; gave up after {failures} attempts without progress. "
                    f"Check the network and run again: {part.size / 1e6:.1f} MB are kept in "
                    f"{part.path}. Or fetch the file by hand and save it as {destination}."
                ) from None
            wait = min(max(error.wait_s, backoff_s * 2 ** max(failures - 1, 0)), MAX_WAIT_S)
            logger.warning("%s: %s; trying again in %.1f s", url, error, wait)
            sleep(wait * random.uniform(0.8, 1.2))  # not all jobs at the same moment
    if expected is not None:
        found = sha256_file(part.path)
        if found != expected:
            part.discard()
            raise UserError(
                f"{url}: SHA-256 of the downloaded file is {found}, expected {expected}. It was "
                "discarded. Run again; if it stays so, the file was replaced at its source."
            )
    os.replace(part.path, destination)
    part.discard()
    return destination


@dataclass(frozen=True)
class _Request:
    """What to ask for. is_checked: wrong pieces put together would be noticed."""

    url: str
    form: Mapping[str, str] | None
    is_checked: bool

    def __repr__(self) -> str:
        return f"_Request({self.url!r})"  # the form may hold a password


def _fetch(
    opener: urllib.request.OpenerDirector,
    request: _Request,
    part: _Part,
    timeout_s: float,
    chunk_bytes: int,
    callback: ProgressCallback | None,
) -> None:
    """One attempt; returns when the part file is complete."""
    url = request.url
    headers = {"User-Agent": f"cap4d-pipeline/{__version__}", "Accept-Encoding": "identity"}
    start = part.size
    if start:
        validator = part.validator(url)
        if validator:
            headers["If-Range"] = validator
        # Without validator only the content can tell whether the pieces belong together.
        if validator or (request.is_checked and part.note.exists()):
            headers["Range"] = f"bytes={start}-"
    data = None if request.form is None else urllib.parse.urlencode(request.form).encode()
    try:
        sent = urllib.request.Request(url, data, headers)
        response = opener.open(sent, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and "Range" in headers:
                if error.headers.get("Content-Range") == f"bytes */{start}":
                    return  # everything was there already
                part.discard()
                raise _TransientError("the server refuses to continue the file") from None
            raise _status_error(url, error) from None
    except (OSError, http.client.HTTPException) as error:
        raise _network_error(url, error) from None
    with response:
        total = _accept(response, url, part, start)
        done = part.size
        _require_space(part.path, (total or 0) - done)
        try:
            with open(part.path, "ab") as handle:
                while chunk := _read(response, chunk_bytes):
                    handle.write(chunk)
                    done += len(chunk)
                    if callback is not None and total:
                        callback(Progress(done // 1_000_000, total // 1_000_000, "MB"))
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(part.path, (total or done) - done) from None
            raise
    if total is not None and done < total:
        raise _TransientError(f"the connection ended after {done} of {total} bytes")
    if total is not None and done > total:
        part.discard()
        raise _TransientError(f"the server sent {done} bytes instead of {total}")


def _read(response: IO[bytes], size: int) -> bytes:
    try:
        return response.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke ({error or type(error).__name__})") from None


def _accept(response: Any, url: str, part: _Part, start: int) -> int | None:
    """Prepares the part file for the answer's body; returns the size of the whole file."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise UserError(f"{url}: the server compresses the file; its bytes cannot be verified.")
    if headers.get_content_type() == "text/html" and part.path.suffixes[-2:-1] != [".html"]:
        raise WebPageError(
            f"{url}: the server answered with a web page instead of a file (a login or licence "
            "page?). Fetch the file in a browser and give its path in config.yaml.",
            _read(response, 1 << 16).decode("utf-8", errors="replace"),
        )
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            part.discard()
            raise _TransientError("the server continued at another place than asked for")
        return None if match[2] == "*" else int(match[2])
    if start:
        logger.info("%s: cannot be continued; starting from the beginning", url)
    part.discard()
    part.remember(url, headers)
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _status_error(url: str, error: urllib.error.HTTPError) -> Exception:
    reason = f"HTTP {error.code} {error.reason}"
    if error.code in TRANSIENT_STATUS:
        after = error.headers.get("Retry-After", "") if error.headers else ""
        return _TransientError(reason, float(after) if after.isdigit() else 0.0)
    if error.code in (404, 410):
        return NotFoundError(f"{url}: not found ({reason}). Check the address in config.yaml.")
    if error.code in (401, 403):
        return AccessDeniedError(
            f"{url}: access denied ({reason}). The file may need a login or an accepted licence; "
            "fetch it in a browser and give its path in config.yaml."
        )
    return UserError(f"{url}: the server refused the request ({reason}).")


def _network_error(url: str, error: Exception) -> Exception:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return UserError(
            f"{url}: the server's certificate is not trusted ({cause.verify_message}). The clock "
            "may be wrong or a proxy intercepts; certificates are never skipped."
        )
    return _TransientError(f"cannot connect ({cause or type(cause).__name__})")


def _no_space(path: Path, missing: int) -> UserError:
    return UserError(
        f"{path.parent}: no space left; about {max(missing, 0) / 1e6:.0f} MB are missing for "
        f"{path.name}. Free some space and run again: the download continues."
    )


def _require_space(path: Path, needed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise _no_space(path, needed - free)


def _checked_hash(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    text = sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise UserError(f"expected SHA-256 {sha256!r}: it must have 64 hexadecimal digits.")
    return text


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _require_safe(url: str) -> None:
    parsed = urllib.parse.urlsplit(url)
    if parsed.scheme == "https" and parsed.hostname:
        return
    if parsed.scheme == "http" and _is_loopback(parsed.hostname):
        return
    raise UserError(f"{url}: only https addresses are downloaded (http for localhost only).")


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to addresses that would be allowed themselves."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _require_safe(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url: str, tls_context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    _require_safe(url)
    context = tls_context or ssl.create_default_context()
    handlers: list[Any] = [urllib.request.HTTPSHandler(context=context), _SafeRedirects()]
    if _is_loopback(urllib.parse.urlsplit(url).hostname):
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy has another localhost
    return urllib.request.build_opener(*handlers)
