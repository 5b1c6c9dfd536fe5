"""How much disk every job fills: a model of sizes, from settings and a look at a few inputs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cap4d_core.config import Config
from cap4d_core.settings import FittingSettings

# A face on a plain background as PNG; photos of hair and cloth come close to 2.
PNG_BYTES_PER_PIXEL = 1.5
VIDEO_BYTES_PER_PIXEL = 0.06
PARAMETER_FILE_BYTES = 4_200  # flame/%05d.npz
RELEASED_WEIGHTS_BYTES = 3_600_000_000
HEAD_MODEL_BYTES = 30_000_000
SPLAT_BYTES = 240  # 60 numbers in avatar.safetensors
PLY_SPLAT_BYTES = 252
SHEET_BYTES = 320_000  # a contact sheet
# Log, job file, benchmark, Snakemake's own record of every output.
BOOKKEEPING_BYTES = 15_000
# Where nothing is known yet about a driving video that is still to be tracked.
ASSUMED_FRAMES = 500
ASSUMED_REFERENCES = 10
_SAMPLED_FOLDERS = 20
_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"})


@dataclass(frozen=True)
class JobSize:
    """Bytes that one job leaves behind, and what it needs besides while it or its round lasts."""

    kept: float
    temporary: float = 0.0


def job_sizes(config: Config) -> dict[str, JobSize]:
    """Size of one job of every rule that makes much; the others count as bookkeeping."""
    sampling, fitting = config.settings.sampling, config.settings.fitting
    pixels = sampling.resolution**2
    image = PNG_BYTES_PER_PIXEL * pixels + PARAMETER_FILE_BYTES
    latent = 16 * pixels / 64  # four channels of float32, an eighth of the side
    photo_bytes, photos = _references(config)
    weights = _weights_bytes(config)
    avatar = avatar_bytes(fitting)
    views = sampling.num_views / max(1, sampling.num_shards)
    shard = views * latent
    demo = config.settings.demo
    demo_photos = demo.num_references * PNG_BYTES_PER_PIXEL * demo.resolution**2
    sizes = {
        "prepare_head_model": JobSize(HEAD_MODEL_BYTES),
        "make_demo_head": JobSize(HEAD_MODEL_BYTES),
        "download_mmdm": JobSize(RELEASED_WEIGHTS_BYTES),
        "prepare_mmdm": JobSize(weights),
        "make_demo_subject": JobSize(demo_photos),
        "track_subject": JobSize(photo_bytes),
        "track_driving": JobSize(1_000_000),
        "crop_references": JobSize(photos * image),
        "encode_references": JobSize(photos * (2 * image + latent)),
        "plan_views": JobSize(200_000),
        "sample_views": JobSize(
            SHEET_BYTES + (shard if config.keep_intermediates else 0),
            0 if config.keep_intermediates else shard,
        ),
        "decode_views": JobSize(views * image + SHEET_BYTES),
        "fit_avatar": JobSize(
            avatar + (2 + fitting.iterations / fitting.evaluate_every) * SHEET_BYTES,
            3 * avatar,  # the checkpoint, with the state of the optimiser
        ),
        "import_avatar": JobSize(avatar),
        "animate_avatar": JobSize(animation_bytes(config)),
        "evaluate_avatar": JobSize(3 * SHEET_BYTES),
        "evaluate_reenactment": JobSize(3 * SHEET_BYTES),
        "write_report": JobSize(len(config.subjects) * 400_000),
    }
    return {
        rule: JobSize(size.kept + BOOKKEEPING_BYTES, size.temporary) for rule, size in sizes.items()
    }


def avatar_bytes(fitting: FittingSettings) -> float:
    """Size of avatar.safetensors: splats, and the deformation network."""
    faces = 1.64 * fitting.uv_resolution**2
    # Densification at most doubles them in runs seen so far.
    splats = 2 * max(fitting.num_gaussians_init, fitting.min_gaussians_per_face * faces)
    widths = [
        fitting.deform_net_channels * min(2**level, 8) for level in range(fitting.deform_net_layers)
    ]
    products = [a * b for a, b in itertools.pairwise(widths)]
    down = 27 * widths[0] + sum(products)
    # On the way up every layer but the innermost sees the one opposite, too.
    up = 2 * sum(products[:-1]) + sum(products[-1:]) + 6 * widths[0]
    return splats * SPLAT_BYTES + 4 * 16 * (down + up) + 12 * faces


def animation_bytes(config: Config) -> float:
    """Size of one animation, over the mean of the driving sequences."""
    animation, fitting = config.settings.animation, config.settings.fitting
    frames = mean([driving_frames(config, name) for name in config.driving], ASSUMED_FRAMES)
    pixels = float(animation.resolution or config.settings.sampling.resolution) ** 2
    splats = fitting.num_gaussians_init
    total = frames * VIDEO_BYTES_PER_PIXEL * pixels
    if animation.export_ply:
        offsets = 3 if animation.compress_ply else 12
        total += frames * offsets * fitting.uv_resolution**2 + splats * PLY_SPLAT_BYTES
    if animation.export_splats:
        total += splats * PLY_SPLAT_BYTES
    if animation.transparent:
        total += frames * pixels  # ProRes 4444
    if animation.png_frames:
        total += frames * PNG_BYTES_PER_PIXEL * pixels
    if animation.depth:
        total += frames * pixels
    return total


def driving_frames(config: Config, name: str) -> float:
    """Frames of a driving sequence; assumed where it was not tracked yet."""
    row = config.driving[name]
    if row.is_demo:
        return config.settings.demo.num_frames
    if row.num_frames is not None:
        return row.num_frames
    for path in (Path(config.results) / "driving" / name / "fit.npz", Path(row.fit or "")):
        if path.is_file():
            try:
                from cap4d_core.files.basic import read_npz

                return max(1, len(read_npz(path)["expr"]) - row.start_frame)
            except Exception:  # unreadable: the job that reads it says so; numpy absent
                break
    return ASSUMED_FRAMES


def _references(config: Config) -> tuple[float, float]:
    """Mean bytes and number of the reference photos of a subject."""
    if not config.tracked:
        return 0.0, 0.0
    step = max(1, len(config.tracked) // _SAMPLED_FOLDERS)
    sizes, counts = [], []
    demo = config.settings.demo
    for name in config.tracked[::step]:
        row = config.subjects[name]
        if row.demo_seed is not None:
            counts.append(float(demo.num_references))
            sizes.append(demo.num_references * PNG_BYTES_PER_PIXEL * demo.resolution**2)
        elif row.tracking is not None:
            folder = Path(row.tracking)
            sizes.append(float(sum(_file_sizes(folder, _IMAGES))))
            counts.append(float(_listed_references(folder / "reference_images.json")))
        elif row.reference is not None:
            found = list(_file_sizes(Path(row.reference), _IMAGES))
            count = len(found) or config.settings.tracking.max_references  # a video
            # Tracked photos are written as PNG.
            sizes.append(float(3 * sum(found)) or count * 1_500_000.0)
            counts.append(float(min(count, config.settings.tracking.max_references)))
    return mean(sizes, 0.0), mean(counts, ASSUMED_REFERENCES)


def _file_sizes(path: Path, suffixes: frozenset[str]) -> Iterable[int]:
    files = [path] if path.is_file() else path.rglob("*") if path.is_dir() else []
    return (file.stat().st_size for file in files if file.suffix.lower() in suffixes)


def _listed_references(path: Path) -> int:
    try:
        return len(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return ASSUMED_REFERENCES


def _weights_bytes(config: Config) -> float:
    if config.settings.mmdm.url is not None:
        return RELEASED_WEIGHTS_BYTES
    sizes = _file_sizes(Path(config.settings.mmdm.path or ""), frozenset({".ckpt", ".safetensors"}))
    return float(sum(sizes))


def mean(values: Sequence[float], otherwise: float) -> float:
    """The mean, or another value where there are none."""
    return sum(values) / len(values) if values else otherwise
