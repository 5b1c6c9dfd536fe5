"""Face networks from the network: a .zip of a folder made by tools/convert_face_models.py.

{folder}/download.json      address, hash and names; written last
{folder}/provenance.json, {name}.json, {name}.safetensors
"""

from __future__ import annotations

import logging
import ssl
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cap4d_core.download import download
from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.basic import write_json
from cap4d_core.progress import ProgressCallback
from cap4d_core.tracking.face_models import MODEL_NAMES, listed_models, load_face_model

logger = logging.getLogger(__name__)

_ARCHIVE = "networks.zip"
_MAX_BYTES = 2_000_000_000


def download_networks(
    url: str,
    record: str | Path,
    sha256: str,
    *,
    callback: ProgressCallback | None = None,
    retries: int = 5,
    tls_context: ssl.SSLContext | None = None,
) -> Path:
    """Downloads networks and loads each of them once.

    Args:
        url: of the .zip.
        record: download.json to write.
        sha256: expected hash of the .zip.
        callback: progress in megabytes.
        retries: attempts in a row without progress.
        tls_context: for a private certificate authority.

    Returns:
        The folder, that of `record`.

    Raises:
        UserError: failed download or wrong hash.
        InputFileError: damaged, or no networks that the tracker knows.
    """
    record = Path(record)
    folder = record.parent
    archive = folder / _ARCHIVE
    try:
        download(url, archive, sha256, retries=retries, tls_context=tls_context, callback=callback)
    except UserError as error:
        raise UserError(
            f"Face networks: {error} Without tracking.networks the shipped ones are used."
        ) from None
    _extract(archive, folder)
    names = [name for name in MODEL_NAMES if name in listed_models(folder)]
    if not names:
        raise InputFileError(archive, "no known network", f"one of {', '.join(MODEL_NAMES)}")
    for name in names:
        load_face_model(name, "cpu", folder)
    logger.info("face networks replaced: %s", ", ".join(names))
    write_json(record, {"url": url, "sha256": sha256, "networks": names})
    return folder


def networks_folder(inputs: Sequence[Path]) -> str | None:
    """Folder of the networks from a job's input: itself, the record in it, or nothing."""
    if not inputs:
        return None
    return str(inputs[0].parent if inputs[0].is_file() else inputs[0])


def _extract(archive: Path, folder: Path) -> None:
    """Unpacks descriptions and weights by their own names, without folders."""
    for path in folder.iterdir():
        if path != archive and path.suffix in (".json", ".safetensors"):
            path.unlink()  # of an earlier download
    try:
        with zipfile.ZipFile(archive) as content:
            for member in content.infolist():
                name = PurePosixPath(member.filename).name
                if not name.endswith((".json", ".safetensors")) or name == "download.json":
                    continue
                if member.file_size > _MAX_BYTES:
                    raise InputFileError(archive, f"{name} of {member.file_size} bytes", "networks")
                (folder / name).write_bytes(content.read(member))
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        archive.unlink(missing_ok=True)
        raise InputFileError(archive, f"a damaged archive ({error})", "a zip file") from None
