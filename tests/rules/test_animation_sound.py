"""Rule animate_avatar, through its script: a driving video with sound gives a video with sound."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cap4d_core.animation.video import AudioTrack, VideoWriter, probe_video
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.files.tracking import Tracking, Trajectory, write_fit, write_trajectory
from cap4d_core.flame.model import HeadModel
from cap4d_core.job import Job
from cap4d_core.settings import AnimationSettings, FittingSettings
from tests.core.synthetic_head import head_folder
from workflow_scripts import animate_avatar

FPS, FRAMES, SIDE = 25.0, 10, 32
ONSET_S = 1.0


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An avatar, a driving sequence, and a video whose tone begins after a second of silence."""
    folder = tmp_path_factory.mktemp("sound")
    settings = FittingSettings(
        uv_resolution=32, deform_net_channels=4, deform_net_layers=3, num_gaussians_init=500
    )
    head = HeadModel.load(head_folder(), lower_jaw=True)
    GaussianAvatar.create(head, torch.zeros(150), settings).save(folder / "avatar")

    zeros = np.zeros((FRAMES, 3), np.float32)
    extr = np.diag([1.0, -1, -1, 1]).astype(np.float32)[None]
    extr[0, 2, 3] = 1.0
    one = np.ones((1, 1), np.float32)
    fit = Tracking(
        shape=np.zeros(150, np.float32), expr=np.zeros((FRAMES, 65), np.float32), rot=zeros,
        tra=zeros, eye_rot=zeros, neck_rot=zeros, fx=60 * one, fy=60 * one, cx=16 * one,
        cy=16 * one, extr=extr, resolutions=np.array([[SIDE, SIDE]]), camera_order=("cam0",),
        fps=FPS,
    )  # fmt: skip
    write_fit(folder / "fit.npz", fit)
    line = np.ones(FRAMES, np.float32)
    path = np.repeat(extr, FRAMES, axis=0)
    camera = Trajectory(path, 60 * line, 60 * line, 16 * line, 16 * line, (SIDE, SIDE), FPS)
    write_trajectory(folder / "trajectory.npz", camera)

    rate = 16_000
    t = np.arange(3 * rate) / rate
    tone = 12_000 * np.sin(2 * np.pi * 440 * t) * (t >= ONSET_S)
    with wave.open(str(folder / "tone.wav"), "wb") as handle:
        handle.setparams((1, 2, rate, 0, "NONE", ""))
        handle.writeframes(tone.astype("<i2").tobytes())
    (folder / "clip").mkdir()
    with VideoWriter(
        folder / "clip" / "talk.mp4", FPS, audio=AudioTrack(folder / "tone.wav")
    ) as writer:
        for _ in range(75):
            writer.write(np.zeros((SIDE, SIDE, 3), np.uint8))
    return folder


def animate(
    project: Path,
    folder: Path,
    quality: dict[str, object],
    video: str = "clip/talk.mp4",
    **more: object,
) -> Path:
    """Runs the script; returns the rendered video."""
    folder.mkdir(exist_ok=True)
    (folder / "quality.json").write_text(json.dumps(quality))
    settings = AnimationSettings(export_ply=False, export_splats=False, **more)  # type: ignore[arg-type]
    inputs = {
        "avatar": [str(project / "avatar" / "avatar.safetensors")],
        "driving": [str(project / "fit.npz")],
        "trajectory": [str(project / "trajectory.npz")],
        "quality": [str(folder / "quality.json")],
        "sound": [str(project / video)] if video else [],
        "head_model": [str(head_folder())],
    }
    outputs = {
        "video": [str(folder / "renders.mp4")], "description": [str(folder / "animation.json")]
    }  # fmt: skip
    params = {"lower_jaw": True, "settings": settings.model_dump(mode="json")}
    animate_avatar.main(Job("animate_avatar", inputs, outputs, params))
    return folder / "renders.mp4"


def loudness(path: Path) -> tuple[float, float]:
    """Root mean square of the first and the last tenth of a second, full scale 1."""
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        rate = container.streams.audio[0].rate
    samples = np.concatenate(parts)[: round(FRAMES / FPS * rate)]
    tenth = rate // 10
    first, last = (np.sqrt(np.mean(part**2)) for part in (samples[:tenth], samples[-tenth:]))
    return float(first), float(last)


@pytest.mark.parametrize(
    ("quality", "video"),
    [
        ({"start_s": 0.8}, "clip/talk.mp4"),  # tracked: says the time
        ({"start_s": 0.8, "video_file": "talk.mp4"}, "clip"),  # a folder with one video
        ({"start_frame": 20}, "clip/talk.mp4"),  # imported: frame 20 of 25 per second
    ],
)
def test_sound_begins_with_the_first_frame(
    project: Path, tmp_path: Path, quality: dict[str, object], video: str
) -> None:
    """0.4 s from 0.8 s: silence, then from its middle on the tone."""
    rendered = animate(project, tmp_path / "out", quality, video)
    info = probe_video(rendered)
    assert info.has_audio and info.num_frames == FRAMES
    first, last = loudness(rendered)
    # A sine of amplitude 12000/32768 has a root mean square of 0.26.
    assert first < 0.02 and last == pytest.approx(0.26, abs=0.03)


def test_later_parts_have_later_sound(project: Path, tmp_path: Path) -> None:
    assert min(loudness(animate(project, tmp_path / "out", {"start_s": 1.5}))) > 0.2


@pytest.mark.parametrize(
    ("quality", "video", "settings"),
    [
        ({"start_s": 0.8}, "", {}),  # not asked for
        ({}, "clip/talk.mp4", {}),  # when the sequence begins is not known
        ({"start_s": 0.8}, "clip/talk.mp4", {"fps": 50.0}),  # would run away from the lips
        ({"start_frame": 0}, "clip", {}),  # a folder of pictures
    ],
)
def test_no_sound_where_it_would_be_wrong(
    project: Path,
    tmp_path: Path,
    quality: dict[str, object],
    video: str,
    settings: dict[str, object],
) -> None:
    rendered = animate(project, tmp_path / "out", quality, video, **settings)
    assert not probe_video(rendered).has_audio
