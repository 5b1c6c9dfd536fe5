"""Pictures and film of a fit: the head mesh and the landmarks drawn over the input."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from cap4d_core.files.images import write_image
from cap4d_core.tracking.landmark_topology import CONTOURS, NUM_MESH_POINTS
from cap4d_core.tracking.overlay import contact_sheet, draw_box, draw_head, fit_scale, shrink
from cap4d_core.tracking.quality import ProjectedHead

Key = tuple[int, int]

_FILM_SIDE, _TILE_SIDE, _MAX_TILES = 640, 384, 24
_LINE, _POINT, _IRIS = (0.25, 0.95, 0.45), (0.15, 0.75, 0.35), (0.95, 0.35, 0.2)
_MESH_OPACITY = 0.45


class OverlayWriter:
    """Writes `overlay.png` (chosen frames) and, with a frame rate, `overlay.mp4` (all frames).

    Both appear when the context ends without an exception.
    """

    def __init__(
        self,
        folder: Path,
        fps: float | None,
        faces: NDArray[np.int64],
        places: dict[Key, int] | None,
    ) -> None:
        """Prepares the files.

        Args:
            folder: where to write.
            fps: frame rate of the film, None for photos.
            faces: triangles of the head.
            places: frames of overlay.png by (camera, timestep) and their order; None = frames
                spread over the film.
        """
        self._folder, self._fps, self._faces, self._places = folder, fps, faces, places
        self._tiles: dict[int, NDArray[np.floating]] = {}
        self._spread: list[NDArray[np.floating]] = []
        self._every, self._count = 1, 0
        self._film: Any = None
        self._stream: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        self._temporary = folder / f"overlay.tmp-{os.getpid()}.mp4"

    def __enter__(self) -> OverlayWriter:
        return self

    def add(
        self,
        key: Key,
        image: NDArray[np.uint8],
        head: ProjectedHead | None,
        landmarks: NDArray[np.float64] | None,
    ) -> None:
        """Adds a frame; without head the picture stays as it is.

        Args:
            key: (camera, timestep).
            image: (H, W, 3).
            head: projected head, or None.
            landmarks: (478, 3) pixels, or None.
        """
        size = (image.shape[0], image.shape[1])
        if self._fps is not None and key[0] == 0:
            scale = fit_scale(size, _FILM_SIDE)
            self._add_to_film(self._draw(image, head, landmarks, scale))
        if self._places is not None:
            place = self._places.get(key, _MAX_TILES)
            if place < _MAX_TILES:
                scale = fit_scale(size, _TILE_SIDE)
                tile = self._draw(image, head, landmarks, scale)
                if head is not None and head.box is not None:
                    tile = draw_box(tile, head.box, scale)
                self._tiles[place] = tile
        elif head is not None and self._count % self._every == 0:
            tile = self._draw(image, head, landmarks, fit_scale(size, _TILE_SIDE))
            self._spread.append(tile)
            if len(self._spread) > _MAX_TILES:
                # Keep them spread over however many frames come.
                self._spread = self._spread[::2]
                self._every *= 2
        self._count += 1

    def _draw(
        self,
        image: NDArray[np.uint8],
        head: ProjectedHead | None,
        landmarks: NDArray[np.float64] | None,
        scale: float,
    ) -> NDArray[np.floating]:
        picture: NDArray[np.floating] = shrink(image, scale)
        if head is not None:
            picture = draw_head(picture, head, self._faces, scale, _MESH_OPACITY)
        if landmarks is not None:
            picture = draw_landmarks(picture, landmarks, scale)
        return picture

    def _add_to_film(self, picture: NDArray[np.floating]) -> None:
        height, width = (side - side % 2 for side in picture.shape[:2])
        frame = np.rint(np.clip(picture[:height, :width], 0, 1) * 255).astype(np.uint8)
        if self._film is None:
            assert self._fps is not None  # add() asks
            self._film = av.open(str(self._temporary), "w")
            rate = Fraction(self._fps).limit_denominator(1001)
            self._stream = self._film.add_stream("libx264", rate=rate)
            self._stream.width, self._stream.height = width, height
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"crf": "23", "preset": "veryfast"}
        video_frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
        for packet in self._stream.encode(video_frame):
            self._film.mux(packet)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._film is not None:
            if kind is None:
                for packet in self._stream.encode():
                    self._film.mux(packet)
            self._film.close()
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        if self._film is not None:
            os.replace(self._temporary, self._folder / "overlay.mp4")
        tiles = [self._tiles[i] for i in sorted(self._tiles)] or self._spread
        if tiles:
            write_image(self._folder / "overlay.png", contact_sheet(tiles, columns=4))


def draw_landmarks(
    picture: NDArray[np.floating], landmarks: NDArray[np.float64], scale: float
) -> NDArray[np.floating]:
    """Contours as lines, mesh points and irises as dots, over a picture in 0..1."""
    canvas = np.ascontiguousarray(picture, np.float32)
    # Four fractional bits keep sub-pixel places in OpenCV's drawing.
    points = np.rint((landmarks[:, :2] * scale - 0.5) * 16).astype(int)
    for edges in CONTOURS.values():
        for first, second in edges:
            ends = points[first].tolist(), points[second].tolist()
            cv2.line(canvas, ends[0], ends[1], _LINE, 1, cv2.LINE_AA, 4)
    for x, y in points[:NUM_MESH_POINTS:2].tolist():
        cv2.circle(canvas, (x, y), 8, _POINT, -1, cv2.LINE_AA, 4)
    for x, y in points[[468, 473]].tolist():
        cv2.circle(canvas, (x, y), 28, _IRIS, -1, cv2.LINE_AA, 4)
    return canvas
