"""Accuracy and speed of the built-in tracker, everything in one go.

    python -m benchmarks.tracking [--real FOLDER] [--demo SUBJECTS] [--json FILE]

Real data (CAP4D_REAL_DATA, default ../shared/real; left out when absent): photos with fits of
another tracker, and a video. There the truth is not known. "Distance" is that of the projected
vertices of flowface_vertex_mask.npy from the mean head at the given pose, which is itself about 2 %
off a dense alignment. Demo subjects: truth is known, so the distance is an error. Every one has
pictures of its own kind: distance, focal length, place and size of the head, background; heads turn
up to 60 degrees and tilt up to 26, with hair, glasses and beards as they come.
Distances are means over the vertices, in percent of the larger side of their bounding box.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cap4d_core.demo.capture import DISTANCE, head_poses, make_fit
from cap4d_core.demo.expressions import sample_expressions
from cap4d_core.demo.family import views_of
from cap4d_core.demo.rendering import SubjectRenderer
from cap4d_core.demo.subject import make_subject
from cap4d_core.demo.world import write_demo_head
from cap4d_core.files.images import to_uint8, write_image
from cap4d_core.files.tracking import Tracking, read_fit, read_tracked_subject
from cap4d_core.flame.assets import VERTEX_MASK_FILE, prepare_head_model
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.cameras import project
from cap4d_core.settings import TrackingSettings
from cap4d_core.tracking.quality import head_angles
from cap4d_core.tracking.track import track_driving, track_subject

Array = NDArray[np.float64]
BLINK = 64
# Demo photos: how many of a subject, their side in pixels, the height of a head with hair.
NUM_PHOTOS, SIDE, HEAD_SIDE_M, FIRST_SEED = 8, 512, 0.302, 101


@dataclass
class Head:
    """A head model, its folder, the vertices that count and the landmarks on it."""

    folder: Path
    model: HeadModel
    mask: NDArray[np.bool_]
    landmarks: Path

    @classmethod
    def load(cls, folder: Path) -> Head:
        """Reads what prepare_head_model wrote."""
        mask = np.load(folder / VERTEX_MASK_FILE).astype(bool)
        model = HeadModel.load(folder, mouth=False)
        return cls(folder, model, mask, folder.with_name(folder.name + "_landmarks.npz"))


def main() -> None:
    arguments = parse_arguments()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if arguments.real.is_dir():
            figures["photos"], figures["video"] = measure_real(arguments.real, work / "real")
        if arguments.demo:
            figures["demo"] = measure_demo(arguments.demo, work / "demo")
    for section, values in figures.items():
        print(f"\n{section}")
        for name, value in values.items():
            print(f"  {name:<58} {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("CAP4D_REAL_DATA", Path(__file__).parents[2] / "shared" / "real")
    parser.add_argument("--real", type=Path, default=Path(default), help="folder of real data")
    parser.add_argument("--demo", type=int, default=6, help="number of demo subjects")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def measure_real(data: Path, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    source = data / "head_model"
    head = Head.load(prepare_head_model(source / "flame_gp.pkl", source / "assets", work / "head"))
    relative, distance, residual, gaze = [], [], [], []
    for name in ("felix", "tesla"):
        photos = data / name / "images/cam0"
        track_subject(
            photos, work / name, head.folder, TrackingSettings(), correspondence=head.landmarks
        )
        fit, given = read_tracked_subject(work / name).tracking, read_fit(data / name / "fit.npz")
        relative += list(camera_rotation(given).inv() * camera_rotation(fit))
        quality = json.loads((work / name / "quality.json").read_text())
        residual += [100 * frame["landmark_residual"] for frame in quality["frames"]]
        gaze += list(np.degrees(fit.eye_rot - given.eye_rot)[:, 1])
        for t in range(given.num_frames):
            # Coefficients of the given fit belong to another basis; the blink does not.
            expr = np.zeros_like(given.expr[t])
            expr[BLINK] = given.expr[t, BLINK]
            truth = pixels(head, given, t, np.zeros_like(given.shape), expr)
            distance.append(mean_distance(head, truth, pixels(head, fit, t)))
    turned = Rotation.concatenate(relative)
    errors = np.degrees((turned.mean().inv() * turned).magnitude())
    photos_figures = {
        "frames": len(errors),
        "rotation against given fits, median / worst (deg)": two(np.median(errors), errors.max()),
        "distance from mean head at given pose, mean / worst (%)": two(
            np.mean(distance), np.max(distance)
        ),
        "landmark residual, mean / worst (% of the face)": two(np.mean(residual), np.max(residual)),
        "yaw of the gaze against given fits, median (deg)": one(np.median(np.abs(gaze))),
    }
    return photos_figures, measure_video(data / "video/talking.mp4", head, work)


def measure_video(video: Path, head: Head, work: Path) -> dict[str, Any]:
    quality = {}
    for smoothness in (0.0, 1.0):
        output = work / f"video_{smoothness}"
        track_driving(
            video,
            output,
            head.folder,
            TrackingSettings(smoothness=smoothness),
            correspondence=head.landmarks,
        )
        quality[smoothness] = json.loads((output / "quality.json").read_text())
    rough, smooth = quality[0.0], quality[1.0]
    ratio = smooth["median_landmark_residual"] / rough["median_landmark_residual"]
    return {
        "frames used / seen": f"{smooth['num_used']} / {smooth['num_frames']}",
        "frames per second, fit and networks": smooth["frames_per_second_tracked"],
        "second difference of rotation (deg), without smoothing": two(
            smooth["median_rotation_acceleration_deg"], rough["median_rotation_acceleration_deg"]
        ),
        "second difference of position (mm), without smoothing": two(
            smooth["median_translation_acceleration_mm"],
            rough["median_translation_acceleration_mm"],
        ),
        "landmark residual by that without smoothing": f"{ratio:.3f}",
    }


def measure_demo(num_subjects: int, work: Path) -> dict[str, Any]:
    write_demo_head(work / "source")
    head = Head.load(prepare_head_model(work / "source", None, work / "head"))
    rows: list[dict[str, Any]] = []
    for seed in range(FIRST_SEED, FIRST_SEED + num_subjects):
        folder, output = work / f"{seed}", work / f"{seed}_tracked"
        truth = write_photos(folder, seed)
        track_subject(
            folder / "images/cam0",
            output,
            head.folder,
            TrackingSettings(),
            correspondence=head.landmarks,
        )
        fit = read_fit(output / "fit.npz")
        kept = [
            int(Path(frame["name"]).stem)
            for frame in json.loads((output / "quality.json").read_text())["frames"]
            if frame["used"]
        ]
        rows += [compare(head, truth, t, fit, row) for row, t in enumerate(kept)]
    return summary(rows, NUM_PHOTOS * num_subjects)


def write_photos(folder: Path, seed: int) -> Tracking:
    """Photos of a demo subject before a plain background; returns their exact fit."""
    rng = np.random.default_rng([seed, 77])
    distance = float(np.exp(rng.uniform(np.log(0.55), np.log(2.2))))
    share = rng.uniform(0.45, 0.85)  # of the picture that the head fills
    yaw, pitch = rng.uniform(-60, 60, NUM_PHOTOS), rng.uniform(-26, 26, NUM_PHOTOS)
    yaw[:2] = rng.uniform(-8, 8, 2)
    pitch[0] = rng.uniform(-4, 4)
    roll = rng.uniform(-15, 15, NUM_PHOTOS)
    room = (1 - share) / 2 * HEAD_SIDE_M / share
    shift = rng.uniform(-1, 1, (NUM_PHOTOS, 3)) * np.array([room, 0.6 * room, 0.05])
    expr, eye = sample_expressions(NUM_PHOTOS, rng)
    rot, tra = head_poses(yaw, pitch, roll, shift)
    tra[:, 2] += DISTANCE - distance
    subject = make_subject(seed)
    fit = make_fit(subject.shape, expr, eye, rot, tra, SIDE, None)
    focal = np.full((1, 1), share * SIDE * distance / HEAD_SIDE_M, np.float32)
    fit = replace(fit, fx=focal, fy=focal)
    out = SubjectRenderer(subject, "cpu").render(views_of(fit), (SIDE, SIDE), supersample=1)
    ramp = np.linspace(-0.1, 0.1, SIDE)[:, None, None]
    for i, (rgb, matte) in enumerate(zip(out.rgb.numpy(), out.matte.numpy(), strict=True)):
        background = np.array([0.45, 0.5, 0.55]) + ramp * rng.uniform(-1, 1, 3)
        cover = matte.reshape(SIDE, SIDE, 1)
        picture = to_uint8(rgb * cover + background * (1 - cover))
        write_image(folder / "images/cam0" / f"{i:08d}.png", picture)
    return fit


def compare(head: Head, truth: Tracking, t: int, fit: Tracking, row: int) -> dict[str, Any]:
    expected = pixels(head, truth, t)
    return {
        "distance": mean_distance(head, expected, pixels(head, fit, row)),
        "rotation": camera_rotation(truth)[t].inv() * camera_rotation(fit)[row],
        "angles": (head_angles(truth, t, 0), head_angles(fit, row, 0)),
        "gaze": (np.degrees(truth.eye_rot[t, :2]), np.degrees(fit.eye_rot[row, :2])),
        "blink": (truth.expr[t, BLINK], fit.expr[row, BLINK]),
    }


def summary(rows: list[dict[str, Any]], num_seen: int) -> dict[str, Any]:
    turned = Rotation.concatenate([row["rotation"] for row in rows])
    rotation = np.degrees((turned.mean().inv() * turned).magnitude())
    angles = np.array([row["angles"] for row in rows])  # (frames, truth or fit, yaw or pitch)
    gaze = np.array([row["gaze"] for row in rows])[..., ::-1]
    blink = np.array([row["blink"] for row in rows])
    distance = np.array([row["distance"] for row in rows])
    turn = np.abs(angles[:, 0, 0])
    frontal = (turn < 30) & (blink[:, 0] < 0.3)
    return {
        "frames used / seen": f"{len(rows)} / {num_seen}",
        "distance from the truth, mean / worst (%)": two(distance.mean(), distance.max()),
        "share of photos above 2 %": one(float((distance > 2).mean())),
        "distance, yaw below 15 / to 30 / beyond (%)": " / ".join(
            one(distance[(turn >= low) & (turn < high)].mean())
            for low, high in ((0, 15), (15, 30), (30, 90))
        ),
        "rotation, median / worst (deg)": two(np.median(rotation), rotation.max()),
        "found by true angle of the head, yaw / pitch": two(
            slope(angles[:, 0, 0], angles[:, 1, 0]), slope(angles[:, 0, 1], angles[:, 1, 1])
        ),
        "found by true gaze, head turned less than 30, yaw / pitch": two(
            slope(gaze[frontal, 0, 0], gaze[frontal, 1, 0]),
            slope(gaze[frontal, 0, 1], gaze[frontal, 1, 1]),
        ),
        "error of that gaze, yaw / pitch, median (deg)": two(
            *np.median(np.abs(gaze[frontal, 1] - gaze[frontal, 0]), axis=0)
        ),
        "blink: found where eyes are closed / open, mean": two(
            blink[blink[:, 0] > 0.9, 1].mean(), blink[blink[:, 0] < 0.1, 1].mean()
        ),
    }


def camera_rotation(fit: Tracking) -> Rotation:
    """Rotations (T,) of the head relative to the camera, OpenCV axes."""
    flip = Rotation.from_euler("x", 180, degrees=True)
    return Rotation.from_matrix(fit.extr[0, :3, :3]) * flip * Rotation.from_rotvec(fit.rot)


def pixels(
    head: Head, fit: Tracking, t: int, shape: Array | None = None, expr: Array | None = None
) -> Array:
    """(5023, 2) projected vertices of frame t in camera 0."""

    def tensor(values: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.float32))

    with torch.no_grad():
        vertices = head.model(
            tensor(fit.shape if shape is None else shape),
            tensor(fit.expr[t] if expr is None else expr)[None],
            tensor(fit.rot[t])[None],
            tensor(fit.tra[t])[None],
            tensor(fit.eye_rot[t])[None],
        ).vertices
        camera = [tensor(getattr(fit, name)[:1]) for name in ("fx", "fy", "cx", "cy", "extr")]
        return project(vertices, *camera)[0, 0, :, :2].double().numpy()


def mean_distance(head: Head, expected: Array, found: Array) -> float:
    a, b = expected[head.mask], found[head.mask]
    side = (a.max(axis=0) - a.min(axis=0)).max()
    return 100 * float(np.linalg.norm(a - b, axis=1).mean() / side)


def slope(truth: Array, found: Array) -> float:
    """Least-squares slope of found over true values."""
    centered = truth - truth.mean()
    return float(centered @ (found - found.mean()) / (centered @ centered))


def one(value: float) -> str:
    return f"{value:.2f}"


def two(first: float, second: float) -> str:
    return f"{first:.2f} / {second:.2f}"


if __name__ == "__main__":
    main()
