"""Random numbers that depend on what they are for, never on what was drawn before.

Every draw has a key such as ("noise", seed, subject, view). Its SHA-256 seeds a generator of its
own, so results do not depend on the order of jobs, and a resumed job draws what the killed one
would have drawn.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from torch import Tensor


def derived_seed(*key: str | int) -> int:
    """A 128-bit seed for this key."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:16], "little")


def derived_generator(*key: str | int) -> np.random.Generator:
    """A numpy generator for this key."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(derived_seed(*key))))


def derived_normal(shape: tuple[int, ...], *key: str | int) -> Tensor:
    """Standard normal float32 draws for this key, made on the CPU so that devices agree."""
    generator = torch.Generator("cpu").manual_seed(derived_seed(*key) % 2**63)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
