"""Per-frame inputs of the diffusion model: crops, masks, rays and projected head meshes.

The released weights were trained with these exact conventions, half-pixel slips included:
pixel edges are whole numbers for the mesh, but rays start at whole pixel indices.

Conventions: boxes (x0, y0, x1, y1) in whole pixels of the original image; extr world-to-camera,
OpenCV axes; images RGB, (H, W, 3); sizes (height, width).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cap4d_core.errors import InputFileError
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.images import read_grey, read_rgb
from cap4d_core.files.tracking import Reference, TrackedSubject
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.cameras import project_each
from cap4d_core.geometry.crops import Box, crop, crop_box_from_points, pixels_to_ndc, resize

logger = logging.getLogger(__name__)

# Head meshes evaluated at once: about 10 MB each.
MESH_BATCH = 32
_NO_BOX: Box = (0, 0, 1, 1)


def composite_over_white(image: NDArray[np.uint8], matte: NDArray[Any] | None) -> NDArray[Any]:
    """Image over white in float64, 0..255.

    Args:
        image: (H, W, 3).
        matte: (H, W) or (H, W, 3), 255 = foreground; None = everything is.
    """
    if matte is None:
        return image.astype(np.float64)
    alpha = matte / 255.0
    if alpha.ndim == 2:
        alpha = alpha[..., None]
    return image * alpha + 255.0 * (1.0 - alpha)


def crop_and_normalise(image: NDArray[Any], box: Box, size: int) -> NDArray[np.float32]:
    """Crop of a 0..255 image, white outside, resampled to (size, size, 3), in -1..1.

    There is no rounding to bytes on the way.
    """
    cropped = resize(crop(image, box, 255), size)
    return np.asarray(cropped / 127.5 - 1.0, np.float32)


def crop_mask(resolution: tuple[int, int], box: Box, size: int) -> NDArray[np.uint8]:
    """(size, size) 1 where a crop shows the image, 0 where it leaves it.

    Resampled as bytes, so that values are rounded to 0 or 1: the weights know no soft edge.
    """
    if box[0] >= 0 and box[1] >= 0 and box[2] <= resolution[1] and box[3] <= resolution[0]:
        return np.ones((size, size), np.uint8)
    return np.asarray(resize(crop(np.ones(resolution, np.uint8), box, 0), size))


def read_reference_image(reference: Reference, box: Box, size: int) -> NDArray[np.float32]:
    """Normalised crop (size, size, 3) of a reference frame, background white.

    Raises:
        InputFileError: unreadable, or image and matte differ in size.
    """
    image = read_rgb(reference.image)
    matte = None
    if reference.matte is None:
        logger.warning(
            "%s has no matte (no bg/%s folder): the background must be white.",
            reference.image,
            reference.camera,
        )
    else:
        matte = read_grey(reference.matte)
        if matte.shape != image.shape[:2]:
            raise InputFileError(
                reference.matte,
                f"a matte of {matte.shape[1]} x {matte.shape[0]} pixels",
                f"{image.shape[1]} x {image.shape[0]} as {reference.image}",
            )
    return crop_and_normalise(composite_over_white(image, matte), box, size)


def ray_maps(views: Sequence[ViewParameters], size: int, frame_extr: NDArray[Any]) -> Tensor:
    """Viewing directions of crops, in the axes of one common camera.

    Pixel (u, v) of the crop counts as the position (u, v), without half a pixel.

    Args:
        views: cameras and crop boxes.
        size: side of the map.
        frame_extr: (4, 4) world-to-camera of that common camera.

    Returns:
        (n, 3, size, size) float64 unit vectors on the CPU.
    """
    maps = []
    index = np.arange(size, dtype=np.float64)
    for view in views:
        x0, y0, x1, _ = view.crop_box
        scale = size / (x1 - x0)
        x = (index - (view.cx - x0) * scale) / (view.fx * scale)
        y = (index - (view.cy - y0) * scale) / (view.fy * scale)
        camera = np.stack([*np.meshgrid(x, y), np.ones((size, size))])
        camera /= np.linalg.norm(camera, axis=0) + 1e-8
        to_frame = np.asarray(frame_extr, np.float64)[:3, :3] @ np.linalg.inv(
            np.asarray(view.extr, np.float64)[:3, :3]
        )
        maps.append(np.einsum("ij,jhw->ihw", to_frame, camera))
    return torch.from_numpy(np.stack(maps))


def head_in_pixels(head: HeadModel, views: Sequence[ViewParameters]) -> tuple[Tensor, Tensor]:
    """Head meshes as the cameras of `views` see them; each view has its own pose and camera.

    Returns:
        pixels (n, V, 3): u, v, and a depth that only orders; offsets (n, V, 3): expression, gaze
        and pose correctives in metres, head space. float32 on the device of `head`.
    """
    device = head.faces.device

    def stacked(name: str) -> Tensor:
        values = np.stack([np.asarray(getattr(view, name), np.float32) for view in views])
        return torch.from_numpy(values).to(device)

    shapes = {view.shape.tobytes() for view in views}
    if len(shapes) != 1:
        raise ValueError("views of different heads in one batch")
    shape = torch.as_tensor(np.asarray(views[0].shape, np.float32), device=device)
    with torch.no_grad():
        output = head(
            shape, stacked("expr"), stacked("rot"), stacked("tra"), eye_rot=stacked("eye_rot")
        )
        camera = {name: stacked(name) for name in ("fx", "fy", "cx", "cy", "extr")}
        return project_each(output.vertices, **camera), output.offsets


def head_in_crops(head: HeadModel, views: Sequence[ViewParameters]) -> tuple[Tensor, Tensor]:
    """As `head_in_pixels`, with x, y in the rasterizer's coordinates of each view's crop box."""
    pixels, offsets = head_in_pixels(head, views)
    boxes = torch.tensor([view.crop_box for view in views], dtype=pixels.dtype)
    x0, y0, x1, y1 = boxes.to(pixels.device)[:, None].unbind(-1)
    return pixels_to_ndc(pixels, (x0, y0, x1, y1)), offsets


def with_crop_boxes(
    head: HeadModel, views: Sequence[ViewParameters], head_vertex_ids: NDArray[Any] | Tensor
) -> list[ViewParameters]:
    """The views with the box around their head vertices.

    Raises:
        ValueError: a head so small or so broken that its box is empty.
    """
    ids = torch.as_tensor(np.asarray(head_vertex_ids, np.int64))
    result = []
    for first in range(0, len(views), MESH_BATCH):
        batch = views[first : first + MESH_BATCH]
        pixels = head_in_pixels(head, batch)[0].cpu()[:, ids].numpy()
        for view, points in zip(batch, pixels, strict=True):
            box = crop_box_from_points(points)
            if box[2] <= box[0]:
                raise ValueError(f"the projected head covers no pixel: box {box}")
            result.append(replace(view, crop_box=box))
    return result


def reference_views(
    subject: TrackedSubject, head: HeadModel, head_vertex_ids: NDArray[Any] | Tensor
) -> list[ViewParameters]:
    """Parameters of the reference frames, in the listed order, with crop boxes.

    Neck and jaw rotations of the fit are not used, as in the released model.

    Raises:
        InputFileError: a fit that puts a head outside every picture.
    """
    fit = subject.tracking
    views = []
    for reference in subject.references:
        c, t = reference.camera_index, reference.timestep
        height, width = fit.resolutions[c].tolist()
        views.append(
            ViewParameters(
                shape=fit.shape,
                expr=fit.expr[t],
                rot=fit.rot[t],
                tra=fit.tra[t],
                eye_rot=fit.eye_rot[t],
                fx=float(fit.fx[c, 0]),
                fy=float(fit.fy[c, 0]),
                cx=float(fit.cx[c, 0]),
                cy=float(fit.cy[c, 0]),
                extr=fit.extr[c],
                resolution=(height, width),
                crop_box=_NO_BOX,
                timestep_id=t,
            )
        )
    try:
        return with_crop_boxes(head, views, head_vertex_ids)
    except ValueError as error:
        raise InputFileError(
            subject.folder / "fit.npz",
            f"a fit that does not project ({error})",
            "heads in front of their cameras",
            "Check the tracking (overlay pictures).",
        ) from None
