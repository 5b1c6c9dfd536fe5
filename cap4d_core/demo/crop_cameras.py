"""The pipeline's square head crops of demo subjects, batched on a device.

Conventions: boxes and intrinsics as in `cap4d_core.geometry.crops`, of which this is the batched
form: same numbers, no copy to the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cap4d_core.demo.head import build_demo_head, head_vertex_ids
from cap4d_core.demo.rendering import SubjectRenderer, Views, exact_products, turned
from cap4d_core.geometry.crops import CROP_SCALE


@torch.no_grad()
def crop_boxes(renderer: SubjectRenderer, views: Views) -> Tensor:
    """Crop boxes (T,4) int64 x0, y0, x1, y1 of uncropped views, from the projected head vertices.

    Args:
        renderer: of the subject.
        views: poses and the cameras of the uncropped pictures.
    """
    views = views.part(0, len(views.expr), renderer.device)
    head = renderer.head_model
    with exact_products(renderer.device):
        posed = head(
            renderer.shape, views.expr, views.rot, views.tra, eye_rot=views.eye_rot
        ).vertices
    ids = torch.as_tensor(head_vertex_ids(build_demo_head()), device=renderer.device)
    p = posed[:, ids].double() * posed.new_tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    extr = views.extr.double()
    p = turned(p, extr[:, :3, :3]) + extr[:, None, :3, 3]
    focal = torch.stack([views.fx, views.fy], -1).double()[:, None]
    centre = torch.stack([views.cx, views.cy], -1).double()[:, None]
    xy = p[..., :2] / p[..., 2:] * focal + centre
    # Truncated towards zero, also for negative coordinates: see `crop_box_from_points`.
    low, high = xy.amin(1).long(), xy.amax(1).long()
    middle = torch.div(low + high, 2, rounding_mode="floor")
    half = torch.div((high - low).amax(1), 2, rounding_mode="floor").double() * CROP_SCALE
    half = half.long()[:, None]
    return torch.cat([middle - half, middle + half], -1)


def cropped(views: Views, boxes: Tensor, size: int) -> Views:
    """The same views seen by their crops' own cameras.

    Args:
        views: T views with the cameras of the uncropped pictures.
        boxes: (T,4) from `crop_boxes`.
        size: side of the crops in pixels.
    """
    box = boxes.double()
    factor = size / (box[:, 2] - box[:, 0])
    fx, fy, cx, cy = (v.to(boxes.device).double() for v in (views.fx, views.fy, views.cx, views.cy))
    return Views(
        expr=views.expr,
        eye_rot=views.eye_rot,
        rot=views.rot,
        tra=views.tra,
        extr=views.extr,
        fx=(fx * factor).float(),
        fy=(fy * factor).float(),
        cx=((cx - box[:, 0]) * factor).float(),
        cy=((cy - box[:, 1]) * factor).float(),
        neck_rot=views.neck_rot,
    )
