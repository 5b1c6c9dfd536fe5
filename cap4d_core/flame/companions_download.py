"""The public companion files of the head model: templates, masks, blink, jaw, expressions.

They are in the public CAP4D repository (CC BY-NC 4.0). The hashes of the released files are known
here, so what arrives is what was released, whatever the address.
"""

from __future__ import annotations

import logging
import ssl
import urllib.parse
from collections.abc import Mapping
from pathlib import Path

from cap4d_core.download import NotFoundError, download
from cap4d_core.errors import UserError
from cap4d_core.files.basic import sha256_file, write_json
from cap4d_core.flame.assets import COMPANIONS, GENERATION_FILE
from cap4d_core.progress import Progress, ProgressCallback

logger = logging.getLogger(__name__)

RELEASED_SHA256 = {
    "blink_blendshape.npy": "22d0a34f4a179c15bba81937989a7ca24f4906802497912a5f1337339ede8a73",
    "cap4d_avatar_template.obj": "952e279059c91edd518496fe58613f65acd02706cae845cf3eddb5340b625e06",
    "cap4d_flame_template.obj": "7b2b28078c22065f14e38552baae7cc1425325a6df835860712f15a54611ef63",
    "deformable_verts.txt": "dd9151995437de07d397c1f79fa7d8f4aef9454666967f03275fd5de388edb4c",
    "flowface_vertex_mask.npy": "90f8e9bc54d3cd837561af112e917b9cb69fe9fcef8a8e107b7a854d18223f58",
    "flowface_vertex_weights.npy": "10fe149bee6fc0528ff8583ba3f8d92d55cfec87d18e998b99907c963c9dfdb5",  # noqa: E501
    "gen_data.npz": "26d731d6e0bbe4ea11899426b86ac387b05f9f82515abe74f7adc01231132820",
    "head_vertices.txt": "0643b63072c3665a5ec95574672d605d2d2d10c5f9abb91e69e4158e6cd96392",
    "jaw_regressor.npy": "1cc0a20411c5b5a64015c8a851e38d0c4b0ba731ffc32f8857928ab1a10e9fae",
}  # fmt: skip
_ADVICE = (
    "Without the network: fetch data/assets/ of the public CAP4D repository on another machine and "
    "name the folder in head_model.companions; a mirror is set by head_model.companions_url."
)


def download_companions(
    base_url: str,
    record: str | Path,
    sha256: Mapping[str, str] | None = None,
    *,
    callback: ProgressCallback | None = None,
    retries: int = 5,
    tls_context: ssl.SSLContext | None = None,
) -> Path:
    """Downloads every companion file into the folder of `record`.

    Args:
        base_url: folder that holds them, itself or in `flame/` and `datasets/`.
        record: download.json to write at the end: hash and address of every file.
        sha256: expected hash by file name; None = those of the released files. Files without one
            are taken with a warning that says theirs.
        callback: progress in files.
        retries: attempts in a row without progress.
        tls_context: for a private certificate authority.

    Returns:
        The folder.

    Raises:
        UserError: a file is nowhere, or has another hash; failed download.
    """
    record = Path(record)
    expected = RELEASED_SHA256 if sha256 is None else sha256
    found: dict[str, dict[str, str]] = {}
    for number, name in enumerate(COMPANIONS, start=1):
        target = record.parent / name
        if name not in expected:
            target.unlink(missing_ok=True)  # perhaps of another address
        try:
            url = _fetch(base_url, target, expected.get(name), retries, tls_context)
        except UserError as error:
            raise UserError(f"Companion files of the head model: {error} {_ADVICE}") from None
        found[name] = {"url": url, "sha256": sha256_file(target)}
        if name not in expected:
            logger.warning("%s: not verified; its SHA-256 is %s", url, found[name]["sha256"])
        if callback is not None:
            callback(Progress(number, len(COMPANIONS), "file"))
    write_json(record, found)
    return record.parent


def _fetch(
    base_url: str, target: Path, sha256: str | None, retries: int, context: ssl.SSLContext | None
) -> str:
    """Downloads one file from the first folder that has it; returns its address."""
    base = base_url if base_url.endswith("/") else base_url + "/"
    folder = "datasets/" if target.name == GENERATION_FILE else "flame/"
    for place in (folder, ""):
        url = urllib.parse.urljoin(base, place + target.name)
        try:
            download(url, target, sha256, retries=retries, tls_context=context)
        except NotFoundError:
            continue
        return url
    raise UserError(f"{base}: no {target.name} there, nor in {folder} below it.")
