"""Expression coefficients of the demo head: random everyday faces and a talking sequence.

Coefficients (65): the units of `expression_basis.EXPRESSION_UNITS`, small fields, blink last.
Eye rotations are rotation vectors in radians: +x looks down, +y looks to the subject's left.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cap4d_core.demo.expression_basis import EXPRESSION_UNITS

Array = NDArray[np.float64]

NUM_EXPRESSION = 65
BLINK = NUM_EXPRESSION - 1
UNIT = {name: k for k, name in enumerate(EXPRESSION_UNITS)}

# What a face may do at once: (weight, {unit: (low, high)}).
_MOUTHS: tuple[tuple[float, dict[str, tuple[float, float]]], ...] = (
    (3.0, {}),
    (2.0, {"jaw_open": (0.3, 1.2)}),
    (1.5, {"jaw_open": (1.0, 2.2), "stretch": (0.0, 0.5)}),
    (2.0, {"smile": (0.4, 1.4)}),
    (2.0, {"smile": (0.7, 1.6), "lips_part": (0.6, 1.6), "upper_lip_raise": (0.0, 0.7)}),
    (1.2, {"smile": (0.8, 1.5), "jaw_open": (0.4, 1.2), "upper_lip_raise": (0.2, 0.8)}),
    (1.2, {"pucker": (0.5, 1.5), "jaw_open": (0.0, 0.6)}),
    (1.0, {"frown": (0.4, 1.4), "chin_raise": (0.0, 1.0)}),
    (0.8, {"press": (0.4, 1.2)}),
    (0.8, {"pout": (0.4, 1.3), "frown": (0.0, 0.8)}),
    (0.8, {"stretch": (0.5, 1.5), "lips_part": (0.3, 1.5), "lower_lip_drop": (0.0, 0.8)}),
    (0.6, {"sneer": (0.4, 1.2), "upper_lip_raise": (0.2, 1.0)}),
    (0.6, {"cheek_puff": (0.4, 1.2), "press": (0.0, 0.5)}),
    (0.5, {"cheek_suck": (0.4, 1.2), "pucker": (0.3, 0.8)}),
    (0.7, {"smile_left": (0.5, 1.4)}),
    (0.7, {"smile_right": (0.5, 1.4)}),
    (0.6, {"mouth_left": (-1.2, 1.2)}),
    (0.5, {"jaw_left": (-1.3, 1.3), "jaw_open": (0.1, 0.7)}),
    (0.5, {"jaw_forward": (-0.4, 1.2)}),
)
_BROWS: tuple[tuple[float, dict[str, tuple[float, float]]], ...] = (
    (3.0, {}),
    (1.6, {"brow_raise": (0.3, 1.4)}),
    (1.4, {"brow_lower": (0.3, 1.3)}),
    (0.9, {"brow_inner_raise": (0.4, 1.4)}),
    (0.5, {"brow_raise_left": (0.4, 1.4)}),
    (0.5, {"brow_raise_right": (0.4, 1.4)}),
)
_LIDS: tuple[tuple[float, dict[str, tuple[float, float]]], ...] = (
    (4.0, {}),
    (1.0, {"squint": (0.2, 0.9)}),
    (0.8, {"eyes_wide": (0.2, 0.9)}),
    (1.0, {"blink": (0.15, 0.6)}),
    (1.0, {"blink": (1.0, 1.0)}),
    (0.25, {"blink_left": (0.8, 1.0)}),
    (0.25, {"blink_right": (0.8, 1.0)}),
)


def index_of(name: str) -> int:
    """Column of a unit; 'blink' is the blink shape."""
    return BLINK if name == "blink" else UNIT[name]


def from_units(**units: float) -> Array:
    """Coefficients (65,) from named values."""
    out = np.zeros(NUM_EXPRESSION)
    for name, value in units.items():
        out[index_of(name)] = value
    return out


def sample_expressions(num: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Random everyday faces.

    Returns:
        expr (num,65) and eye_rot (num,3).
    """
    expr = np.zeros((num, NUM_EXPRESSION))
    for row in expr:
        for table in (_MOUTHS, _BROWS, _LIDS):
            p = np.array([w for w, _ in table])
            for name, (low, high) in table[rng.choice(len(table), p=p / p.sum())][1].items():
                row[index_of(name)] = rng.uniform(low, high)
    first = len(EXPRESSION_UNITS)
    expr[:, first:BLINK] = 0.6 * rng.standard_normal((num, BLINK - first))
    eye = rng.standard_normal((num, 3)) * np.array([0.11, 0.20, 0.0])
    limit = np.array([0.30, 0.45, 0.0])
    return expr, np.clip(eye, -limit, limit)


# Mouth shapes of speech.
_VISEMES: dict[str, dict[str, float]] = {
    "rest": {},
    "ah": {"jaw_open": 1.25, "lips_part": 0.3},
    "eh": {"jaw_open": 0.65, "stretch": 0.5, "lips_part": 0.5},
    "ee": {"jaw_open": 0.25, "stretch": 0.9, "smile": 0.35, "lips_part": 0.7},
    "oh": {"jaw_open": 0.85, "pucker": 0.8},
    "oo": {"jaw_open": 0.30, "pucker": 1.4},
    "m": {"press": 0.7},
    "f": {"jaw_open": 0.15, "upper_lip_raise": 0.45, "pout": 0.35},
    "l": {"jaw_open": 0.5, "lips_part": 0.4},
}
_SPEECH = [
    "rest",
    "m",
    "ah",
    "eh",
    "l",
    "oh",
    "rest",
    "f",
    "ee",
    "l",
    "oo",
    "m",
    "ah",
    "rest",
    "eh",
    "m",
    "oh",
    "ee",
    "rest",
    "oo",
    "f",
    "ah",
    "l",
    "rest",
]


def _smooth_keys(times: Array, values: Array, t: Array) -> Array:
    """Piecewise cosine interpolation of keyframes (K,C) at t (T,)."""
    i = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    s = np.clip((t - times[i]) / (times[i + 1] - times[i]), 0, 1)
    s = 0.5 - 0.5 * np.cos(np.pi * s)
    out: Array = values[i] * (1 - s)[:, None] + values[i + 1] * s[:, None]
    return out


def talking(num_frames: int, fps: float, seed: int) -> tuple[Array, Array, Array]:
    """A person who talks, blinks, looks around and turns the head.

    Returns:
        expr (T,65), eye_rot (T,3), rot (T,3) head rotation vectors about the neutral pose.
    """
    rng = np.random.default_rng(seed)
    t = np.arange(num_frames) / fps
    length = max(num_frames / fps, 1.0)
    expr = np.zeros((num_frames, NUM_EXPRESSION))

    step = 0.135
    count = int(np.ceil(length / step)) + 2
    keys = np.stack([from_units(**_VISEMES[_SPEECH[k % len(_SPEECH)]]) for k in range(count)])
    keys *= rng.uniform(0.75, 1.15, (count, 1))
    times = step * (np.arange(count) + np.concatenate([[0.0], rng.uniform(-0.2, 0.2, count - 1)]))
    expr += _smooth_keys(times, keys, t)

    def wave(period: float, phase: float) -> Array:
        return np.sin(2 * np.pi * t / period + phase)

    expr[:, index_of("smile")] += 0.35 * np.clip(wave(1.9, -0.6), 0, 1)
    expr[:, index_of("brow_raise")] += 0.9 * np.clip(wave(1.55, 0.2), 0, 1) ** 2
    expr[:, index_of("brow_lower")] += 0.7 * np.clip(wave(1.9, 2.6), 0, 1) ** 2
    # Blinks: fast down, slower up.
    for start in np.arange(0.45, length + 0.5, 1.05):
        s = t - start
        down, up = np.clip((s + 0.085) / 0.085, 0, 1), np.clip(1 - (s - 0.04) / 0.15, 0, 1)
        expr[:, BLINK] = np.maximum(expr[:, BLINK], np.minimum(down, up))
    # Saccades: the gaze jumps between points and rests there; the eyes also keep contact while the
    # head turns.
    spots = np.array(
        [[0.0, 0.0], [0.02, 0.30], [-0.10, 0.10], [0.16, -0.22], [0.0, -0.30], [-0.06, 0.0]]
    )
    at = np.arange(len(spots) * 4) * 0.42
    jump = np.repeat(at, 2)[1:]
    jump[1::2] = jump[1::2] + 0.06
    gaze = np.repeat(np.tile(spots, (4, 1)), 2, axis=0)[: len(jump)]
    look = _smooth_keys(np.concatenate([[-1.0], jump + 0.25]), np.concatenate([spots[:1], gaze]), t)
    # A steady nod and turn over about two seconds, back where it began.
    yaw = 0.42 * wave(length, 0.0) + 0.05 * wave(0.9, 1.0) - 0.05 * np.sin(1.0)
    pitch = 0.09 * wave(length / 2, 0.4) - 0.09 * np.sin(0.4) + 0.03 * wave(0.6, 0.0)
    roll = 0.05 * wave(length, 1.2) - 0.05 * np.sin(1.2)
    rot = np.stack([pitch, yaw, roll], -1)
    eye = np.stack([look[:, 0] - 0.3 * pitch, look[:, 1] - 0.35 * yaw, 0 * t], -1)
    limit = np.array([0.28, 0.42, 0.0])
    return expr, np.clip(eye, -limit, limit), rot
