"""Checks of the files that a configuration names, before anything runs.

Heavy parts (numpy, Pillow) are imported here and not by the configuration itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cap4d_core.config import DEMO_WEIGHTS, DOWNLOAD, LPIPS_DOWNLOAD, VIDEO_SUFFIXES, Config
from cap4d_core.errors import UserError
from cap4d_core.subjects import Driving

# Rough sizes for the disk-space check, bytes.
_LATENT_BYTES = 4 * 4
_IMAGE_BYTES_PER_PIXEL = 1.5


def describe(config: Config) -> str:
    """What would be run, in a few lines."""
    sampling = config.settings.sampling
    views = (
        f"{sampling.num_views} views each in {len(config.rounds)} rounds x {sampling.num_shards} "
        "shards"
        if config.rounds
        else "no views (fitted on the references alone)"
    )
    return "\n".join(
        [
            f"quality {config.quality}; results in {config.results}",
            f"{len(config.subjects)} subjects; {views}",
            f"{len(config.driving)} driving sequences, {len(config.animations)} animations",
        ]
    )


def check_files(config: Config) -> list[str]:
    """All problems with the files named: missing, unreadable, wrong fields, no space."""
    problems: list[str] = []

    def attempt(where: str, check: Callable[[], object]) -> None:
        try:
            check()
        except UserError as error:
            problems.append(f"{where}: {error}")

    attempt("head_model.path", partial(check_head_model_source, config))
    if config.rounds and config.settings.mmdm.url is None:
        attempt("mmdm.path", partial(check_weights, config))
    if config.settings.tracking.backend == "pixel3dmm" and needs_tracking(config):
        attempt("tracking.backend", partial(check_pixel3dmm, config))
    sampling, fitting = config.settings.sampling, config.settings.fitting
    for key, path in (
        ("sampling.plan", sampling.plan),
        ("fitting.lpips_weights", fitting.lpips_weights),
        ("evaluation.identity_model", config.settings.evaluation.identity_model),
    ):
        if path is not None and path != LPIPS_DOWNLOAD:
            attempt(key, partial(_require, path))
    for name, subject in config.subjects.items():
        if subject.avatar is not None:
            attempt(f"subject {name}, avatar", partial(check_avatar, Path(subject.avatar)))
            if not subject.is_evaluated:
                continue
        if subject.tracking is not None:
            attempt(f"subject {name}", partial(check_subject, Path(subject.tracking)))
        elif subject.demo_seed is None and subject.reference is not None:
            attempt(f"subject {name}", partial(check_recording, Path(subject.reference)))
        if subject.held_out is not None:
            attempt(f"subject {name}, held_out", partial(check_image_set, Path(subject.held_out)))
    for name, row in config.driving.items():
        if row.fit is not None and not row.is_demo:
            attempt(f"driving sequence {name}", partial(check_driving, row))
        if row.video is not None and (row.fit is None or config.settings.animation.sound):
            attempt(f"driving sequence {name}", partial(check_recording, Path(row.video)))
    attempt("results", partial(check_disk_space, config))
    return problems


def check_head_model_source(config: Config) -> None:
    """Finds model and companions.

    Raises:
        UserError: which files are missing.
    """
    from cap4d_core.flame.assets import find_companions, find_model

    settings = config.settings.head_model
    if config.uses_demo_head:
        return
    if settings.path == DOWNLOAD:
        from cap4d_core.flame.flame_download import find_credentials

        if not (Path(config.results) / "assets" / "downloads" / "flame" / "flame.npz").exists():
            find_credentials(settings.url)
        return
    source = Path(settings.path)
    model = find_model(source)
    if settings.companions != DOWNLOAD:
        find_companions(source, model, Path(settings.companions) if settings.companions else None)


def needs_tracking(config: Config) -> bool:
    """Whether photos or videos of any row are to be tracked."""
    subjects = (
        row.tracking is None and row.demo_seed is None and (row.avatar is None or row.is_evaluated)
        for row in config.subjects.values()
    )
    return any(subjects) or any(row.fit is None for row in config.driving.values())


def check_pixel3dmm(config: Config) -> None:
    """Finds the external tracker.

    Raises:
        UserError: names everything that is missing.
    """
    from cap4d_core.tracking.pixel3dmm_installation import find_installation

    find_installation(config.settings.tracking.pixel3dmm_path)


def check_weights(config: Config) -> None:
    """Finds the weights and compares their hash when one is given.

    Raises:
        UserError: missing, or another hash.
    """
    from cap4d_core.diffusion.model_weights import find_checkpoint, is_prepared_folder
    from cap4d_core.files.basic import sha256_file

    path = Path(config.settings.mmdm.path or "")
    if path == DEMO_WEIGHTS and not path.exists():
        raise UserError(
            "no weights of the demo world are shipped; set sampling.num_views: 0, or mmdm.path"
        )
    if is_prepared_folder(path):
        return
    checkpoint = find_checkpoint(path)
    expected = config.settings.mmdm.sha256
    if expected is not None and (found := sha256_file(checkpoint)) != expected.strip().lower():
        raise UserError(f"{checkpoint}: SHA-256 {found}, expected {expected}; download it again")


def check_subject(folder: Path) -> None:
    """Reads a ready fit field by field and decodes its reference images.

    Raises:
        UserError: the first thing that is wrong.
    """
    from cap4d_core.files.images import read_grey, read_rgb
    from cap4d_core.files.tracking import read_tracked_subject

    subject = read_tracked_subject(folder)
    for reference in subject.references:
        height, width = (int(n) for n in subject.tracking.resolutions[reference.camera_index])
        found = read_rgb(reference.image).shape[:2]
        if found != (height, width):
            raise UserError(
                f"{reference.image}: {found[1]} x {found[0]} pixels, fit.npz says {width} x "
                f"{height} for camera {reference.camera}"
            )
        if reference.matte is not None:
            read_grey(reference.matte)


def check_avatar(source: Path) -> None:
    """Finds a ready avatar.

    Raises:
        UserError: none there.
    """
    from cap4d_core.avatar.import_avatar import find_avatar

    find_avatar(source)


def check_recording(path: Path) -> None:
    """Finds the photos or the video.

    Raises:
        UserError: nothing there, or a folder without photos and videos.
    """
    from cap4d_core.files.images import IMAGE_SUFFIXES

    if not path.exists():
        raise UserError(f"{path}: nothing there; expected photos or a video")
    suffixes = {file.suffix.lower() for file in path.rglob("*")} if path.is_dir() else {path.suffix}
    if not suffixes & (IMAGE_SUFFIXES | VIDEO_SUFFIXES):
        raise UserError(f"{path}: no photos and no video in it")


def check_image_set(folder: Path) -> None:
    """Reads an image set and decodes its images.

    Raises:
        UserError: the first thing that is wrong.
    """
    from cap4d_core.files.image_set import read_image_set
    from cap4d_core.files.images import read_rgb

    for item in read_image_set(folder):
        read_rgb(item.image)


def check_driving(row: Driving) -> None:
    """Reads a driving fit and its camera path.

    Raises:
        UserError: a wrong field, or frames that the fit does not have.
    """
    from cap4d_core.files.tracking import read_fit, read_trajectory

    if row.fit is None:
        return
    tracking = read_fit(row.fit)
    last = row.start_frame + (row.num_frames or 1)
    if last > tracking.num_frames:
        raise UserError(
            f"{row.fit}: {tracking.num_frames} frames, but start_frame {row.start_frame}"
            + (f" and num_frames {row.num_frames}" if row.num_frames else "")
            + f" need {last}"
        )
    if row.trajectory is not None:
        read_trajectory(row.trajectory)


def estimated_bytes(config: Config) -> int:
    """About how much disk the run needs."""
    sampling = config.settings.sampling
    pixels = sampling.resolution**2
    latent = _LATENT_BYTES * pixels // 64
    views = sampling.num_views * (
        len(config.rounds) * latent + int(_IMAGE_BYTES_PER_PIXEL * pixels)
    )
    avatar = 200_000_000 + config.settings.fitting.num_gaussians_init * 600
    return len(config.subjects) * (views + avatar) + len(config.animations) * 50_000_000


def check_disk_space(config: Config) -> None:
    """Compares an estimate with the free space.

    Raises:
        UserError: too little, or a folder that cannot be written.
    """
    folder = Path(config.results).resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written")
    free, need = shutil.disk_usage(folder).free, estimated_bytes(config)
    if need > free:
        raise UserError(
            f"about {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB free in {folder}"
        )


def _require(path: str) -> None:
    from cap4d_core.files.basic import require_file

    if not (Path(path).is_dir() and any(Path(path).iterdir())):  # LPIPS: also a folder
        require_file(path, "a readable file")
