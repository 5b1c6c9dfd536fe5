"""Runs an installed Pixel3DMM on a recording, in its own Python environment.

Gaze and mattes come from the built-in networks.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cap4d_core.errors import InputFileError, UserError
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import Tracking
from cap4d_core.flame.model import HeadModel, read_companion_array
from cap4d_core.flame.template import NUM_HEAD_VERTICES
from cap4d_core.progress import ProgressCallback
from cap4d_core.tracking.pixel3dmm_convert import fit_vertices, read_output, to_tracking
from cap4d_core.tracking.pixel3dmm_installation import Installation, process_environment
from cap4d_core.tracking.video_input import Recording

logger = logging.getLogger(__name__)

VERTEX_WEIGHTS = "flowface_vertex_weights.npy"
_INPUT_NAME = "input"


def fit_with_pixel3dmm(
    recording: Recording,
    installation: Installation,
    head_model_dir: str | Path,
    work_dir: str | Path,
    callback: ProgressCallback | None = None,
) -> Tracking:
    """Tracks all frames of one camera with Pixel3DMM and converts the result; eyes stay ahead.

    Args:
        recording: one camera, one picture size.
        installation: of `find_installation`.
        head_model_dir: folder written by `prepare_head_model`.
        work_dir: for Pixel3DMM's files; emptied first.
        callback: called while the head model is fitted to the meshes.

    Raises:
        UserError: several cameras, or a step of Pixel3DMM failed.
        InputFileError: its output is incomplete.
    """
    if len(recording.cameras) != 1:
        raise UserError(
            f"{recording.source}: {len(recording.cameras)} cameras or picture sizes; Pixel3DMM "
            "takes one. Use tracking.backend: landmarks."
        )
    camera = recording.cameras[0]
    work_dir = Path(work_dir)
    shutil.rmtree(work_dir, ignore_errors=True)
    frames = work_dir / _INPUT_NAME
    for timestep, _, image in camera.frames():
        write_image(frames / f"{timestep:05d}.png", image)
    preprocessing, tracking = work_dir / "pixel3dmm_preprocessing", work_dir / "pixel3dmm_tracking"
    environment = {
        **process_environment(installation.checkout),
        "PIXEL3DMM_PREPROCESSED_DATA": str(preprocessing.resolve()),
        "PIXEL3DMM_TRACKING_OUTPUT": str(tracking.resolve()),
    }
    name = f"video_name={_INPUT_NAME}"
    flags = ["include_neck=False", "use_flame2023=True", "ignore_mica=True"]
    flags.append(f"is_discontinuous={not recording.continuous}")
    for step in (
        ["run_preprocessing.py", "--video_or_images_path", str(frames.resolve())],
        ["network_inference.py", "model.prediction_type=normals", name],
        ["network_inference.py", "model.prediction_type=uv_map", name],
        ["track.py", name, *flags],
    ):
        _run(installation, step, environment, work_dir / "pixel3dmm.log")
    folders = sorted(p for p in tracking.iterdir() if p.is_dir()) if tracking.is_dir() else []
    if not folders:
        raise InputFileError(
            tracking, "no result", "a folder written by track.py", f"See {work_dir}/pixel3dmm.log."
        )
    output = read_output(folders[0], preprocessing / _INPUT_NAME)
    if len(output.vertices) != camera.num_frames:
        raise InputFileError(
            folders[0], f"{len(output.vertices)} frames", f"{camera.num_frames}, one per picture"
        )
    model = HeadModel.load(head_model_dir, mouth=False)
    weights = read_companion_array(Path(head_model_dir) / VERTEX_WEIGHTS, (NUM_HEAD_VERTICES,))
    parameters, error = fit_vertices(
        model,
        torch.from_numpy(output.vertices),
        torch.from_numpy(weights.astype(np.float32)),
        callback=callback,
    )
    logger.info("head model fitted to the meshes: %.2f mm", 1e3 * float(error.mean()))
    return to_tracking(output, parameters, None, camera.size, recording.fps)


def _run(
    installation: Installation, step: Sequence[str], environment: dict[str, str], log: Path
) -> None:
    script = installation.checkout / "scripts" / step[0]
    logger.info("Pixel3DMM: %s", " ".join(step))
    with open(log, "ab") as handle:
        result = subprocess.run(
            [str(installation.python), str(script), *step[1:]],
            cwd=installation.checkout,
            env=environment,
            stdout=handle,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if result.returncode:
        tail = log.read_text("utf-8", errors="replace").splitlines()[-8:]
        raise UserError(
            f"Pixel3DMM's {step[0]} failed (exit code {result.returncode}); the end of {log}:\n  "
            + "\n  ".join(tail)
        )
