"""Pictures of a demo subject: RGB and an exact soft matte, batched over views, CPU or CUDA.

Conventions: the head's frame is +y up, +z out of the face, metres; `rot`, `tra` place it; cameras
are OpenCV world-to-camera matrices (y, z of the world negated) with intrinsics in pixels, pixel (0,
0) spans [0, 1)^2. Light is fixed to the head (see `subject`). Shading is linear RGB, converted to
sRGB at the end.

Every pixel is the mean of supersample^2 samples. The matte is the covered share of a pixel, the
colour the mean over covered samples, so `rgb * matte + background * (1 - matte)` is exactly the
supersampled picture.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cap4d_core.demo import anatomy, attachments, head, topology
from cap4d_core.demo.subject import Subject
from cap4d_core.flame.model import HeadModel
from cap4d_core.geometry.mesh_rasterizer import RasterizerBackend, rasterize
from cap4d_core.geometry.rotations import rodrigues

# Rows: skin, eye, hair, tooth, flesh, cloth, frame, metal. Columns: specular strength, exponent,
# wrap of red, green, blue.
MATERIALS = torch.tensor(
    [
        [0.16, 18.0, 0.34, 0.22, 0.17],
        [0.95, 140.0, 0.30, 0.30, 0.30],
        [0.10, 16.0, 0.40, 0.40, 0.40],
        [0.35, 40.0, 0.40, 0.36, 0.32],
        [0.30, 24.0, 0.35, 0.22, 0.18],
        [0.02, 8.0, 0.30, 0.30, 0.30],
        [0.45, 60.0, 0.30, 0.30, 0.30],
        [1.20, 40.0, 0.35, 0.35, 0.35],
    ]
)
_INSIDE = torch.tensor(
    [0.020, 0.006, 0.005]
)  # what is seen between the teeth: the back side of skin


@dataclass(frozen=True)
class Views:
    """T poses, each with its camera.

    expr (T,65); eye_rot, rot, tra and optional neck_rot (T,3); extr (T,4,4); fx, fy, cx, cy (T,).
    """

    expr: Tensor
    eye_rot: Tensor
    rot: Tensor
    tra: Tensor
    extr: Tensor
    fx: Tensor
    fy: Tensor
    cx: Tensor
    cy: Tensor
    neck_rot: Tensor | None = None

    def part(self, start: int, stop: int, device: torch.device) -> Views:
        """Views start..stop as float32 on a device."""

        def cut(x: Tensor) -> Tensor:
            return x[start:stop].to(device, torch.float32)

        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return Views(**{name: cut(x) for name, x in present.items() if x is not None})


@dataclass(frozen=True)
class Rendering:
    """Pictures: rgb (T,H,W,3) sRGB in 0..1, white where empty; matte (T,H,W) in 0..1.

    depth (T,H,W): metres along the optical axis, 0 where empty.
    """

    rgb: Tensor
    matte: Tensor
    depth: Tensor


@dataclass(frozen=True)
class _Part:
    """An attachment: vertices (N,3) at rest to be carried by the skin, or (1,N,3) in place."""

    vertices: Tensor
    binding: Tensor | None
    weights: Tensor | None
    on_jaw: Tensor | None


@dataclass(frozen=True)
class _SharedHead:
    """What all subjects have in common, on one device."""

    model: HeadModel
    rest: Tensor
    jaw_regressor: Tensor
    jaw_joint: Tensor
    corner_uv: Tensor
    materials: Tensor
    eye_sets: tuple[Tensor, Tensor]
    flip: Tensor  # +y up, +z out of the face to OpenCV's axes
    inside: Tensor


@lru_cache(maxsize=4)
def _shared_head(num_shape: int, device: torch.device) -> _SharedHead:
    h = head.build_demo_head()
    arrays = {k: np.asarray(v) for k, v in h.model.items() if not isinstance(v, str)}
    model = HeadModel(arrays, h.faces, h.blink, None, num_shape=num_shape, num_expr=65, mouth=False)
    to = partial(_tensor, device)
    # Eyeball vertices: the side they are on, for the shade of the lids.
    index = np.arange(len(h.rest))
    left = index < topology.NUM_SKIN + topology.NUM_EYE
    eye = index >= topology.NUM_SKIN
    return _SharedHead(
        model.to(device),
        to(h.rest),
        to(h.jaw_regressor),
        to(h.joints[2]),
        to(h.corner_uv),
        MATERIALS.to(device),
        (to(np.where(eye & left)[0], torch.int64), to(np.where(eye & ~left)[0], torch.int64)),
        to([1.0, -1.0, -1.0]),
        _INSIDE.to(device),
    )


def _tensor(device: torch.device, a: object, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(a), dtype=dtype, device=device)


class SubjectRenderer:
    """Holds one subject on a device and renders it.

    Args:
        subject: who.
        device: where to compute.
        backend: of the rasterizer.
    """

    def __init__(
        self,
        subject: Subject,
        device: str | torch.device = "cpu",
        backend: RasterizerBackend = "auto",
    ) -> None:
        self.subject = subject
        self.device = torch.device(device)
        self.backend = backend
        h = head.build_demo_head()
        self._shared = _shared_head(len(subject.shape), self.device)
        self.head_model = self._shared.model
        to = partial(_tensor, self.device)
        self.shape = to(subject.shape)
        self.texture = to(subject.texture).permute(2, 0, 1)[None]
        num = len(h.rest)
        faces, materials, colors = [h.faces], [np.zeros(num)], [np.ones((num, 3))]
        materials[0][topology.NUM_SKIN :] = attachments.EYE
        for part in subject.attachments:
            faces.append(part.faces + num)
            num += len(part.vertices)
            materials.append(np.full(len(part.vertices), part.material))
            colors.append(part.colors)
        self.faces = to(np.concatenate(faces), torch.int64)
        self.num_textured = len(h.faces)
        vertex_material = np.concatenate(materials).astype(np.int64)
        self.face_material = to(vertex_material[np.concatenate(faces)[:, 0]], torch.int64)
        self.colors = to(np.concatenate(colors))
        self._parts = [self._place(part) for part in subject.attachments]
        light = subject.traits.lighting
        self.lights = [(to(light.key), to(light.key_color)), (to(light.fill), to(light.fill_color))]
        self.sky, self.ground = to(light.sky), to(light.ground)

    @torch.no_grad()
    def _place(self, part: attachments.Attachment) -> _Part:
        """An attachment on this subject's head at rest, or what is needed to move it."""
        to = partial(_tensor, self.device)
        vertices, weights = to(part.vertices), to(part.weights)
        binding = to(part.binding, torch.int64)
        on_jaw = to(part.on_jaw, torch.bool) if part.on_jaw.any() else None
        if part.follows:
            return _Part(vertices, binding, weights, on_jaw)
        zero = torch.zeros(1, 3, device=self.device)
        still = self.head_model(self.shape, zero.new_zeros(1, 65), zero, zero).vertices
        return _Part(self._carried(vertices, binding, weights, still), None, None, on_jaw)

    def _carried(
        self, vertices: Tensor, binding: Tensor, weights: Tensor, target: Tensor
    ) -> Tensor:
        change = ((target - self._shared.rest)[:, binding] * weights[None, :, :, None]).sum(2)
        return vertices + change

    def geometry(self, expr: Tensor, eye_rot: Tensor, neck_rot: Tensor | None = None) -> Tensor:
        """All vertices (T,N,3) in the head's frame: head model first, then the attachments."""
        zero = torch.zeros(len(expr), 3, device=self.device)
        posed = self.head_model(
            self.shape, expr, zero, zero, eye_rot=eye_rot, neck_rot=neck_rot
        ).vertices
        out = [posed]
        jaw, joint = rodrigues(expr @ self._shared.jaw_regressor), self._shared.jaw_joint
        for part in self._parts:
            v = part.vertices
            if part.binding is not None and part.weights is not None:
                v = self._carried(v, part.binding, part.weights, posed)
            v = v.expand(len(expr), -1, -1)
            if part.on_jaw is not None:
                v = torch.where(part.on_jaw[None, :, None], turned(v - joint, jaw) + joint, v)
            out.append(v)
        return torch.cat(out, 1)

    def _normals(self, v: Tensor) -> Tensor:
        a, b, c = (v[:, self.faces[:, k]] for k in range(3))
        n = torch.linalg.cross(b - a, c - a)
        out = torch.zeros_like(v)
        for k in range(3):
            out.index_add_(1, self.faces[:, k], n)
        return functional.normalize(out, dim=-1, eps=1e-12)

    def _lid_shade(self, v: Tensor) -> Tensor:
        """(T,N) darkening of the eyeballs below the lids' edges."""
        shade = torch.ones(v.shape[:2], device=v.device)
        r = 1e-3 * anatomy.EYE_RADIUS
        for ids in self._shared.eye_sets:
            p = v[:, ids]
            centre = p.mean(1, keepdim=True)
            q = (p - centre) / r
            top = torch.sigmoid((0.40 - 0.30 * q[..., 0] ** 2 - q[..., 1]) / 0.075)
            sides = torch.sigmoid((0.86 - q[..., 0].abs()) / 0.07)
            bottom = torch.sigmoid((q[..., 1] + 0.50) / 0.10)
            shade[:, ids] = 0.30 + 0.70 * top * (0.5 + 0.5 * sides) * (0.65 + 0.35 * bottom)
        return shade

    @torch.no_grad()
    def render(
        self, views: Views, size: tuple[int, int], *, supersample: int = 2, batch: int = 16
    ) -> Rendering:
        """Render T views.

        Args:
            views: poses and cameras.
            size: (height, width).
            supersample: samples per pixel and axis.
            batch: views held in memory at once.
        """
        done = []
        with exact_products(self.device):
            for i in range(0, len(views.expr), batch):
                done.append(self._render(views.part(i, i + batch, self.device), size, supersample))
        return Rendering(*(torch.cat([d[k] for d in done]) for k in range(3)))

    def _render(
        self, views: Views, size: tuple[int, int], ss: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        expr, rot, tra, extr = views.expr, views.rot, views.tra, views.extr
        fx, fy, cx, cy = views.fx, views.fy, views.cx, views.cy
        height, width = size[0] * ss, size[1] * ss
        v = self.geometry(expr, views.eye_rot, views.neck_rot)
        turn = rodrigues(rot)
        flip = self._shared.flip
        world = (turned(v, turn) + tra[:, None]) * flip
        cam = turned(world, extr[:, :3, :3]) + extr[:, None, :3, 3]
        z = cam[..., 2]
        px = cam[..., 0] / z * fx[:, None] + cx[:, None]
        py = cam[..., 1] / z * fy[:, None] + cy[:, None]
        short = min(size)
        ndc = torch.stack([(size[1] - 2 * px) / short, (size[0] - 2 * py) / short, z], -1)
        fragments = rasterize(
            ndc,
            self.faces,
            (height, width),
            perspective=True,
            cull_backfaces=False,
            backend=self.backend,
        )
        view, row, col = torch.where(fragments.face_index >= 0)
        face = fragments.face_index[view, row, col]
        bary = fragments.barycentrics[view, row, col]
        corner = self.faces[face]
        normals, shade = self._normals(v), self._lid_shade(v)

        def interpolate(values: Tensor) -> Tensor:
            """(T,N,C) or (N,C) vertex values at the covered samples."""
            picked = values[view[:, None], corner] if values.ndim == 3 else values[corner]
            return (picked * bary[..., None]).sum(1)

        normal = functional.normalize(interpolate(normals), dim=-1, eps=1e-9)
        point = interpolate(v)
        # The camera in the head's frame.
        centre = -(extr[:, :3, :3].transpose(1, 2) @ extr[:, :3, 3:])[..., 0] * flip
        eye_point = ((centre - tra)[:, None] @ turn)[:, 0]
        to_eye = functional.normalize(eye_point[view] - point, dim=-1)
        facing = (normal * to_eye).sum(-1)
        material = self.face_material[face]
        # Only a back side turned to the camera counts as inside: grazing interpolated normals do
        # not.
        a, b, c = (v[view, corner[:, k]] for k in range(3))
        flat = torch.linalg.cross(b - a, c - a)
        back = (flat * to_eye).sum(-1) < 0
        inside = back & (material == attachments.SKIN)
        two_sided = back & (material != attachments.SKIN) & (material != attachments.EYE)
        normal = torch.where((two_sided & (facing < 0))[:, None], -normal, normal)

        albedo = interpolate(self.colors)
        textured = torch.nonzero(face < self.num_textured).squeeze(1)
        uv = (self._shared.corner_uv[face[textured]] * bary[textured][..., None]).sum(1)
        grid = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], -1)
        sampled = functional.grid_sample(
            self.texture, grid[None, None], mode="bilinear", align_corners=False
        )
        albedo[textured] = sampled[0, :, 0].T
        color = self._shade(albedo, normal, to_eye, material)
        color = color * interpolate(shade[..., None])
        color = torch.where(inside[:, None], self._shared.inside, color)
        rgb = _srgb(color)

        t = len(expr)
        samples = torch.zeros(t, height, width, 5, device=v.device)
        samples[view, row, col, :3] = rgb
        samples[view, row, col, 3] = 1.0
        samples[view, row, col, 4] = fragments.depth[view, row, col]
        mean = samples.reshape(t, size[0], ss, size[1], ss, 5).mean((2, 4))
        matte = mean[..., 3]
        safe = matte.clamp(min=1e-6)
        full = torch.where(
            matte[..., None] > 0, mean[..., :3] / safe[..., None], torch.ones_like(mean[..., :3])
        )
        return full, matte, mean[..., 4] / safe

    def _shade(self, albedo: Tensor, normal: Tensor, to_eye: Tensor, material: Tensor) -> Tensor:
        m = self._shared.materials[material]
        strength, exponent, wrap = m[:, 0:1], m[:, 1:2], m[:, 2:5]
        up = 0.5 + 0.5 * normal[:, 1:2]
        color = albedo * (self.sky * up + self.ground * (1 - up))
        facing = (normal * to_eye).sum(-1, keepdim=True).clamp(0, 1)
        fresnel = 0.35 + 0.65 * (1 - facing) ** 3
        for direction, light in self.lights:
            cosine = (normal @ direction)[:, None]
            diffuse = ((cosine + wrap) / (1 + wrap)).clamp(min=0)
            half = functional.normalize(to_eye + direction, dim=-1)
            gloss = (normal * half).sum(-1, keepdim=True).clamp(min=0) ** exponent
            lit = (cosine > -0.1).to(color)
            color = color + light * (albedo * diffuse + strength * fresnel * gloss * lit)
        return color


def turned(points: Tensor, rotation: Tensor) -> Tensor:
    """Points (T,N,3) turned by (T,3,3); written out, since trainers allow TF32 in products."""
    x, y, z = points.unbind(-1)
    rows = [r[:, 0, None] * x + r[:, 1, None] * y + r[:, 2, None] * z for r in rotation.unbind(1)]
    return torch.stack(rows, -1)


def exact_products(device: torch.device) -> torch.autocast:
    """A context in which geometry keeps float32 inside somebody else's autocast."""
    return torch.autocast(device.type, enabled=False)


def _srgb(x: Tensor) -> Tensor:
    """Linear to sRGB with a soft shoulder, so that highlights do not clip."""
    x = torch.where(x > 0.7, 0.7 + 0.3 * torch.tanh((x - 0.7) / 0.3), x).clamp(0, 1)
    return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp(min=1e-8) ** (1 / 2.4) - 0.055)
