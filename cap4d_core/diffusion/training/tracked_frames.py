"""Tracked people as training frames: folders in the released format, cropped as references are."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.diffusion.conditioning import RendererTables
from cap4d_core.diffusion.frames import (
    crop_and_normalise,
    read_reference_image,
    reference_views,
)
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.diffusion.pictures import image_from_network
from cap4d_core.diffusion.training.frame_maps import ViewBatch, frames_of
from cap4d_core.diffusion.training.frame_table import FrameTable
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_npz, sha256_file
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.images import read_grey, read_rgb
from cap4d_core.files.tracking import (
    Reference,
    TrackedSubject,
    list_frames,
    read_fit,
    read_tracked_subject,
)
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.crops import box_inside_share, crop, resize
from cap4d_core.training_settings import TrainingDataSettings

logger = logging.getLogger(__name__)

# A crop of which less lies inside the picture shows too little to learn from.
MIN_INSIDE = 0.5
# Meshes and maps made at once.
BATCH = 32


@dataclass(frozen=True)
class Recording:
    """Frames of one folder that are to be used: the subject, its frames as its references."""

    subject: TrackedSubject

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.subject.folder)

    def key(self) -> str:
        """Changes when the fit, the choice of frames or their files change."""
        files = [
            (str(path), path.stat().st_size, path.stat().st_mtime_ns)
            for r in self.subject.references
            for path in (r.image, r.matte)
            if path is not None
        ]
        frames = [(r.camera, r.timestep) for r in self.subject.references]
        content = [sha256_file(self.subject.folder / "fit.npz"), frames, files]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_recording(folder: str | Path, settings: TrainingDataSettings) -> Recording:
    """Finds the frames of a tracking folder.

    Args:
        folder: with fit.npz, images/{camera}/, bg/{camera}/, reference_images.json.
        settings: which of them to use.

    Raises:
        InputFileError: anything missing, or fewer than two frames.
    """
    folder = Path(folder)
    listed = settings.frames == "listed"
    subject = read_tracked_subject(folder) if listed else _all_frames(folder)
    frames = list(subject.references)[:: settings.frame_step]
    if settings.max_frames is not None and len(frames) > settings.max_frames:
        chosen = np.linspace(0, len(frames) - 1, settings.max_frames).round().astype(int)
        frames = [frames[i] for i in chosen]
    if len(frames) < 2:
        raise InputFileError(
            folder,
            f"{len(frames)} usable frame(s)",
            "at least two: references and another view of the same person",
            "Take it out of training.data.folders.",
        )
    without = {r.camera for r in frames if r.matte is None}
    if without:
        logger.warning(
            "%s: no mattes (bg/) of %s: their background must be white.",
            folder, ", ".join(sorted(without)),
        )  # fmt: skip
    return Recording(replace(subject, references=tuple(frames)))


def _all_frames(folder: Path) -> TrackedSubject:
    """Every picture that the fit covers, by camera, then time."""
    fit = read_fit(folder / "fit.npz")
    valid = _valid_mask(folder / "fit.npz", (len(fit.camera_order), fit.num_frames))
    found: list[Reference] = []
    for index, camera in enumerate(fit.camera_order):
        if not (folder / "images" / camera).is_dir():
            logger.warning("%s: no pictures of camera %s.", folder, camera)
            continue
        images = list_frames(folder / "images" / camera)
        has_mattes = (folder / "bg" / camera).is_dir()
        mattes = list_frames(folder / "bg" / camera) if has_mattes else []
        if has_mattes and len(mattes) < min(len(images), fit.num_frames):
            raise InputFileError(
                folder / "bg" / camera,
                f"{len(mattes)} mattes",
                f"{len(images)}, as many as pictures in images/{camera}",
            )
        if len(images) > fit.num_frames:
            logger.warning(
                "%s: %d pictures of camera %s, but the fit ends after %d frames.",
                folder, len(images), camera, fit.num_frames,
            )  # fmt: skip
        found += [
            Reference(camera, index, t, image, mattes[t] if has_mattes else None)
            for t, image in enumerate(images[: fit.num_frames])
            if valid[index, t]
        ]
    if not found:
        raise InputFileError(
            folder / "images", "no pictures", f"folders {', '.join(fit.camera_order)} with frames"
        )
    return TrackedSubject(folder, fit, tuple(_without_placeholders(found)))


def _valid_mask(path: Path, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(cameras, frames) of the fit that its maker calls good; all where it does not say."""
    mask = read_npz(path).get("valid_mask")
    if mask is None:
        return np.ones(shape, bool)
    if mask.shape != shape:
        raise InputFileError(path, f"'valid_mask' of shape {mask.shape}", f"shape {shape}")
    return mask.astype(bool)


def _without_placeholders(frames: Sequence[Reference]) -> list[Reference]:
    """Leaves out pictures that stand at two cameras: copies in place of a moment that one missed.

    The tracker puts them there because frames are found by their position in the folder.
    """
    if len({frame.camera for frame in frames}) == 1:
        return list(frames)

    def size_of(frame: Reference) -> tuple[int, int]:
        return frame.timestep, frame.image.stat().st_size

    same_size = Counter(map(size_of, frames))
    digests = {
        frame: (frame.timestep, sha256_file(frame.image))
        for frame in frames
        if same_size[size_of(frame)] > 1
    }
    same_content = Counter(digests.values())
    kept = [f for f in frames if f not in digests or same_content[digests[f]] == 1]
    if len(kept) < len(frames):
        logger.info("%d pictures stand at two cameras and are left out.", len(frames) - len(kept))
    return kept


class TrackedFrames:
    """Turns recordings into frame tables.

    Args:
        head: head model with the mouth, on the CPU.
        tables: of the conditioning renderer.
        head_vertex_ids: what crop boxes enclose.
        config: sizes.
        device: where maps are made.
        threads: pictures read at once.
    """

    def __init__(
        self,
        head: HeadModel,
        tables: RendererTables,
        head_vertex_ids: NDArray[np.int64],
        config: MMDMConfig,
        device: torch.device,
        threads: int = 1,
    ) -> None:
        self.config, self.device, self.threads = config, device, threads
        # Crop boxes on the CPU, as of references and planned views: rounding must not differ.
        self.head, self.head_vertex_ids = head, head_vertex_ids
        self.head_on_device = head if device.type == "cpu" else copy.deepcopy(head).to(device)
        self.tables = tables.to(device)

    def parts(self, recording: Recording) -> Iterator[tuple[FrameTable, Tensor]]:
        """The frames of a recording in tables of at most `BATCH`, on the CPU, with pictures.

        Each with its (n, H, W) uint8 mattes, 0 outside of the picture.

        Raises:
            InputFileError: an unreadable picture, sizes that differ, a fit that does not project,
                or fewer than two heads inside their pictures.
        """
        pairs = self._inside(recording)
        with ThreadPoolExecutor(self.threads) as pool:
            for first in range(0, len(pairs), BATCH):
                batch = pairs[first : first + BATCH]
                read = list(pool.map(lambda pair: self._read(*pair), batch))
                table = frames_of(
                    ViewBatch.of([view for _, view in batch], self.device),
                    None,
                    torch.tensor([0, len(batch)]),
                    self.head_on_device,
                    self.tables,
                    self.config,
                )
                images = torch.from_numpy(np.stack([image for image, _ in read]))
                mattes = torch.from_numpy(np.stack([matte for _, matte in read]))
                yield replace(table.to("cpu"), images=images), mattes

    def _inside(self, recording: Recording) -> list[tuple[Reference, ViewParameters]]:
        """Frames whose heads lie inside their pictures, with crop boxes."""
        subject = recording.subject
        views = reference_views(subject, self.head, self.head_vertex_ids)
        pairs = [
            (frame, view)
            for frame, view in zip(subject.references, views, strict=True)
            if box_inside_share(view.crop_box, view.resolution) >= MIN_INSIDE
        ]
        if len(pairs) < len(views):
            logger.warning(
                "%s: %d of %d heads leave their picture by more than half and are not used.",
                subject.folder, len(views) - len(pairs), len(views),
            )  # fmt: skip
        if len(pairs) < 2:
            raise InputFileError(
                subject.folder / "fit.npz",
                f"{len(pairs)} head(s) inside their pictures",
                "at least two",
                "Check the tracking, or take the folder out of training.data.folders.",
            )
        return pairs

    def _read(
        self, frame: Reference, view: ViewParameters
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(3, H, W) crop over white and its (H, W) matte."""
        size, box = self.config.image_size, view.crop_box
        if frame.matte is None:
            picture = read_rgb(frame.image)
            cropped = crop_and_normalise(picture.astype(np.float64), box, size)
            matte: NDArray[Any] = np.full(picture.shape[:2], 255, np.uint8)
        else:
            cropped = read_reference_image(frame, box, size)
            matte = read_grey(frame.matte)
        if matte.shape != view.resolution:
            raise InputFileError(
                frame.image,
                f"{matte.shape[1]} x {matte.shape[0]} pixels",
                f"{view.resolution[1]} x {view.resolution[0]}, as fit.npz says",
            )
        image = image_from_network(np.moveaxis(cropped, -1, 0))
        return np.moveaxis(image, -1, 0).copy(), np.asarray(resize(crop(matte, box, 0), size))
