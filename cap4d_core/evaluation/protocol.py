"""Sets a part of a subject's own recordings aside, to measure the avatar on it (rule hold_out).

    {output}/fit.npz, reference_images.json    what remains for views and avatar
    {output}/images, bg                        links to the tracked frames
    {output}/held_out/                         image set of the frames set aside, with mattes
    {output}/split.json                        what was set aside and how it was chosen

Two protocols, both drawn from (seed, subject) alone:

`held_out_frames`: of a video, one block of consecutive frames at a drawn place; references closer
to it than half a second are not used either, because they nearly show the same. Of photos, a drawn
share of the moments. All cameras of a frame are set aside with it.

`held_out_cameras`: drawn whole cameras, with all their frames.

Pose and expression of the frames set aside come from the tracking, which has seen them, as in the
published evaluation of self-reenactment; so do the identity coefficients, which are one set for all
frames. No pixel of these frames reaches the diffusion model or the fit of the avatar.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cap4d_core.diffusion.frames import read_reference_image, reference_views
from cap4d_core.diffusion.seeding import derived_generator
from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_json, write_json
from cap4d_core.files.image_set import write_view_parameters
from cap4d_core.files.images import read_grey, to_uint8, write_image
from cap4d_core.files.tracking import (
    Reference,
    TrackedSubject,
    list_frames,
    read_tracked_subject,
    write_reference_list,
)
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import load_flame_template
from cap4d_core.geometry.crops import crop, resize
from cap4d_core.progress import Progress, ProgressCallback

logger = logging.getLogger(__name__)

# References of a video that lie closer than this to the frames set aside show nearly the same.
GUARD_S = 0.5

FramePair = tuple[str, int]


@dataclass(frozen=True)
class Split:
    """Frames as (camera, timestep): held_out to measure on, kept as references."""

    held_out: tuple[FramePair, ...]
    kept: tuple[FramePair, ...]


def hold_out(
    tracking_dir: str | Path,
    head_model_dir: str | Path,
    output_dir: str | Path,
    subject: str,
    *,
    protocol: str,
    fraction: float,
    seed: int,
    resolution: int,
    callback: ProgressCallback | None = None,
) -> Split:
    """Splits a tracked subject; see the module for files and protocols.

    Args:
        tracking_dir: the subject's tracking folder.
        head_model_dir: folder written by prepare_head_model.
        output_dir: created; files of an earlier run are replaced.
        subject: name; enters the draw.
        protocol: held_out_frames | held_out_cameras.
        fraction: of the frames, or of the cameras.
        seed: of the draw.
        resolution: side of the pictures of the image set.
        callback: called per picture.

    Raises:
        UserError: too little to set something aside of, or unusable files.
    """
    tracking_dir, output_dir = Path(tracking_dir), Path(output_dir)
    tracked = read_tracked_subject(tracking_dir)
    frames = usable_frames(tracked)
    split = choose_split(tracked, frames, subject, protocol, fraction, seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tracking_dir / "fit.npz", output_dir / "fit.npz")
    write_reference_list(output_dir / "reference_images.json", list(split.kept))
    for name in ("images", "bg"):
        _link(tracking_dir / name, output_dir / name)
    chosen = [frames[pair] for pair in split.held_out]
    held_out = TrackedSubject(tracked.folder, tracked.tracking, tuple(chosen))
    _write_image_set(held_out, Path(head_model_dir), output_dir / "held_out", resolution, callback)
    write_json(
        output_dir / "split.json",
        {
            "protocol": protocol,
            "fraction": fraction,
            "seed": seed,
            "fps": tracked.tracking.fps,
            "num_held_out": len(split.held_out),
            "num_references": len(split.kept),
            "num_references_before": len(tracked.references),
            **{name: [list(pair) for pair in pairs] for name, pairs in asdict(split).items()},
        },
    )
    logger.info(
        "%s: %d frames set aside (%s), %d of %d references remain.",
        subject, len(split.held_out), protocol, len(split.kept), len(tracked.references),
    )  # fmt: skip
    return split


def usable_frames(tracked: TrackedSubject) -> dict[FramePair, Reference]:
    """Every frame that really shows the subject, by camera and timestep.

    The tracker leaves out frames, and fills gaps of a camera with pictures of others: what it used
    is in its quality.json. Imported fits have no such list; the frames that there are files of
    count.
    """
    fit = tracked.tracking
    cameras = dict.fromkeys(reference.camera for reference in tracked.references)
    used = _frames_used(tracked.folder)
    found: dict[FramePair, Reference] = {}
    for camera in cameras:
        folders = tracked.folder / "images" / camera, tracked.folder / "bg" / camera
        images = list_frames(folders[0])
        mattes = list_frames(folders[1]) if folders[1].is_dir() else []
        for timestep in range(min(fit.num_frames, len(images))):
            if used is not None and (camera, timestep) not in used:
                continue
            if mattes and timestep >= len(mattes):
                break
            found[camera, timestep] = Reference(
                camera,
                fit.camera_order.index(camera),
                timestep,
                images[timestep],
                mattes[timestep] if mattes else None,
            )
    return found


def _frames_used(folder: Path) -> set[FramePair] | None:
    path = folder / "quality.json"
    if not path.is_file():
        return None
    content: Any = read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list):
        return None
    return {
        (entry["camera"], entry["timestep"])
        for entry in frames
        if entry.get("used") and entry.get("timestep") is not None
    }


def choose_split(
    tracked: TrackedSubject,
    frames: Sequence[FramePair] | dict[FramePair, Reference],
    subject: str,
    protocol: str,
    fraction: float,
    seed: int,
) -> Split:
    """Draws what is set aside.

    Args:
        tracked: the subject; its references are what can be kept.
        frames: usable frames.
        subject: see `hold_out`.
        protocol: see `hold_out`.
        fraction: see `hold_out`.
        seed: see `hold_out`.

    Raises:
        InputFileError: too few frames or cameras.
    """
    generator = derived_generator("hold_out", protocol, seed, subject)
    references = [(r.camera, r.timestep) for r in tracked.references]
    if protocol == "held_out_cameras":
        return _split_cameras(tracked, list(frames), references, fraction, generator)
    fps = tracked.tracking.fps
    if fps is None:
        # Photos: moments of the references; others were not good enough for a reference.
        moments = sorted({timestep for _, timestep in references})
        if len(moments) < 2:
            raise _too_little(tracked, f"{len(moments)} photo(s)", "at least 2")
        count = min(max(1, round(fraction * len(moments))), len(moments) - 1)
        apart = set(generator.choice(moments, count, replace=False).tolist())
        near = apart
    else:
        moments = sorted({timestep for _, timestep in frames})
        count = max(1, round(fraction * len(moments)))
        if len(moments) < 2 or count >= len(moments):
            raise _too_little(tracked, f"{len(moments)} usable frames", "at least 2")
        start = int(generator.integers(len(moments) - count + 1))
        block = moments[start : start + count]
        guard = round(GUARD_S * fps)
        apart = set(block)
        near = set(range(block[0] - guard, block[-1] + guard + 1))
    kept = tuple(pair for pair in references if pair[1] not in near)
    if not kept:
        raise _too_little(
            tracked,
            f"no reference further than {GUARD_S} s from the {len(apart)} frames set aside",
            "at least one; lower evaluation.fraction, or raise tracking.max_references",
        )
    held_out = [pair for pair in frames if pair[1] in apart]
    if fps is None:
        held_out = [pair for pair in held_out if pair in set(references)]
    return Split(tuple(sorted(held_out)), kept)


def _split_cameras(
    tracked: TrackedSubject,
    frames: list[FramePair],
    references: list[FramePair],
    fraction: float,
    generator: np.random.Generator,
) -> Split:
    seen: dict[str, set[int]] = {}
    for camera, timestep in frames:
        seen.setdefault(camera, set()).add(timestep)
    names = [name for name in tracked.tracking.camera_order if name in seen]
    if len(names) < 2:
        raise _too_little(tracked, f"{len(names)} camera(s)", "at least 2 cameras")
    common = [a for a in names if any(seen[a] & seen[b] for b in names if b != a)]
    if len(common) < len(names):
        raise _too_little(
            tracked,
            "cameras without a common moment (photos of different size count as cameras)",
            "cameras that recorded together; use evaluation.protocol: held_out_frames",
        )
    count = min(max(1, round(fraction * len(names))), len(names) - 1)
    apart = set(generator.choice(names, count, replace=False).tolist())
    kept = tuple(pair for pair in references if pair[0] not in apart)
    if not kept:
        raise _too_little(
            tracked, f"all references from {', '.join(sorted(apart))}", "references of more cameras"
        )
    return Split(tuple(sorted(pair for pair in frames if pair[0] in apart)), kept)


def _too_little(tracked: TrackedSubject, found: str, expected: str) -> InputFileError:
    return InputFileError(
        tracked.folder,
        found,
        expected,
        "Nothing can be set aside for the evaluation otherwise (evaluation.protocol).",
    )


def _link(source: Path, link: Path) -> None:
    """Replaces `link` by a relative link to a folder; by nothing if there is no such folder."""
    if link.is_symlink():
        link.unlink()
    if source.is_dir():
        link.symlink_to(os.path.relpath(source.resolve(), link.parent.resolve()), True)


def _write_image_set(
    held_out: TrackedSubject,
    head_model_dir: Path,
    folder: Path,
    resolution: int,
    callback: ProgressCallback | None,
) -> None:
    """Crops as the pipeline makes them: over white, with mattes."""
    shutil.rmtree(folder, ignore_errors=True)
    head = HeadModel.load(head_model_dir)
    template = load_flame_template(head_model_dir)
    views = reference_views(held_out, head, template.head_vertex_ids)
    has_mattes = all(frame.matte is not None for frame in held_out.references)
    for i, (view, frame) in enumerate(zip(views, held_out.references, strict=True)):
        image = read_reference_image(frame, view.crop_box, resolution)
        write_image(folder / "images" / f"{i:05d}.png", to_uint8((image + 1) / 2))
        write_view_parameters(folder / "flame" / f"{i:05d}.npz", view)
        if has_mattes and frame.matte is not None:
            matte = resize(crop(read_grey(frame.matte), view.crop_box, 0), resolution)
            write_image(folder / "mattes" / f"{i:05d}.png", matte.astype(np.uint8))
        if callback is not None:
            callback(Progress(i + 1, len(views), "picture"))


def read_split(path: str | Path | None) -> dict[str, Any] | None:
    """How frames were set aside (`split.json`), for the results: without the list of frames.

    Raises:
        InputFileError: no such file.
    """
    if path is None:
        return None
    content: dict[str, Any] = read_json(path, "a split of a subject's frames")
    return {name: value for name, value in content.items() if name not in ("held_out", "kept")}
