"""Renderings of a head model's template, which the landmark network is shown.

Conventions: head space, metres (see cap4d_core.flame.model). Vertices 3931.. are the eyeballs. The
camera looks at the middle between the eyes; yaw > 0 turns the face to the right of the picture,
pitch > 0 downwards. Pictures are (512, 512, 3) uint8 RGB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes

from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.mesh_rasterizer import rasterize, screen_to_ndc

Array = NDArray[np.float64]

NUM_SKIN_VERTICES = 3931
EYEBALLS = (slice(4477, 5023), slice(3931, 4477))  # left and right of the picture
PICTURE_SIDE = 512
FOCAL = 3.0  # of the picture side
DISTANCE_M = 1.25
_LIGHT = np.array([0.0, 0.45, 0.9])
_SKIN, _WHITE = (0.85, 0.62, 0.52), (0.93, 0.92, 0.90)
_MOUTH = (0.20, 0.07, 0.07)
_IRIS, _PUPIL = (0.30, 0.20, 0.12), (0.03, 0.03, 0.03)
_JAW_JOINT = 2
# Eyeballs this far behind the lids are misplaced; where they belong instead.
_SUNKEN_M, _LID_THICKNESS_M = 0.008, 0.002


@dataclass(frozen=True)
class TemplateView:
    """A rendering: image, front-most skin face per pixel, barycentrics, facing, vertices."""

    image: NDArray[np.uint8]
    face_index: NDArray[np.int64]
    barycentrics: NDArray[np.float32]
    facing: Array
    vertices: Array
    rotation: Array
    center: Array

    def project(self, points: Array) -> Array:
        """Points of the head to (x, y) in pixels and depth in metres."""
        turned = (points - self.center) @ self.rotation.T
        return _to_screen(turned)


def template_vertices(model: HeadModel) -> Array:
    """(V, 3) vertices of the mean head before pose correctives.

    The constant correctives of a posed head can part its lips and close its lids, the template's
    neutral face cannot be mistaken. Places on the surface are the same.
    """
    with torch.no_grad():
        vertices: Array = model.neutral(torch.zeros(model.num_shape)).double().numpy()
    return vertices


def open_jaw(model: HeadModel, vertices: Array, angle: float) -> Array:
    """Turns the jaw of a template about its joint, by skinning alone."""
    joint = model.joint_template.double().numpy().reshape(-1, 3)[_JAW_JOINT]
    weight = model.skinning_weights[_JAW_JOINT].double().numpy()[:, None]
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    moved = (vertices - joint) @ turn.T + joint
    result: Array = vertices + weight * (moved - vertices)
    return result


def sunken_eyes(vertices: Array) -> Array:
    """(2, 3) shifts that bring eyeballs that lie deep behind the lids up to them, else zero.

    Templates exist whose eyes lie centimetres too deep (the public one with texture coordinates).
    Behind their lids no eye can be seen, and the direction of gaze would come out wrong.
    """
    skin = vertices[:NUM_SKIN_VERTICES]
    shifts = np.zeros((2, 3))
    for number, part in enumerate(EYEBALLS):
        ball = vertices[part]
        center, radius = eyeball_center(ball)
        across = np.linalg.norm((skin - center)[:, :2], axis=1)
        lids = skin[(across < 0.7 * radius) & (skin[:, 2] > center[2])]
        if not len(lids):
            continue
        gap = float(lids[:, 2].max() - ball[:, 2].max())
        if gap > _SUNKEN_M:
            shifts[number, 2] = gap - _LID_THICKNESS_M
    return shifts


def paint(vertices: Array) -> Array:
    """(V, 3) colours: skin, and eyes with iris and pupil, which the network needs to see."""
    colours = np.tile(np.array(_SKIN), (len(vertices), 1))
    for part in EYEBALLS:
        ball = vertices[part]
        center, radius = eyeball_center(ball)
        across = np.linalg.norm((ball - center)[:, :2], axis=1) / radius
        front = ball[:, 2] > center[2]
        paint = np.tile(np.array(_WHITE), (len(ball), 1))
        paint[front & (across < 0.48)] = _IRIS
        paint[front & (across < 0.20)] = _PUPIL
        colours[part] = paint
    return colours


def eyeball_center(ball: Array) -> tuple[Array, float]:
    """Centre and radius of an eyeball's vertices (middle of their extent in x and y)."""
    low, high = ball.min(axis=0), ball.max(axis=0)
    radius = float((high - low)[:2].max() / 2)
    center = (low + high) / 2
    # The cornea bulges to the front: measure from the back.
    center[2] = low[2] + radius
    return center, radius


def render_view(
    vertices: Array, faces: NDArray[np.int64], albedo: Array, yaw: float, pitch: float
) -> TemplateView:
    """Renders the template, turned by yaw, then tilted downwards by pitch (degrees).

    Args:
        vertices: (V, 3).
        faces: (F, 3).
        albedo: (V, 3) of `paint`.
        yaw: turn to the right of the picture.
        pitch: tilt downwards.
    """
    a, b = np.deg2rad(yaw), np.deg2rad(pitch)
    turn_y = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    center = np.mean([vertices[part].mean(axis=0) for part in EYEBALLS], axis=0)
    rotation = turn_x @ turn_y
    turned = (vertices - center) @ rotation.T
    side = PICTURE_SIDE
    screen = torch.from_numpy(_to_screen(turned).astype(np.float32))
    fragments = rasterize(
        screen_to_ndc(screen, (side, side))[None],
        torch.from_numpy(faces),
        (side, side),
        perspective=True,
    )
    index = fragments.face_index[0].numpy()
    weights = fragments.barycentrics[0].numpy()
    corners = turned[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    smooth = np.zeros_like(turned)
    for corner in range(3):
        np.add.at(smooth, faces[:, corner], normals)
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True) + 1e-20
    shade = 0.35 + 0.65 * np.clip(smooth @ (_LIGHT / np.linalg.norm(_LIGHT)), 0, 1)
    colours = albedo * shade[:, None]
    covered = np.asarray(index >= 0, np.bool_)
    image = np.full((side, side, 3), 0.55)
    # Looking through the open mouth, the network must not see a bright background.
    holes = np.asarray(binary_fill_holes(covered), np.bool_) & ~covered
    image[holes] = _MOUTH
    image[covered] = (colours[faces[index[covered]]] * weights[covered][..., None]).sum(1)
    sight = -turned + np.array([0.0, 0.0, DISTANCE_M])
    sight /= np.linalg.norm(sight, axis=1, keepdims=True)
    cosine = (smooth * sight).sum(1)[faces].mean(1)
    skin = faces.max(axis=1) < NUM_SKIN_VERTICES
    only_skin = np.where(covered & skin[index], index, -1)
    facing = np.where(only_skin >= 0, cosine[only_skin], 0.0)
    rgb = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return TemplateView(rgb, only_skin, weights, facing, vertices, rotation, center)


def _to_screen(turned: Array) -> Array:
    depth = DISTANCE_M - turned[:, 2]
    focal = FOCAL * PICTURE_SIDE
    u = focal * turned[:, 0] / depth + PICTURE_SIDE / 2
    v = -focal * turned[:, 1] / depth + PICTURE_SIDE * 0.45
    return np.stack([u, v, depth], axis=-1)
