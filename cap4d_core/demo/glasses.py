"""Glasses: two rims, a bridge, nose pads and temples as tubes, fitted to one subject's head.

Conventions: millimetres while building, in the frame of the subject's own head at rest (identity
applied). The frame is rigid: it is bound to the bridge of the nose as one piece and does not follow
expressions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import anatomy, attachments, fields
from cap4d_core.demo.head import DemoHead

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_SIDES = 8  # of a tube
_RIM_POINTS = 56


@dataclass(frozen=True)
class GlassesStyle:
    """A frame; lengths in mm.

    width, height: of a lens opening. square: exponent of its superellipse (2 round, 4 boxy). lift:
    how much the outer upper corner is pulled up. taper: how much narrower the lower half is.
    thickness: radius of the rim's tube. metal: thin and shiny. half_rim: only the upper half.
    feminine: not for everybody.
    """

    name: str
    width: float
    height: float
    square: float
    lift: float = 0.0
    taper: float = 0.0
    thickness: float = 1.9
    metal: bool = False
    half_rim: bool = False
    feminine: bool = False

    def suits(self, masculinity: float) -> bool:
        """Whether somebody of this masculinity (0..1) wears it."""
        return masculinity < 0.5 if self.feminine else True


STYLES: dict[str, GlassesStyle] = {
    s.name: s
    for s in (
        GlassesStyle("round", 45.0, 43.0, 2.0, thickness=1.2, metal=True),
        GlassesStyle("round_thick", 46.0, 43.0, 2.2, thickness=2.2),
        GlassesStyle("rectangle", 51.0, 32.0, 4.5, thickness=1.8),
        GlassesStyle("wayfarer", 51.0, 40.0, 3.4, lift=3.0, taper=0.14, thickness=2.5),
        GlassesStyle(
            "cat_eye", 51.0, 37.0, 2.8, lift=6.5, taper=0.16, thickness=2.1, feminine=True
        ),
        GlassesStyle("aviator", 55.0, 46.0, 2.5, taper=0.22, thickness=1.1, metal=True),
        GlassesStyle("slim", 49.0, 28.0, 3.6, thickness=1.1, metal=True),
        GlassesStyle("half_rim", 51.0, 33.0, 4.0, thickness=1.8, half_rim=True),
        GlassesStyle("oversized", 56.0, 50.0, 2.8, thickness=2.0),
    )
}
# sRGB colours of plastic and metal frames.
PLASTIC = ("#17161a", "#3a2316", "#5b3a1f", "#1f2c46", "#6b1f2a", "#a8794a", "#8a8f94", "#3f4d3a")
METAL = ("#b08d4c", "#9a9ca0", "#2a2a2d", "#b5806a")


def _tube(
    path: Array, radius: float | Array, closed: bool, flat: float = 1.0
) -> tuple[Array, Ints]:
    """A tube (N,3) along points (K,3); flat < 1 makes it thinner along z, > 1 deeper."""
    k = len(path)
    around = np.roll(path, -1, 0) - np.roll(path, 1, 0)
    tangent = around if closed else np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    # Rims lie across z, temples run along it: a reference that is parallel to neither.
    depth = np.array([0.0, 0.35, 1.0]) if closed else np.array([0.0, 1.0, 0.2])
    u = np.cross(tangent, depth)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    w = np.cross(u, tangent)
    angle = 2 * np.pi * np.arange(_SIDES) / _SIDES
    r = np.broadcast_to(np.asarray(radius, float), (k,))[:, None, None]
    ring = np.cos(angle)[:, None] * u[:, None] + flat * np.sin(angle)[:, None] * w[:, None]
    v = (path[:, None] + r * ring).reshape(-1, 3)
    faces = attachments.grid_faces(k + (1 if closed else 0), _SIDES, True)
    return v, faces % (k * _SIDES) if closed else faces


def _rim(style: GlassesStyle) -> Array:
    """Outline (K,2) of the lens opening at the subject's left, counter-clockwise from outside."""
    t = 2 * np.pi * np.arange(_RIM_POINTS) / _RIM_POINTS
    c, s = np.cos(t), np.sin(t)
    r = (np.abs(c) ** style.square + np.abs(s) ** style.square) ** (-1 / style.square)
    x, y = 0.5 * style.width * r * c, 0.5 * style.height * r * s
    low = np.clip(-y / style.height, 0, 1)
    # The lower half narrows from the nose's side, where the cheek of the nose is.
    x = x * (1 - 2 * style.taper * low)
    y = y + style.lift * np.clip(x / style.width + 0.1, 0, 1) * np.clip(
        0.5 + y / style.height, 0, 1
    )
    return np.stack([x, y], -1)


def build_glasses(
    style: GlassesStyle, color: Array, head: DemoHead, shaped: Array
) -> attachments.Attachment:
    """One subject's glasses.

    Args:
        style: of the frame.
        color: (3,) linear albedo.
        head: the head model.
        shaped: (V,3) metres, the subject's head at rest.
    """
    p = 1e3 * shaped
    pts = head.points
    skin = pts.skin
    eye = [p[~skin & (np.sign(pts.x) == side)].mean(0) for side in (1.0, -1.0)]
    distance = 0.5 * (eye[0][0] - eye[1][0])
    eye_y, eye_z = 0.5 * (eye[0][1] + eye[1][1]), 0.5 * (eye[0][2] + eye[1][2])
    near = skin & (np.abs(pts.x) < 78) & (pts.y > -60) & (pts.y < 75) & (pts.z > -60)
    q = p[near]
    gap = max(2 * distance - style.width - 2 * style.thickness, 13.0)
    centre_x = 0.5 * (gap + style.width) + style.thickness
    centre_y = eye_y - 0.07 * style.height

    outline = _rim(style)
    x, y = centre_x + outline[:, 0], centre_y + outline[:, 1]
    # The front is curved a little, and stands clear of brows, lashes and cheeks.
    bend = 0.0022 * x**2

    def clearance(px: Array, py: Array, reach: float) -> Array:
        """Depth of the skin that stands out most around points, as seen from in front."""
        front = q[q[:, 2] > 0]
        d = np.hypot(np.abs(front[:, 0]) - px[:, None], front[:, 1] - py[:, None])
        out: Array = np.where(d < reach, front[:, 2], -1e3).max(1)
        return out

    stand = np.max(clearance(x, y, 4.5) + bend) + 2.2 + style.thickness
    plane = max(stand, eye_z + anatomy.EYE_RADIUS + 7.0)
    plane = min(plane, eye_z + anatomy.EYE_RADIUS + 15.0)
    z = plane - bend
    rim = np.stack([x, y, z], -1)
    pieces: list[tuple[Array, Ints]] = []
    flip = np.array([-1.0, 1.0, 1.0])

    def add(path: Array, radius: float | Array, closed: bool, flat: float, mirror: bool) -> None:
        v, f = _tube(path, radius, closed, flat)
        pieces.append((v, f))
        if mirror:
            pieces.append((v * flip, f[:, ::-1]))

    thick = style.thickness
    if style.half_rim:
        upper = np.roll(np.arange(_RIM_POINTS), 4)[: _RIM_POINTS // 2 + 8]
        add(rim[upper], thick, False, 1.0, True)
        lower = np.roll(np.arange(_RIM_POINTS), -(_RIM_POINTS // 2 + 3))[: _RIM_POINTS // 2 - 6]
        add(rim[lower], 0.55, False, 1.0, True)
    else:
        add(rim, thick, True, 1.1, True)
    # Bridge: an arch between the rims' inner sides.
    inner = rim[np.argmin(np.where(y > centre_y, x - 0.25 * (y - centre_y), 1e3))]
    t = np.linspace(-1, 1, 11)
    arch = np.stack([t * inner[0], inner[1] + 2.5 * (1 - t**2), inner[2] + 1.6 * (1 - t**2)], -1)
    add(arch, thick * (0.9 if style.metal else 1.15), False, 1.0, False)
    # Nose pads reach back to the sides of the nose.
    pad = np.stack(
        [
            np.linspace(inner[0] + 1.5, max(inner[0] - 1.5, 7.0), 4),
            np.linspace(centre_y - 4.0, centre_y - 8.0, 4),
            np.linspace(inner[2] - 0.5, inner[2] - 7.0, 4),
        ],
        -1,
    )
    add(pad, np.array([0.8, 1.0, 2.0, 1.2]), False, 1.0, True)
    # Temples: from the rim's outer upper end along the head, over the ear, down behind it.
    hinge = rim[np.argmax(x + 0.35 * (y - centre_y))]
    ear = p[skin & (np.abs(pts.x) > 66) & (np.abs(pts.z + 42) < 22) & (np.abs(pts.y - 3) < 34)]
    ear_top = ear[:, 1].max()
    ear_z = ear[:, 2].max() - 12.0
    root = ear_top - 7.0
    end = np.array([[root, ear_z], [root - 3.0, ear_z - 12.0], [root - 24.0, ear_z - 22.0]])
    yz = np.concatenate([[[hinge[1], hinge[2] - 1.5]], [[hinge[1], hinge[2] - 7.0]], end])
    s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(yz, axis=0), axis=1))])
    at = np.linspace(0, s[-1], 26)
    ty, tz = np.interp(at, s, yz[:, 0]), np.interp(at, s, yz[:, 1])
    side = q[np.abs(q[:, 0]) > 40]
    d = np.hypot(side[:, 1] - ty[:, None], side[:, 2] - tz[:, None])
    # Ears stand out: temples pass between them and the skull, so only what is in front counts.
    width = np.where((d < 7.0) & (side[:, 2] > ear_z + 14.0), np.abs(side[:, 0]), 0.0).max(1)
    outer = max(hinge[0] + 1.5, float(width.max()) + 1.5)
    fold = fields.smoothstep(hinge[2] - tz, 0.0, 15.0)
    tx = hinge[0] * (1 - fold) + outer * fold
    behind = np.clip((ear_z + 10.0 - tz) / 30.0, 0, 1)
    tx = tx * (1 - behind) + (0.94 * outer) * behind
    arm = np.stack([tx, ty, tz], -1)
    add(arm, 0.9 if style.metal else np.linspace(2.0, 1.5, 26), False, 1.0, True)

    vertices, faces, num = [], [], 0
    for v, f in pieces:
        vertices.append(v)
        faces.append(f + num)
        num += len(v)
    v = 1e-3 * np.concatenate(vertices)
    # Bound to the bridge of the nose, whose change by identity is taken out again.
    bridge = int(np.argmin(((pts.p - np.array([0.0, 20.0, 58.0])) ** 2).sum(1) + 1e3 * ~skin))
    v = v - (shaped[bridge] - head.rest[bridge])
    return attachments.Attachment(
        v,
        np.concatenate(faces),
        np.tile(color, (len(v), 1)),
        attachments.METAL if style.metal else attachments.FRAME,
        np.full((len(v), 3), bridge),
        np.full((len(v), 3), 1 / 3),
        False,
        np.zeros(len(v), bool),
    )
