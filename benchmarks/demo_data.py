"""What the benchmarks of the avatar stages run on when they are given nothing: the demo world."""

from __future__ import annotations

from pathlib import Path

from cap4d_core.demo.world import (
    held_out_fit,
    reference_fit,
    write_demo_crops,
    write_demo_driving,
    write_demo_head,
)
from cap4d_core.flame.assets import prepare_head_model

NUM_HELD_OUT = 16
# Of the uncropped photos; nothing but the rounding of crop boxes depends on it.
PHOTO_SIZE = 640


def demo_head(folder: Path) -> Path:
    """Writes the demo head model, prepared, below a folder; returns where."""
    return prepare_head_model(write_demo_head(folder / "assets"), None, folder / "head")


def demo_views(
    folder: Path, subject: int, size: int, num_views: int, device: str
) -> tuple[Path, Path]:
    """Writes image sets of a person: one to fit on, one of views and expressions not in it."""
    for name, fit in (
        ("train", reference_fit(subject, num_views, PHOTO_SIZE)),
        ("held_out", held_out_fit(subject, NUM_HELD_OUT, PHOTO_SIZE)),
    ):
        write_demo_crops(folder / name, subject, fit, crop_size=size, device=device)
    return folder / "train", folder / "held_out"


def demo_driving(folder: Path, num_frames: int) -> Path:
    """Writes the fit of a driving sequence; returns it."""
    write_demo_driving(folder, num_frames=num_frames)
    return folder / "fit.npz"
