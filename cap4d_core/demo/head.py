"""The demo head model: built in memory, written in the layout of a FLAME download.

Conventions: metres, +y up, +z out of the face, +x towards the subject's left. Array shapes, names
and file formats are FLAME's and its usual companions'; every number is made here, from `anatomy`,
`topology`, `fields` and `atlas`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import (
    anatomy,
    atlas,
    expression_basis,
    expressions,
    eyeball,
    face_controls,
    fields,
    identity_basis,
    pose_basis,
    topology,
)
from cap4d_core.files.basic import atomic_path, write_npz

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

SEED = 20260101
HEAD_LOWEST = -0.118  # vertices above this height count as head (crop boxes, conditioning)
_EYE_JOINTS = (3, 4)


@dataclass(frozen=True)
class DemoHead:
    """The head model and what the demo's painters need to know about it.

    Attributes:
        model: content of the pickle, see `write_demo_head`.
        rest: (5023,3) metres, the head as seen at rest (template plus the constant corrective
            offset).
        faces: (F,3).
        corner_uv: (F,3,2) atlas coordinates of `faces`.
        eye_disc: (2*546 vertices' faces,3,2) unit-disc coordinates of the eyeball faces, left then
            right.
        blink: (5023,3) metres.
        jaw_regressor: (65,3).
        joints: (5,3) metres at rest.
        points: the vertices with their tags (mm).
        visibility: (5023,) ambient visibility at rest, 0..1.
    """

    model: dict[str, NDArray[np.generic] | str]
    rest: Array
    faces: Ints
    corner_uv: Array
    eye_disc: Array
    blink: Array
    jaw_regressor: Array
    joints: Array
    points: fields.Points
    visibility: Array


@lru_cache(maxsize=1)
def build_demo_head() -> DemoHead:
    """Build the head model (deterministic, a few seconds, cached in the process)."""
    skin = topology.build_skin()
    left, left_faces, disc = eyeball.build_eye(1.0)
    right, right_faces, _ = eyeball.build_eye(-1.0)
    pts = fields.gather(skin, np.concatenate([left, right]))
    n_skin, n_eye = topology.NUM_SKIN, topology.NUM_EYE
    faces = np.concatenate([skin.faces, left_faces + n_skin, right_faces + n_skin + n_eye])
    uv = np.concatenate(
        [
            atlas.place_skin(atlas.skin_uv(skin)),
            atlas.place_disc(disc, "eye_left"),
            atlas.place_disc(disc, "eye_right"),
        ]
    )
    shape = 1e-3 * identity_basis.shape_basis(pts, SEED + 1)
    expr = 1e-3 * expression_basis.expression_basis(pts, SEED + 2)
    pose = 1e-3 * pose_basis.pose_basis(pts, SEED + 3)
    rest = 1e-3 * pts.p
    # The pose correctives see R - 2 I, so a constant -sum of their diagonals is always there; the
    # template
    # carries its opposite and the head at rest is the sculpted one.
    offset = -pose.reshape(4, 3, 3, len(rest), 3)[:, [0, 1, 2], [0, 1, 2]].sum((0, 1))
    blink = 1e-3 * (
        face_controls.lid_motion(pts, 1.0, 1.0, 1.0) + face_controls.lid_motion(pts, -1.0, 1.0, 1.0)
    )
    regressor = pose_basis.joint_regressor(pts)
    joints = 1e-3 * pose_basis.JOINTS
    template = rest - offset
    model: dict[str, NDArray[np.generic] | str] = {
        "v_template": template,
        "f": faces.astype(np.uint32),
        "shapedirs": np.concatenate([shape, expr]).transpose(1, 2, 0).astype(np.float32),
        "posedirs": pose.transpose(1, 2, 0).astype(np.float32),
        "J_regressor": regressor,
        "weights": pose_basis.skin_weights(pts),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], [0, 1, 2, 3, 4]], dtype=np.int64),
        "bs_type": "lrotmin",
        "bs_style": "lbs",
    }
    jaw = np.zeros((expressions.NUM_EXPRESSION, 3))
    jaw[expressions.index_of("jaw_open"), 0] = expression_basis.JAW_ANGLE_PER_UNIT
    jaw[expressions.index_of("jaw_left"), 1] = 0.055
    normal = vertex_normals(pts.p, faces)
    visibility = np.ones(len(rest))
    visibility[:n_skin] = anatomy.occlusion(pts.p[:n_skin], normal[:n_skin])
    return DemoHead(model, rest, faces, uv, disc, blink, jaw, joints, pts, visibility)


def vertex_normals(v: Array, faces: Ints) -> Array:
    """Unit normals (V,3) of a mesh, weighted by the areas of its triangles."""
    n = np.cross(v[faces[:, 1]] - v[faces[:, 0]], v[faces[:, 2]] - v[faces[:, 0]])
    out = np.zeros_like(v)
    for k in range(3):
        np.add.at(out, faces[:, k], n)
    unit: Array = out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
    return unit


def shaped(head: DemoHead, shape: Array) -> Array:
    """The head at rest (5023,3) of an identity (S,), metres."""
    out = head.rest.copy()
    basis = np.asarray(head.model["shapedirs"])
    for k in np.flatnonzero(shape):
        out += shape[k] * basis[:, :, k]
    return out


def write_demo_head(folder: str | Path) -> Path:
    """Write the demo head model as if it had been downloaded.

    Below `folder`: `data/assets/flame/` with `flame2023_no_jaw.pkl` (pickle protocol 2, plain
    arrays), `cap4d_flame_template.obj` (5223 vertices), `cap4d_avatar_template.obj` (5423),
    `head_vertices.txt`, `deformable_verts.txt`, `blink_blendshape.npy`, `jaw_regressor.npy`,
    `flowface_vertex_weights.npy`, `flowface_vertex_mask.npy`; and
    `data/assets/datasets/gen_data.npz` (1000 expressions and gazes).

    Args:
        folder: root to write below; existing files are replaced.

    Returns:
        `folder` as a path.
    """
    head = build_demo_head()
    root = Path(folder)
    flame = root / "data" / "assets" / "flame"
    flame.mkdir(parents=True, exist_ok=True)
    with atomic_path(flame / "flame2023_no_jaw.pkl") as path, open(path, "wb") as handle:
        pickle.dump(head.model, handle, protocol=2)

    template = np.asarray(head.model["v_template"], dtype=np.float64)
    jaw = head.joints[2]
    lip = template[topology.LOWER_LIP_VERTEX]
    upper, mouth_faces, mouth_disc = atlas.mouth_half_sphere(lip, jaw)
    lower, _, _ = atlas.mouth_half_sphere(lip, jaw, pitch=0.16)
    n, m = topology.NUM_VERTICES, atlas.NUM_MOUTH
    upper_uv = atlas.place_disc(mouth_disc, "mouth_upper")
    lower_uv = atlas.place_disc(mouth_disc, "mouth_lower")
    with atomic_path(flame / "cap4d_flame_template.obj") as path:
        atlas.write_obj(
            path,
            np.concatenate([template, upper]),
            np.concatenate([head.faces, mouth_faces + n]),
            np.concatenate([head.corner_uv, upper_uv]),
            "demo_head",
        )
    with atomic_path(flame / "cap4d_avatar_template.obj") as path:
        atlas.write_obj(
            path,
            np.concatenate([template, upper, lower]),
            np.concatenate([head.faces, mouth_faces + n, mouth_faces + n + m]),
            np.concatenate([head.corner_uv, upper_uv, lower_uv]),
            "demo_head_with_lower_jaw",
        )
    for name, ids in (
        ("head_vertices.txt", head_vertex_ids(head)),
        ("deformable_verts.txt", _deformable_ids(head)),
    ):
        with atomic_path(flame / name) as path:
            path.write_text("".join(f"{i}\n" for i in ids.tolist()))
    weights, mask = _fit_weights(head)
    for name, array in (
        ("blink_blendshape.npy", head.blink.astype(np.float32)),
        ("jaw_regressor.npy", head.jaw_regressor.astype(np.float32)),
        ("flowface_vertex_weights.npy", weights),
        ("flowface_vertex_mask.npy", mask),
    ):
        with atomic_path(flame / name) as path:
            np.save(path, array)
    expr, eye = expressions.sample_expressions(1000, np.random.default_rng(SEED + 4))
    write_npz(
        root / "data" / "assets" / "datasets" / "gen_data.npz",
        {"expr": expr.astype(np.float32), "eye_rot": eye.astype(np.float32)},
    )
    return root


def head_vertex_ids(head: DemoHead) -> Ints:
    """Vertices that count as head, without neck and shoulders."""
    return np.where(head.rest[:, 1] > HEAD_LOWEST)[0]


def _deformable_ids(head: DemoHead) -> Ints:
    """All but the neck's lower edge and the nape, plus both mouth parts."""
    p, skin = head.rest, head.points.skin
    still = skin & ((p[:, 1] < -0.150) | ((p[:, 2] < -0.080) & (p[:, 1] < -0.060)))
    n = len(p)
    return np.concatenate([np.where(~still)[0], np.arange(n, n + 2 * atlas.NUM_MOUTH)])


def _fit_weights(head: DemoHead) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Vertex weights of mean 1 that trust the face most, and the mask of its front half."""
    x, y, z = head.points.p.T
    face = fields.smoothstep(z, -10.0, 35.0) * fields.smoothstep(y, -115.0, -85.0)
    face = face * (1 - fields.smoothstep(y, 70.0, 105.0))
    p = np.stack([np.abs(x), y, z], -1)
    detail = fields.bump(p, (31, 22, 44), (20, 14, 30)) + fields.bump(p, (0, -46, 60), (30, 16, 30))
    w = np.exp(3.0 * face + 1.0 * detail)
    w = w / w.mean()
    front = (z > np.median(z)) & (head.rest[:, 1] > HEAD_LOWEST)
    return w.astype(np.float32), front
