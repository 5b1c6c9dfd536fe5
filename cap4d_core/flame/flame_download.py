"""FLAME from its site: behind a login, with a licence to accept there first.

    {folder}/FLAME2023.zip          the archive; a .part file beside it until it is complete
    {folder}/FLAME2023.zip.json     address and SHA-256 of the archive that was first accepted

User name and password come from the environment (FLAME_USERNAME, FLAME_PASSWORD) or from a netrc
file. They go into the body of one request over TLS, and nowhere else: no argument, log, job file or
message holds them. The site publishes no hashes. Without `head_model.sha256` the hash of the first
download is written down beside it, and a later download must have the same.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
import ssl
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cap4d_core.download import AccessDeniedError, WebPageError, download
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import read_json, sha256_file, write_json, write_npz
from cap4d_core.flame.assets import MODEL_NAMES
from cap4d_core.flame.pickle_reader import REQUIRED_KEYS, load_flame_pickle
from cap4d_core.progress import ProgressCallback

logger = logging.getLogger(__name__)

USER_VARIABLE, PASSWORD_VARIABLE = "FLAME_USERNAME", "FLAME_PASSWORD"
NETRC_VARIABLE = "NETRC"
SITE = "https://flame.is.tue.mpg.de"
# Models of a few hundred megabytes; anything far beyond is no FLAME.
_MAX_MODEL_BYTES = 4_000_000_000
_BY_HAND = (
    f"Or fetch the archive from {SITE} in a browser, unpack it and name the folder in "
    "head_model.path."
)


@dataclass(frozen=True)
class Credentials:
    """A login; `source` says in words where it was found. Never shown."""

    username: str = field(repr=False)
    password: str = field(repr=False)
    source: str


def find_credentials(url: str, environment: Mapping[str, str] | None = None) -> Credentials:
    """The login for an address.

    Args:
        url: what will be downloaded.
        environment: default: that of this process.

    Raises:
        UserError: none found, only half of one, or a netrc file that cannot be read.
    """
    environment = os.environ if environment is None else environment
    username = environment.get(USER_VARIABLE, "")
    password = environment.get(PASSWORD_VARIABLE, "")
    if username and password:
        return Credentials(username, password, f"{USER_VARIABLE} and {PASSWORD_VARIABLE}")
    if username or password:
        missing = PASSWORD_VARIABLE if username else USER_VARIABLE
        raise UserError(f"FLAME: the environment variable {missing} is not set, the other one is.")
    host = urllib.parse.urlsplit(url).hostname or ""
    file = Path(environment.get(NETRC_VARIABLE) or Path.home() / ".netrc")
    entry = _netrc_entry(file, host)
    if entry is not None:
        return Credentials(*entry, f"the entry of {host} in {file}")
    raise UserError(
        f"FLAME needs a login: register at {SITE}, accept its licence there, and set the "
        f"environment variables {USER_VARIABLE} and {PASSWORD_VARIABLE}, or write `machine {host} "
        f"login NAME password PASSWORD` into {file} (readable by you alone). {_BY_HAND}"
    )


def _netrc_entry(file: Path, host: str) -> tuple[str, str] | None:
    """(user, password) of a host, None without file or entry."""
    try:
        if file.stat().st_mode & 0o077:
            logger.warning("%s can be read by others; chmod 600 it", file)
        found = netrc.netrc(str(file)).authenticators(host)
    except FileNotFoundError:
        return None
    except netrc.NetrcParseError as error:
        # Its own text may quote a password.
        raise UserError(f"{file}:{error.lineno}: no valid netrc entry there.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}).") from None
    if found is None or not found[0] or not found[2]:
        return None
    return found[0], found[2]


def download_flame(
    url: str,
    output: str | Path,
    download_dir: str | Path,
    sha256: str | None = None,
    *,
    callback: ProgressCallback | None = None,
    retries: int = 5,
    environment: Mapping[str, str] | None = None,
    tls_context: ssl.SSLContext | None = None,
) -> None:
    """Downloads the archive and converts its head model, without executing what the pickle holds.

    Args:
        url: address of the archive; its parameter `sfile`, if any, names it.
        output: flame.npz to write.
        download_dir: where the archive is kept, and an interrupted download goes on.
        sha256: expected hash of the archive.
        callback: progress in megabytes.
        retries: attempts in a row without progress.
        environment: where credentials are looked for; default: that of this process.
        tls_context: for a private certificate authority.

    Raises:
        UserError: no login, wrong password, licence not accepted, wrong hash, no network.
        InputFileError: the archive is damaged or holds no head model.
    """
    archive = Path(download_dir) / _archive_name(url)
    record = archive.with_name(archive.name + ".json")
    archive.parent.mkdir(parents=True, exist_ok=True)
    expected = sha256.strip().lower() if sha256 else None
    if not archive.exists() or (expected is not None and sha256_file(archive) != expected):
        login = find_credentials(url, environment)
        logger.info("logging in with %s", login.source)
        try:
            download(
                url,
                archive,
                expected,
                retries=retries,
                form={"username": login.username, "password": login.password},
                is_self_checking=True,
                tls_context=tls_context,
                callback=callback,
            )
        except WebPageError as error:
            raise _page_error(error.text, login) from None
        except AccessDeniedError:
            raise _refused(login) from None
        except UserError as error:
            raise UserError(f"FLAME: {error} {_BY_HAND}") from None
        _require_archive(archive, login)
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".flame-") as work:
        pickle = _extract_model(archive, Path(work))
        is_first = _compare_with_record(archive, record, url, expected)
        try:
            arrays = load_flame_pickle(pickle)
        except InputFileError:
            archive.unlink()  # nothing that another attempt should start from
            raise
    if is_first:  # only what proved to be a head model is trusted
        _write_record(archive, record, url, expected)
    write_npz(output, {name: arrays[name] for name in REQUIRED_KEYS})
    logger.info("%s of %s -> %s", pickle.name, archive, output)


def _archive_name(url: str) -> str:
    parsed = urllib.parse.urlsplit(url)
    named = urllib.parse.parse_qs(parsed.query).get("sfile", [""])[-1]
    return PurePosixPath(named).name or PurePosixPath(parsed.path).name or "FLAME.zip"


def _page_error(text: str, login: Credentials) -> UserError:
    """What a web page in place of the archive means."""
    plain = text.lower()
    has_form = re.search(r"type\s*=\s*[\"']?password", plain)
    if has_form or re.search(r"(wrong|incorrect|invalid|failed)[^<]{0,40}pass", plain):
        return _refused(login)
    if re.search(r"licen[sc]e", plain) and re.search(r"accept|agree", plain):
        return UserError(
            "FLAME: the account has not accepted the licence. Log in at "
            f"{SITE} once, open the download page, accept it, and run again."
        )
    title = re.search(r"<title[^>]*>([^<]{1,80})", text, re.IGNORECASE)
    shown = f" ('{title[1].strip()}')" if title else ""
    return UserError(
        f"FLAME: the server answered with a web page{shown} instead of the archive. Log in at "
        f"{SITE} and see whether the download works there. {_BY_HAND}"
    )


def _refused(login: Credentials) -> UserError:
    return UserError(
        f"FLAME: the server does not accept user name and password (from {login.source}). Check "
        f"them by logging in at {SITE}; an account of another project of that site is not enough, "
        "and new accounts must be confirmed by mail."
    )


def _require_archive(archive: Path, login: Credentials) -> None:
    """Servers also send pages as if they were files."""
    with open(archive, "rb") as handle:
        start = handle.read(1 << 16)
    if start.lstrip()[:1] == b"<":
        archive.unlink()
        raise _page_error(start.decode("utf-8", errors="replace"), login)


def _compare_with_record(archive: Path, record: Path, url: str, expected: str | None) -> bool:
    """Trust on first use, where no hash is configured; True when there is no record to go by."""
    if expected is not None or not record.exists():
        return True
    found, known = sha256_file(archive), read_json(record, "the record of a download")["sha256"]
    if known != found:
        archive.unlink()
        raise UserError(
            f"{url}: SHA-256 of the archive is {found}, that of the first download was {known} "
            f"({record}). It was discarded. If the file was replaced on purpose, delete that "
            "record or set head_model.sha256."
        )
    return False


def _write_record(archive: Path, record: Path, url: str, expected: str | None) -> None:
    found = sha256_file(archive)
    if expected is None:
        logger.warning(
            "%s: taken on trust, because the site publishes no hash. To pin this version, set\n"
            "head_model:\n  sha256: %s",
            url,
            found,
        )
    content = {
        "url": url,
        "sha256": found,
        "bytes": archive.stat().st_size,
        "verified": "on trust" if expected is None else "head_model.sha256",
    }
    write_json(record, content)


def _extract_model(archive: Path, folder: Path) -> Path:
    """Unpacks the head model of an archive; names inside it decide nothing about where to."""
    wanted = f"one of {', '.join(MODEL_NAMES[:3])} in it"
    try:
        with zipfile.ZipFile(archive) as content:
            members = {PurePosixPath(item.filename).name: item for item in content.infolist()}
            name = next((name for name in MODEL_NAMES if name in members), None)
            if name is None:
                pickles = sorted(n for n in members if n.endswith(".pkl"))
                raise InputFileError(
                    archive,
                    f"no head model (pickles: {', '.join(pickles) or 'none'})",
                    wanted,
                    "Set head_model.url to the archive of FLAME 2023.",
                )
            if members[name].file_size > _MAX_MODEL_BYTES:
                raise InputFileError(archive, f"{name} of {members[name].file_size} bytes", wanted)
            target = folder / name
            with content.open(members[name]) as source, open(target, "wb") as copy:
                while chunk := source.read(1 << 20):
                    copy.write(chunk)
            return target
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        archive.unlink(missing_ok=True)
        raise InputFileError(
            archive,
            f"a damaged archive ({error})",
            "a zip file",
            "It was discarded; run again to download it anew.",
        ) from None
