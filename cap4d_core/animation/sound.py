"""The sound that belongs to a driving sequence: which file, and where its first frame is in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cap4d_core.animation.video import AudioTrack, audio_codec_of
from cap4d_core.files.tracking import Tracking

logger = logging.getLogger(__name__)


def driving_sound(
    video: str | Path, tracking: Tracking, quality: Mapping[str, Any]
) -> AudioTrack | None:
    """The sound of a driving video, from the first frame of the fit on.

    Args:
        video: the video, or the folder that it is in.
        tracking: fit of the driving sequence; its rate turns frames into seconds.
        quality: content of the sequence's quality.json. Tracked videos say `start_s` (and the
            `video_file` of a folder); imported fits say `start_frame`, and their frame 0 is taken
            for the beginning of the video.

    Returns:
        None, with a line in the log, where times are not known or the video is silent.

    Raises:
        InputFileError: the video is missing or cannot be read.
    """
    video = Path(video)
    if video.is_dir():
        if "video_file" not in quality:
            logger.info("%s: pictures without sound", video)
            return None
        video = video / str(quality["video_file"])
    if not tracking.fps:
        logger.warning("%s: no sound, because the driving fit does not say its frame rate", video)
        return None
    if "start_s" in quality:
        start_s = float(quality["start_s"])
    elif "start_frame" in quality:
        start_s = int(quality["start_frame"]) / tracking.fps
    else:
        logger.warning("%s: no sound, because the time of the first frame is not known", video)
        return None
    if audio_codec_of(video) is None:
        logger.info("%s: a silent video", video)
        return None
    logger.info("sound of %s from %.3f s", video, start_s)
    return AudioTrack(video, start_s)
