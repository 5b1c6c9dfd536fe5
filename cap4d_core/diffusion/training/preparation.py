"""Frames and latents of all people, made once and kept on disk for training and for a resume.

{folder}/frames/     maps and cameras of every frame; pictures too where the autoencoder is
                     trained, else latents
{folder}/latents/    latents by the trained autoencoder
{folder}/autoencoder.safetensors
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.model_config import AutoencoderConfig
from cap4d_core.diffusion.training.autoencoder_training import encode_all
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.diffusion.training.people import People, Person, SubjectQueue
from cap4d_core.diffusion.training.row_store import RowStore
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_safetensors, sha256_file, write_safetensors
from cap4d_core.progress import Progress, ProgressCallback

logger = logging.getLogger(__name__)

FRAME_COLUMNS = ("surface", "crop_masks", "intrinsics", "cameras", "heads")
ENCODED_AT_ONCE = 32
# Share of a GPU's free memory that frames may take.
GPU_SHARE = 0.4


def autoencoder_file(folder: Path) -> Path:
    """Where the autoencoder that is used lies."""
    return folder / "autoencoder.safetensors"


def keep_autoencoder(folder: Path, autoencoder: Autoencoder, belongs_to: str) -> None:
    """Writes the autoencoder that is to be used."""
    metadata = {"config": autoencoder.config.model_dump_json(), "belongs_to": belongs_to}
    write_safetensors(autoencoder_file(folder), autoencoder.vae.state_dict(), metadata)


def kept_autoencoder(folder: Path, belongs_to: str | None = None) -> Autoencoder | None:
    """What `keep_autoencoder` wrote, on the CPU; None if there is none, or one of another run."""
    file = autoencoder_file(folder)
    if not file.is_file():
        return None
    tensors, metadata = read_safetensors(file, "an autoencoder")
    if belongs_to is not None and metadata.get("belongs_to") != belongs_to:
        return None
    autoencoder = Autoencoder(AutoencoderConfig.model_validate_json(metadata["config"]))
    autoencoder.vae.load_state_dict(tensors)
    return autoencoder.eval().requires_grad_(False)


def prepare_frames(
    people: People,
    folder: Path,
    autoencoder: Autoencoder | None,
    callback: ProgressCallback | None = None,
) -> RowStore:
    """Makes the frames of all people that are not made yet.

    Args:
        people: who.
        folder: of the run.
        autoencoder: encodes them at once, and pictures are not kept; None = pictures are kept.
        callback: called after every person.

    Raises:
        UserError: data that cannot be used.
    """
    data = people.settings
    first = data.demo_first_seed
    queue = SubjectQueue(range(first, first + data.demo_subjects), data.processes)
    everyone = people.training(queue)
    kind = "pictures" if autoencoder is None else sha256_file(autoencoder_file(folder))
    store = RowStore(folder / "frames", f"{people.identity()} {kind}")
    done = store.keep([person.key for person in everyone])
    if done:
        logger.info("Frames of %d of %d people are there already.", done, len(everyone))
    try:
        for number, person in enumerate(everyone[done:], start=done + 1):
            store.append(person.key, _rows(person, autoencoder))
            if callback is not None:
                callback(Progress(number, len(everyone), "person"))
    finally:
        queue.close()
    size = sum(file.stat().st_size for file in store.folder.glob("*.bin"))
    logger.info("%d people, %d frames, %.2f GB.", len(everyone), len(store), size / 1e9)
    return store


def _rows(person: Person, autoencoder: Autoencoder | None) -> Iterator[Mapping[str, Tensor]]:
    for table, _ in person.parts():
        columns = {name: getattr(table, name) for name in FRAME_COLUMNS}
        assert table.images is not None
        if autoencoder is None:
            columns["images"] = table.images
        else:
            columns["means"], columns["stds"] = encode_all(
                autoencoder, table.images, ENCODED_AT_ONCE
            )
        yield columns


def prepare_latents(
    folder: Path,
    frames: RowStore,
    autoencoder: Autoencoder,
    callback: ProgressCallback | None = None,
) -> RowStore:
    """Encodes kept pictures, as far as that is not done."""
    store = RowStore(folder / "latents", sha256_file(autoencoder_file(folder)))
    done = store.keep(frames.keys)
    images, starts = frames.columns()["images"], frames.starts().tolist()
    for number in range(done, len(frames.keys)):
        pieces = images[starts[number] : starts[number + 1]].split(ENCODED_AT_ONCE)
        encoded = (encode_all(autoencoder, piece, ENCODED_AT_ONCE) for piece in pieces)
        rows = ({"means": means, "stds": stds} for means, stds in encoded)
        store.append(frames.keys[number], rows)
        if callback is not None:
            callback(Progress(number + 1, len(frames.keys), "encoded person"))
    return store


def existing_frames(folder: Path) -> RowStore:
    """Frames that `prepare_frames` made, as they are."""
    return RowStore.existing(folder / "frames", "prepared training frames")


def latent_table(folder: Path) -> FrameTable:
    """All frames with latents, mapped from disk.

    Raises:
        InputFileError: they are not there.
    """
    frames = existing_frames(folder)
    columns = frames.columns()
    if "means" not in columns:
        latents = RowStore.existing(folder / "latents", "latents of training frames")
        if latents.counts != frames.counts:
            raise InputFileError(
                latents.folder, f"latents of {len(latents)} frames", f"{len(frames)}",
                "Delete it and run again.",
            )  # fmt: skip
        columns |= latents.columns()
    columns.pop("images", None)
    return FrameTable(starts=frames.starts(), **columns)


def picture_columns(folder: Path) -> Tensor:
    """(N, 3, H, W) uint8 pictures of all frames, mapped from disk."""
    return existing_frames(folder).columns()["images"]


def placed(size: int, keep_on: str, device: torch.device) -> torch.device:
    """Where data of so many bytes is kept: the GPU, or the files it is mapped from."""
    if device.type != "cuda" or keep_on == "cpu":
        return torch.device("cpu")
    if keep_on == "gpu":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if size <= GPU_SHARE * free else torch.device("cpu")


def table_bytes(table: FrameTable) -> int:
    """Of all tensors of a table."""
    names = (*FRAME_COLUMNS, "images", "means", "stds")
    tensors = [getattr(table, name) for name in names]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
