"""Driving sequences and exported files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from cap4d_core.animation.pixels import depth_to_millimetres, straight_rgba, to_bytes
from cap4d_core.animation.ply import (
    AnimationPlyWriter,
    BoundSplats,
    iterate_ply,
    read_animation_ply,
    splats_of_element,
)
from cap4d_core.animation.trajectories import drive
from cap4d_core.files.tracking import read_fit, read_trajectory
from tests.parity.goldens import Golden, adapter


@adapter("E3_driving_static", "E4_driving_traj")
def check_driving(g: Golden) -> None:
    folder = g.head_folder / "examples" / "input" / "animation"
    fit = read_fit(folder / str(g.input("in.fit_path_is")))
    trajectory_name = str(g.input("in.traj_path_is"))
    # Named relative to the folder of its fit.
    trajectory_path = (folder / str(g.input("in.fit_path_is"))).parent / trajectory_name
    trajectory = read_trajectory(trajectory_path) if trajectory_name else None
    sequence = drive(fit, trajectory)
    # float32 products in the golden, float64 here.
    g.compare("out.rt", sequence.extr, atol=2e-6)
    g.compare("out.K", sequence.intrinsics, atol=1e-6)
    size = np.asarray([sequence.width, sequence.height])
    g.compare("out.wh", np.tile(size, (sequence.num_frames, 1)))
    g.compare("out.timestep", np.arange(sequence.num_frames))
    g.compare("out.expr", sequence.expr, atol=1e-6)
    g.compare("out.eye_rot", sequence.eye_rot, atol=1e-6)
    # The head of a DrivenSequence is at the origin by definition: it has no rot and tra.
    g.compare("out.rot", np.zeros((sequence.num_frames, 3)), atol=1e-6)
    g.compare("out.tra", np.zeros((sequence.num_frames, 3)), atol=1e-6)
    g.ignore(r"out\.shape0", "zeros in the original; a driven avatar keeps its own shape")


@adapter("F1_ply")
def check_ply(g: Golden) -> None:
    faces, frames = g.input("in.faces"), g.input("in.verts")
    splats = BoundSplats(
        xyz=g.input("in._xyz"),
        features_dc=g.input("in._features_dc")[:, 0],
        features_rest=g.input("in._features_rest"),
        opacity=g.input("in._opacity")[:, 0],
        log_scales=g.input("in._scaling"),
        rotations=g.input("in._rotation"),
        binding=g.input("in.binding"),
    )
    with tempfile.TemporaryDirectory() as folder:
        for compress in (0, 1):
            path = Path(folder) / f"{compress}.ply"
            with AnimationPlyWriter(
                path, splats, faces, frames.shape[1], len(frames),
                compress=bool(compress), parity=True,
            ) as writer:  # fmt: skip
                for vertices in frames:
                    writer.write(vertices)
            data = np.frombuffer(path.read_bytes(), np.uint8)
            g.compare(f"out.ply_compress{compress}_bytes", data)
            rows = {
                name: np.stack([rows[axis] for axis in rows.dtype.names], axis=1)
                for name, rows in iterate_ply(path)
            }
            for found, name in g.match(rf"out\.c{compress}\.(delta|min|max)(\d+)"):
                kind, number = found[1], int(found[2])
                if kind == "delta":
                    g.compare(
                        name, rows[f"delta_vertex_{number:05d}"], atol=0 if compress else 1e-7
                    )
                else:
                    g.compare(name, rows[f"meta_delta_{kind}_{number:05d}"][0], atol=1e-7)
            _check_default_rounding(g, path, splats, faces, frames, bool(compress))


def _check_default_rounding(
    g: Golden,
    parity_file: Path,
    splats: BoundSplats,
    faces: np.ndarray,
    frames: np.ndarray,
    compress: bool,
) -> None:
    """Without parity only 8-bit steps and vertices without faces change, by at most one step."""
    used = np.isin(np.arange(frames.shape[1]), faces)
    path = parity_file.with_name("default.ply")
    with AnimationPlyWriter(
        path, splats, faces, frames.shape[1], len(frames), compress=compress
    ) as writer:
        for vertices in frames:
            writer.write(vertices)
    ours, published = read_animation_ply(path), read_animation_ply(parity_file)
    # The range always includes 0, the offset of vertices without a face.
    offsets = frames - frames[0]
    span = (np.maximum(offsets, 0).max(axis=1) - np.minimum(offsets, 0).min(axis=1)).max()
    g.check(
        bool(np.abs(ours.vertices - published.vertices)[:, used].max() <= span / 255 + 1e-6),
        "default export differs from the published one by more than one step",
    )


@adapter("F_export_compress0", "F_export_compress1")
def check_ply_file(g: Golden) -> None:
    """Reads the file, writes its content again, compares all bytes."""
    elements = dict(iterate_ply(g.path))
    faces = np.stack([elements["faces"][n] for n in elements["faces"].dtype.names], axis=1)
    base = elements["base_vertex"]
    splats = splats_of_element(elements["vertex"])
    frames = [name for name in elements if name.startswith("delta_vertex_")]
    # Offsets are stored quantised, so frames are taken from the reference inputs beside the file.
    vertices = g.sibling("F1_ply").input("in.verts")
    g.check(len(frames) == len(vertices), f"{len(frames)} frames, expected {len(vertices)}")
    compress = elements[frames[0]].dtype[0] == np.uint8
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "again.ply"
        with AnimationPlyWriter(
            path, splats, faces, len(base), len(frames), compress=compress, parity=True
        ) as writer:
            for frame in vertices:
                writer.write(frame)
        expected = np.frombuffer(g.path.read_bytes(), np.uint8)
        g.compare_with("bytes", expected, np.frombuffer(path.read_bytes(), np.uint8))
    # One quantisation step of the largest offset, plus float rounding.
    step = np.ptp(vertices - vertices[0], axis=1).max() / (255 if compress else 1e7)
    decoded = read_animation_ply(g.path)
    g.compare_with("decoded", vertices, decoded.vertices, atol=float(step) + 1e-7)


@adapter("F2_png")
def check_png(g: Golden) -> None:
    rgb = torch.from_numpy(g.input("in.rgb")).permute(1, 2, 0)
    alpha = torch.from_numpy(g.input("in.alpha")).permute(1, 2, 0)
    depth = torch.from_numpy(g.input("in.depth"))[0]
    g.compare("out.rgb_u8", to_bytes(rgb))
    # The published file joins the opaque picture and alpha.
    g.compare("out.rgba_u8", torch.cat([to_bytes(rgb), to_bytes(alpha)], dim=-1))
    g.compare("out.depth_u16", depth_to_millimetres(depth, parity=True))
    # Ours holds straight colour: compositing it again gives the opaque picture.
    premultiplied = rgb.clamp(0, 1) * alpha.clamp(0, 1)
    rgba = straight_rgba(premultiplied, alpha.clamp(0, 1)).float() / 255
    again = rgba[..., :3] * rgba[..., 3:]
    g.check(
        bool((again - premultiplied).abs().max() < 1 / 255), "straight colours are not consistent"
    )
