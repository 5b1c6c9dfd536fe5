"""Renders a driven avatar into video and 3D files.

    {output_dir}/renders.mp4               H.264
    {output_dir}/renders.mov               ProRes 4444 with alpha              (transparent)
    {output_dir}/frames/%05d.png           8-bit RGB                           (png_frames)
    {output_dir}/depth/%05d.png            16-bit grey, mm, 0 = nothing there  (depth)
    {output_dir}/exported_animation.ply    released layout, see `ply`          (export_ply)
    {output_dir}/avatar_frame0.ply         first frame for any splat viewer    (export_splats)
    {output_dir}/animation.json            what was rendered

Frames go through posing, rendering and encoding in small batches: memory does not grow with the
length of the sequence, and equal input gives equal files.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cap4d_core.animation.pixels import (
    depth_to_millimetres,
    over_background,
    straight_rgba,
    to_bytes,
)
from cap4d_core.animation.ply import AnimationPlyWriter, BoundSplats, write_splat_ply
from cap4d_core.animation.trajectories import DrivenSequence, drive_with
from cap4d_core.animation.video import SYNTHETIC_NOTICE, AudioTrack, VideoWriter
from cap4d_core.avatar.renderer import Backend, render_gaussians
from cap4d_core.errors import DivergedError
from cap4d_core.files.basic import atomic_path, write_json
from cap4d_core.files.images import write_image
from cap4d_core.files.tracking import Tracking, Trajectory
from cap4d_core.progress import Progress, ProgressCallback
from cap4d_core.settings import AnimationSettings

if TYPE_CHECKING:
    from cap4d_core.avatar.gaussians import GaussianAvatar, PosedGaussians
    from cap4d_core.flame.model import HeadModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RenderedBatch:
    """Some frames: image (B, H, W, 3) premultiplied on black, alpha and depth (B, H, W, 1)."""

    first: int
    posed: PosedGaussians
    image: Tensor
    alpha: Tensor
    depth: Tensor | None


def animate(
    avatar: GaussianAvatar,
    head_model: HeadModel,
    driving: tuple[Tracking, Trajectory | None],
    settings: AnimationSettings,
    output_dir: str | Path,
    callback: ProgressCallback | None = None,
    *,
    audio: AudioTrack | None = None,
    renderer: Backend = "auto",
) -> dict[str, Any]:
    """Renders an avatar that follows a driving sequence; see the module for the files.

    Args:
        avatar: the fitted avatar; keeps its own identity.
        head_model: moved to the device of the avatar, which poses with it.
        driving: fit of the driving sequence, and a camera path or None.
        settings: what to write, and how.
        output_dir: created; files of an earlier run are replaced.
        callback: called after every batch of frames.
        audio: sound of the driving video; left out when the playback rate is not that of the fit,
            because it would run away from the lips.
        renderer: backend of the splat renderer.

    Returns:
        The content of `animation.json`.

    Raises:
        DivergedError: the avatar renders to NaN.
        UserError: the encoder failed, e.g. because the disk is full.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tracking, trajectory = driving
    sequence = drive_with(tracking, trajectory, settings)
    device = next(avatar.parameters()).device
    head_model.to(device)
    if audio and tracking.fps and abs(sequence.fps - tracking.fps) > 0.01:
        logger.warning(
            "No sound: playback at %g frames per second, the driving video has %g.",
            sequence.fps,
            tracking.fps,
        )
        audio = None
    if audio and audio.duration_s is None:
        audio = AudioTrack(audio.path, audio.start_s, sequence.num_frames / sequence.fps)
    background = torch.tensor(settings.background, device=device)
    with contextlib.ExitStack() as files:
        video = files.enter_context(
            VideoWriter(output_dir / "renders.mp4", sequence.fps, crf=settings.crf, audio=audio)
        )
        outputs = _OptionalOutputs(files, avatar, sequence, settings, output_dir, audio)
        for batch in render_batches(avatar, sequence, settings, renderer):
            opaque = to_bytes(over_background(batch.image, batch.alpha, background)).cpu().numpy()
            for frame in opaque:
                video.write(frame)
            outputs.write(batch, opaque)
            if callback:
                done = batch.first + len(opaque)
                callback(Progress(done, sequence.num_frames, "frame"))
    result = {
        "num_frames": sequence.num_frames,
        "fps": sequence.fps,
        "width": sequence.width,
        "height": sequence.height,
        "num_gaussians": len(avatar.binding),
        "files": sorted(_written(settings)),
        "notice": SYNTHETIC_NOTICE,
    }
    write_json(output_dir / "animation.json", result)
    return result


def render_batches(
    avatar: GaussianAvatar,
    sequence: DrivenSequence,
    settings: AnimationSettings,
    renderer: Backend = "auto",
) -> Iterator[RenderedBatch]:
    """Poses and renders the frames of a sequence, `settings.frame_batch` at a time, on black."""
    device = next(avatar.parameters()).device

    def part(array: Any, chosen: slice) -> Tensor:
        return torch.as_tensor(array[chosen], dtype=torch.float32, device=device)

    for first in range(0, sequence.num_frames, settings.frame_batch):
        chosen = slice(first, first + settings.frame_batch)
        with torch.no_grad():
            posed = avatar.pose(part(sequence.expr, chosen), part(sequence.eye_rot, chosen))
            rendered = render_gaussians(
                posed.means,
                posed.quats,
                posed.scales,
                posed.opacities,
                posed.sh,
                part(sequence.extr, chosen),
                part(sequence.intrinsics, chosen),
                sequence.width,
                sequence.height,
                sh_degree=int(avatar.active_sh_degree),
                background=(0.0, 0.0, 0.0),
                with_depth=settings.depth,
                backend=renderer,
            )
        if not bool(torch.isfinite(rendered.image).all()):
            raise DivergedError(
                f"The avatar renders to NaN between frames {first} and "
                f"{min(first + settings.frame_batch, sequence.num_frames) - 1}; expected finite "
                "colours. Check the driving fit, or fit the avatar again."
            )
        yield RenderedBatch(first, posed, rendered.image, rendered.alpha, rendered.depth)


class _OptionalOutputs:
    """Everything besides the video."""

    def __init__(
        self,
        files: contextlib.ExitStack,
        avatar: GaussianAvatar,
        sequence: DrivenSequence,
        settings: AnimationSettings,
        output_dir: Path,
        audio: AudioTrack | None,
    ) -> None:
        self.settings = settings
        self.output_dir = output_dir
        self.splats = local_splats(avatar)
        self.alpha_video: VideoWriter | None = None
        self.ply: AnimationPlyWriter | None = None
        for folder, wanted in (("frames", settings.png_frames), ("depth", settings.depth)):
            _clear_frames(output_dir / folder)
            if wanted:
                (output_dir / folder).mkdir(exist_ok=True)
        for name in {"renders.mov", "exported_animation.ply", "avatar_frame0.ply"}:
            if name not in _written(settings):
                (output_dir / name).unlink(missing_ok=True)
        if settings.transparent:
            self.alpha_video = files.enter_context(
                VideoWriter(
                    output_dir / "renders.mov", sequence.fps, codec="prores4444", audio=audio
                )
            )
        if settings.export_ply:
            self.ply = files.enter_context(
                AnimationPlyWriter(
                    output_dir / "exported_animation.ply",
                    self.splats,
                    avatar.grid_faces.cpu().numpy(),
                    num_vertices=int(avatar.uv_resolution) ** 2,
                    num_frames=sequence.num_frames,
                    compress=settings.compress_ply,
                    parity=settings.parity,
                )
            )

    def write(self, batch: RenderedBatch, opaque: np.ndarray[Any, Any]) -> None:
        if self.alpha_video:
            for frame in straight_rgba(batch.image, batch.alpha).cpu().numpy():
                self.alpha_video.write(frame)
        if self.ply:
            for vertices in batch.posed.vertices.cpu().numpy():
                self.ply.write(vertices)
        if batch.first == 0 and self.settings.export_splats:
            write_splat_ply(
                self.output_dir / "avatar_frame0.ply",
                world_splats(batch.posed, self.splats),
                comment=SYNTHETIC_NOTICE,
            )
        if self.settings.png_frames:
            for i, frame in enumerate(opaque, start=batch.first):
                write_image(self.output_dir / "frames" / f"{i:05d}.png", frame)
        if batch.depth is not None:
            depth = depth_to_millimetres(batch.depth[..., 0], self.settings.parity).cpu().numpy()
            for i, frame in enumerate(depth, start=batch.first):
                with atomic_path(self.output_dir / "depth" / f"{i:05d}.png") as temporary:
                    Image.fromarray(frame.astype(np.uint16)).save(temporary)


def local_splats(avatar: GaussianAvatar) -> BoundSplats:
    """The avatar's splats in the frames of their faces."""

    def array(tensor: Tensor) -> np.ndarray[Any, Any]:
        return tensor.detach().cpu().numpy()

    splats = avatar.splats
    count = len(splats.binding)
    return BoundSplats(
        xyz=array(splats.xyz),
        features_dc=array(splats.f_dc).reshape(count, 3),
        features_rest=array(splats.f_rest).reshape(count, -1, 3),
        opacity=array(splats.opacity).reshape(count),
        log_scales=array(splats.scaling),
        rotations=array(splats.rotation),
        binding=array(splats.binding).astype(np.int64),
    )


@torch.no_grad()
def world_splats(posed: PosedGaussians, local: BoundSplats) -> BoundSplats:
    """Splats of the first posed frame in head-fixed OpenCV axes, metres."""
    scales = posed.scales[0].clamp(min=1e-12)
    return BoundSplats(
        xyz=posed.means[0].cpu().numpy(),
        features_dc=local.features_dc,
        features_rest=local.features_rest,
        opacity=local.opacity,
        log_scales=scales.log().cpu().numpy(),
        rotations=torch.nn.functional.normalize(posed.quats[0], dim=-1).cpu().numpy(),
        binding=local.binding,
    )


def _written(settings: AnimationSettings) -> list[str]:
    wanted = {
        "renders.mp4": True,
        "renders.mov": settings.transparent,
        "exported_animation.ply": settings.export_ply,
        "avatar_frame0.ply": settings.export_splats,
        "frames": settings.png_frames,
        "depth": settings.depth,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def _clear_frames(folder: Path) -> None:
    """Removes numbered pictures of an earlier, perhaps longer run."""
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if re.fullmatch(r"\d{5,}\.png", file.name):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
