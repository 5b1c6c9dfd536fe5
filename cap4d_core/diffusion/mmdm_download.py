"""A released checkpoint from the network.

    {folder}/download.json              what is here: written last
    {folder}/{hash of url}/*.ckpt       the checkpoint; a .part file beside it until it is complete
    {folder}/{hash of url}/config_dump.yaml

The checkpoint is found again by its address, so gigabytes are not fetched twice when the job is
repeated, e.g. because a hash was pinned.
"""

from __future__ import annotations

import hashlib
import logging
import urllib.parse
from pathlib import Path

from cap4d_core.download import download
from cap4d_core.errors import UserError
from cap4d_core.files.basic import read_json, require_file, sha256_file, write_json
from cap4d_core.progress import ProgressCallback

logger = logging.getLogger(__name__)

WHAT = "the record of a download (download.json)"
_ADVICE = (
    "Without the network: fetch the .ckpt (and its config_dump.yaml) on another machine, put them "
    "into a folder, name it in mmdm.path and remove mmdm.url."
)


def download_mmdm(
    url: str,
    record: str | Path,
    *,
    config_url: str | None = None,
    sha256: str | None = None,
    callback: ProgressCallback | None = None,
    retries: int = 5,
) -> Path:
    """Downloads a checkpoint, and its config when it has an address.

    Args:
        url: address of the .ckpt.
        record: download.json to write; the files go into a folder beside it.
        config_url: address of config_dump.yaml.
        sha256: expected hash of the .ckpt; without one the hash found is logged.
        callback: progress in megabytes.
        retries: attempts in a row without progress.

    Returns:
        The checkpoint.

    Raises:
        UserError: failed download or wrong hash; says what to set instead.
    """
    record = Path(record)
    folder = record.parent / hashlib.sha256(url.encode()).hexdigest()[:12]
    name = Path(urllib.parse.urlsplit(url).path).stem or "model"
    checkpoint, config = folder / f"{name}.ckpt", folder / "config_dump.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    # Small, and perhaps of another address or version.
    config.unlink(missing_ok=True)
    try:
        if config_url is not None:
            download(config_url, config, retries=retries)
        download(url, checkpoint, sha256, retries=retries, callback=callback)
    except UserError as error:
        raise UserError(f"Diffusion weights: {error} {_ADVICE}") from None
    found = sha256_file(checkpoint)
    if sha256 is None:
        logger.warning(
            "%s: not verified, because no hash was given. To pin this version, set\n"
            "mmdm:\n  sha256: %s",
            url,
            found,
        )
    write_json(
        record,
        {
            "url": url,
            "config_url": config_url,
            "file": str(checkpoint.relative_to(record.parent)),
            "sha256": found,
            "bytes": checkpoint.stat().st_size,
        },
    )
    return checkpoint


def downloaded_checkpoint(record: str | Path) -> Path:
    """The checkpoint that `download_mmdm` recorded.

    Raises:
        InputFileError: the record or the checkpoint is gone.
    """
    content = read_json(record, WHAT)
    return require_file(
        Path(record).parent / str(content.get("file")),
        "the downloaded checkpoint",
        f"Delete {record} to download it again.",
    )
