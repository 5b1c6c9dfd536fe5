"""LPIPS weights from the network: torchvision's VGG16, joined with the linear heads shipped here.

The heads (6 kB) are those of LPIPS v0.1, see lpips_heads/provenance.json and LICENSE.
"""

from __future__ import annotations

import logging
import re
import urllib.parse
from pathlib import Path

from cap4d_core.avatar.lpips import Lpips, read_weight_file
from cap4d_core.download import download
from cap4d_core.errors import UserError
from cap4d_core.files.basic import sha256_file
from cap4d_core.progress import ProgressCallback

logger = logging.getLogger(__name__)

HEADS = Path(__file__).parent / "lpips_heads" / "vgg_v0_1.safetensors"
_ADVICE = (
    "To go on without the network: set fitting.lpips_weights to a file or folder with LPIPS "
    "weights that you have, or to null to fit without LPIPS; a mirror is set by fitting.lpips_url."
)


def download_lpips(
    url: str,
    output: str | Path,
    download_dir: str | Path,
    callback: ProgressCallback | None = None,
    *,
    retries: int = 5,
) -> None:
    """Downloads VGG16 and writes one complete LPIPS file.

    Args:
        url: torchvision's VGG16; a file name that ends in `-{hex digits}.pth` carries the beginning
            of the SHA-256, which is checked then.
        output: safetensors file to write.
        download_dir: where an interrupted download is kept; the 0.5 GB file is removed at the end.
        callback: progress in megabytes.
        retries: attempts in a row without progress.

    Raises:
        UserError: failed download, wrong hash, or not a VGG16.
    """
    name = Path(urllib.parse.urlsplit(url).path).name or "vgg16.pth"
    file = Path(download_dir) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    # Only complete downloads are kept under this name, but perhaps not of this address.
    file.unlink(missing_ok=True)
    try:
        download(url, file, retries=retries, callback=callback)
    except UserError as error:
        raise UserError(f"LPIPS weights: {error} {_ADVICE}") from None
    _check_hash_in_name(url, file)
    tensors = {**read_weight_file(file), **read_weight_file(HEADS)}
    Lpips.from_tensors(tensors, file).save(output)
    file.unlink()


def _check_hash_in_name(url: str, file: Path) -> None:
    found = sha256_file(file)
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", file.name)
    if match is None:
        logger.warning(
            "%s: not verified, its name carries no hash as vgg16-397923af.pth does; SHA-256 %s",
            url,
            found,
        )
    elif not found.startswith(match[1]):
        file.unlink()
        raise UserError(
            f"{url}: SHA-256 of the downloaded file is {found}, expected it to begin with "
            f"{match[1]}, as the file name says. It was discarded. {_ADVICE}"
        )
