"""A family of procedural people: everything about one of them follows from a number.

A `Subject` holds head-model coefficients, a painted atlas, meshes for hair, mouth and clothing, and
its lighting.
The lights are fixed to the head, not to the room: a head that turns before a still camera looks
exactly like a camera that goes round a still head, which is what spherical-harmonic colours of a
head-fixed avatar can represent.

New traits are new draws at the END of `draw_traits` and new attachments in `make_subject`; draws
come from a generator of their own per trait, so that adding one changes no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo import (
    attachments,
    clothing,
    facial_hair,
    glasses,
    hair,
    head,
    identity_basis,
    jewellery,
    skin_paint,
)

Array = NDArray[np.float64]

NUM_SHAPE = 150
# sRGB skin tones from light to dark.
_SKIN = [
    "#f3d0bb",
    "#ecc2a4",
    "#e3b394",
    "#d8a27e",
    "#c98d66",
    "#b0744d",
    "#8f5a3a",
    "#6f4329",
    "#553220",
]
_HAIR = {
    "black": "#17130f",
    "dark_brown": "#2b1d14",
    "brown": "#45301f",
    "chestnut": "#5a3520",
    "auburn": "#7a3a1e",
    "ginger": "#a9592a",
    "dark_blond": "#86683f",
    "blond": "#bf9a5f",
    "platinum": "#dcc9a0",
    "grey": "#8d8a86",
    "white": "#cfccc6",
}
_IRIS = {
    "dark_brown": "#3a2214",
    "brown": "#5a361d",
    "hazel": "#6d5730",
    "green": "#56703f",
    "blue": "#4f7fa8",
    "grey": "#70828c",
    "light_blue": "#82aac4",
}
_SHIRT = [
    "#27364f",
    "#7d2f35",
    "#3f5d45",
    "#d8d2c5",
    "#2c2c2e",
    "#56708c",
    "#b98b4a",
    "#6a4a6e",
    "#8f9aa3",
    "#c96f4a",
    "#e4e2de",
    "#3b6f73",
]


def linear(hex_color: str) -> Array:
    """An sRGB hex colour as linear RGB."""
    s = np.array([int(hex_color[i : i + 2], 16) for i in (1, 3, 5)]) / 255.0
    out: Array = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    return out


@dataclass(frozen=True)
class Lighting:
    """Head-fixed lights; directions point towards the light, colours are linear RGB.

    key, fill: (3,) unit directions with key_color, fill_color; ambient from above (sky) and below
    (ground).
    """

    key: Array
    key_color: Array
    fill: Array
    fill_color: Array
    sky: Array
    ground: Array


@dataclass(frozen=True)
class Traits:
    """What one number means, before any mesh or picture is made."""

    seed: int
    masculinity: float
    shape: Array
    face: skin_paint.Face
    hair_style: hair.HairStyle | None
    hair_color: Array
    shirt: Array
    neckline: float
    tooth: Array
    gum: Array
    lighting: Lighting
    garment: clothing.Garment
    glasses: glasses.GlassesStyle | None
    frame: Array
    earrings: jewellery.Earrings | None


@dataclass(frozen=True)
class Subject:
    """One person, ready to be rendered.

    Attributes:
        traits: what was drawn.
        shape: (150,) identity coefficients.
        texture: (S,S,3) linear albedo in the avatar atlas.
        attachments: mouth interior, hair, clothing.
    """

    traits: Traits
    shape: Array
    texture: NDArray[np.float32]
    attachments: tuple[attachments.Attachment, ...]


def _rng(seed: int, trait: str) -> np.random.Generator:
    """An independent generator per subject and trait."""
    return np.random.default_rng([seed, *trait.encode()])


def _shape(seed: int, m: float) -> Array:
    rng = _rng(seed, "shape")
    out = np.zeros(NUM_SHAPE)
    named = len(identity_basis.SHAPE_UNITS)
    out[:named] = np.clip(rng.standard_normal(named), -1.9, 1.9) * 0.85
    out[named:] = 0.8 * rng.standard_normal(NUM_SHAPE - named)
    lean = 2 * m - 1
    for name, gain in {
        "jaw_width": 0.8,
        "brow_ridge": 0.8,
        "chin_width": 0.5,
        "chin_length": 0.4,
        "neck_width": 1.1,
        "nose_width": 0.5,
        "face_width": 0.15,
        "size": 0.5,
        "nose_length": 0.35,
        "jaw_angle": 0.35,
        "bridge_height": 0.3,
        "upper_lip": -0.6,
        "lower_lip": -0.55,
        "eye_size": -0.5,
        "brow_height": -0.7,
        "cheekbones": -0.35,
        "forehead_slope": 0.3,
        "cheek_fullness": -0.1,
        "tip_up": -0.3,
    }.items():
        out[identity_basis.SHAPE_UNITS.index(name)] += gain * lean
    # Features that read as a defect rather than as a trait stay small.
    for name, limit in {
        "eye_distance": 1.2,
        "eye_height": 1.0,
        "mouth_height": 1.0,
        "neck_width": 1.6,
        "nose_length": 1.5,
    }.items():
        k = identity_basis.SHAPE_UNITS.index(name)
        out[k] = np.clip(out[k], -limit, limit)
    return out


def draw_traits(seed: int) -> Traits:
    """Everything that can be said about subject `seed`, drawn trait by trait."""
    r = _rng(seed, "person")
    m = float(np.clip(r.beta(0.7, 0.7), 0.02, 0.98))
    tone = float(r.uniform(0, len(_SKIN) - 1))
    i = int(tone)
    low, high = linear(_SKIN[i]), linear(_SKIN[min(i + 1, len(_SKIN) - 1)])
    skin = low * (1 - (tone - i)) + high * (tone - i)
    skin = skin * (1 + 0.05 * r.standard_normal(3) * np.array([0.4, 0.5, 0.9]))
    depth = tone / (len(_SKIN) - 1)
    age = float(r.beta(1.3, 2.2))

    r = _rng(seed, "hair")
    names = list(_HAIR)
    weight = np.array([2.2, 2.2, 1.8, 1.0, 0.8, 0.8, 1.0, 1.2, 0.5, 0.0, 0.0])
    weight = weight * np.where(
        np.arange(len(names)) < 3, 1.0, max(0.0, 1.0 - 1.9 * max(depth - 0.25, 0))
    )
    weight[-2:] = np.array([1.4, 0.7]) * max(age - 0.35, 0) * 4
    color_name = names[int(r.choice(len(names), p=weight / weight.sum()))]
    hair_color = linear(_HAIR[color_name]) * (1 + 0.12 * r.standard_normal())
    male = (
        "buzz",
        "short",
        "side_part",
        "slick",
        "quiff",
        "receding",
        "curly_short",
        "crop_fringe",
        None,
    )
    either = ("curly_short", "curly_full", "bob", "long_back", "bun", "crop_fringe", "short")
    female = ("bob", "bob_fringe", "long", "long_side", "long_back", "wavy", "bun", "curly_full")
    pool = male if m > 0.62 else female if m < 0.38 else either
    choice = pool[int(r.integers(len(pool)))]
    style = None if choice is None else hair.STYLES[choice]

    r = _rng(seed, "eyes")
    irises = list(_IRIS)
    w = np.array([1.2, 1.2, 0.9, 0.8, 1.1, 0.6, 0.6])
    w = w * np.where(np.arange(len(irises)) < 2, 1.0, max(0.03, 1.0 - 2.2 * max(depth - 0.15, 0)))
    iris = linear(_IRIS[irises[int(r.choice(len(irises), p=w / w.sum()))]]) * float(
        r.uniform(0.85, 1.25)
    )

    r = _rng(seed, "face")
    natural = skin * np.array([0.78, 0.44, 0.42]) + np.array([0.03, 0.0, 0.006])
    made_up = m < 0.42 and r.uniform() < 0.55
    lipstick = linear(["#b2404c", "#a33a3a", "#c2606a", "#8f2f45", "#cc7a72"][int(r.integers(5))])
    lips = (
        natural * (1 + 0.08 * r.standard_normal())
        if not made_up
        else 0.35 * natural + 0.65 * lipstick
    )
    brow = (
        hair_color * 0.42 + np.array([0.012, 0.008, 0.006])
        if color_name not in ("white", "platinum")
        else hair_color * 0.42
    )
    beard, beard_color = _beard(_rng(seed, "chin"), m, age, color_name, hair_color)
    face = skin_paint.Face(
        skin=skin,
        blush=float(r.uniform(0.35, 1.1) * (1 - 0.5 * depth)),
        lips=np.clip(lips, 0.01, 0.9),
        lip_strength=0.85 if made_up else 0.72,
        iris=iris,
        iris_rim=iris * 0.25,
        brow=np.clip(brow, 0.008, 0.6),
        brow_density=float(np.clip(0.80 + 0.12 * r.standard_normal() + 0.10 * m, 0.55, 0.97)),
        brow_thickness=float(np.clip(0.82 + 0.36 * m + 0.12 * r.standard_normal(), 0.6, 1.4)),
        brow_arch=float(np.clip(0.75 - 0.35 * m + 0.25 * r.standard_normal(), 0.1, 1.3)),
        brow_height=float(np.clip(0.8 * r.standard_normal() - 0.8 * (m - 0.5), -1.6, 1.8)),
        stubble=float(r.choice([0.0, 0.15, 0.35, 0.7], p=[0.3, 0.3, 0.25, 0.15]))
        if m > 0.6
        else 0.0,
        freckles=float(r.uniform(0.3, 0.8)) if r.uniform() < 0.22 and depth < 0.5 else 0.0,
        lashes=float(np.clip(0.95 - 0.35 * m, 0.5, 0.95)),
        shadow=skin * np.array([0.60, 0.50, 0.55]) * float(r.uniform(0.7, 1.1)),
        shadow_strength=float(r.uniform(0.3, 0.6)) if made_up else 0.12,
        age=age,
        scalp=None if style is None else (0.62 * hair_color + 0.25 * skin),
        hair_style=style,
        beard=beard,
        beard_color=beard_color,
    )
    r = _rng(seed, "clothes")
    shirt = linear(_SHIRT[int(r.integers(len(_SHIRT)))]) * float(r.uniform(0.8, 1.15))
    neckline = float(r.uniform(0.0, 14.0))
    tooth = np.array([0.80, 0.76, 0.66]) * float(r.uniform(0.9, 1.05))
    spectacles, frame = _glasses(_rng(seed, "frame"), m, age)
    return Traits(
        seed,
        m,
        _shape(seed, m),
        face,
        style,
        np.clip(hair_color, 0.006, 0.85),
        np.clip(shirt, 0.01, 0.85),
        neckline,
        tooth,
        np.array([0.44, 0.17, 0.16]),
        _lighting(_rng(seed, "light")),
        _garment(_rng(seed, "garment"), shirt),
        spectacles,
        frame,
        _earrings(_rng(seed, "earrings"), m),
    )


def _beard(
    rng: np.random.Generator, m: float, age: float, color_name: str, hair_color: Array
) -> tuple[facial_hair.BeardStyle | None, Array]:
    """A third of the masculine half has a beard or a moustache."""
    grown = rng.uniform() < 0.36
    names = list(facial_hair.STYLES)
    style = facial_hair.STYLES[names[int(rng.choice(len(names), p=facial_hair.SHARES))]]
    color = hair_color * rng.uniform(0.75, 1.1)
    if color_name in ("blond", "dark_blond", "brown", "chestnut") and rng.uniform() < 0.35:
        color = 0.5 * color + 0.5 * linear(_HAIR["ginger"])
    if age > 0.5 and rng.uniform() < 0.4:
        color = 0.35 * color + 0.65 * linear(_HAIR["grey"])
    return (style if grown and m > 0.62 else None), np.clip(color, 0.006, 0.85)


def _glasses(
    rng: np.random.Generator, m: float, age: float
) -> tuple[glasses.GlassesStyle | None, Array]:
    worn = rng.uniform() < 0.15 + 0.12 * age
    weight = np.array([1.0 if s.suits(m) else 0.0 for s in glasses.STYLES.values()])
    names = list(glasses.STYLES)
    style = glasses.STYLES[names[int(rng.choice(len(names), p=weight / weight.sum()))]]
    colors = glasses.METAL if style.metal else glasses.PLASTIC
    # Dark frames are the most common.
    k = min(int(rng.exponential(0.3) * len(colors)), len(colors) - 1)
    return (style if worn else None), linear(colors[k]) * rng.uniform(0.8, 1.2)


def _garment(rng: np.random.Generator, shirt: Array) -> clothing.Garment:
    kind = str(rng.choice(clothing.KINDS, p=[0.36, 0.15, 0.24, 0.11, 0.14]))
    pattern = str(rng.choice(clothing.PATTERNS, p=[0.62, 0.18, 0.10, 0.10]))
    second = linear(_SHIRT[int(rng.integers(len(_SHIRT)))]) * rng.uniform(0.8, 1.15)
    if np.abs(second - shirt).max() < 0.15:  # must be seen
        second = 0.25 * shirt if shirt.mean() > 0.3 else 0.3 * shirt + 0.6
    if kind in ("turtleneck", "hoodie") and pattern == "checks":
        pattern = "plain"
    return clothing.Garment(kind, pattern, np.clip(second, 0.01, 0.85), rng.uniform(13.0, 26.0))


def _earrings(rng: np.random.Generator, m: float) -> jewellery.Earrings | None:
    worn = rng.uniform() < (0.40 if m < 0.4 else 0.15 if m < 0.62 else 0.05)
    kind = str(rng.choice(jewellery.KINDS))
    color = linear(str(rng.choice(jewellery.COLORS)))
    return jewellery.Earrings(kind, color, float(rng.uniform(0.8, 1.3))) if worn else None


def _lighting(rng: np.random.Generator) -> Lighting:
    """Soft studio light from the front, a little different for everybody."""
    side = float(rng.choice([-1.0, 1.0]))
    key = np.array([side * rng.uniform(0.20, 0.60), rng.uniform(0.45, 0.75), 1.0])
    fill = np.array([-side * rng.uniform(0.7, 1.1), rng.uniform(0.0, 0.3), 0.75])
    warm = rng.uniform(-0.04, 0.06)
    return Lighting(
        key / np.linalg.norm(key),
        rng.uniform(0.92, 1.10) * np.array([1.0 + warm, 1.0, 1.0 - warm]),
        fill / np.linalg.norm(fill),
        rng.uniform(0.20, 0.34) * np.array([1.0 - warm, 1.0, 1.0 + warm]),
        rng.uniform(0.34, 0.44) * np.array([0.98, 1.0, 1.04]),
        rng.uniform(0.20, 0.27) * np.array([1.06, 1.0, 0.94]),
    )


@lru_cache(maxsize=4)
def make_subject(seed: int, texture_size: int = 512) -> Subject:
    """Build subject number `seed`; the head model is built once per process."""
    traits = draw_traits(seed)
    h = head.build_demo_head()
    skin = h.rest[h.points.skin]
    texture = skin_paint.paint(
        traits.face, texture_size, _rng(seed, "paint"), _rng(seed, "beard_roots")
    )
    rim = np.where(h.points.lip_ring == 0)[0]
    p = h.points.p[rim]
    ids = np.array(
        [rim[np.argmin(np.abs(p[:, 0]))], rim[np.argmax(p[:, 0])], rim[np.argmin(p[:, 0])]]
    )
    parts = attachments.mouth_interior(skin, ids, traits.tooth, traits.gum)
    weave = _rng(seed, "weave")
    parts += clothing.wear(traits.garment, traits.shirt, traits.neckline, skin, weave)
    if traits.hair_style is not None:
        parts.append(
            hair.build_hair(traits.hair_style, traits.hair_color, skin, _rng(seed, "strands"))
        )
    face = traits.face
    if face.beard is not None and face.beard_color is not None:
        strands = _rng(seed, "beard_strands")
        parts.append(facial_hair.build_beard(face.beard, face.beard_color, face.skin, strands))
    if traits.glasses is not None or traits.earrings is not None:
        shaped = head.shaped(h, traits.shape)
        if traits.glasses is not None:
            parts.append(glasses.build_glasses(traits.glasses, traits.frame, h, shaped))
        if traits.earrings is not None:
            parts.append(jewellery.build_earrings(traits.earrings, h, shaped))
    return Subject(traits, traits.shape, texture, tuple(parts))
