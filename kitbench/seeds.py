"""Seeds hashed from names, so that adding a method, data set or image does not change the seeds of the others."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(*names: object) -> int:
    """A seed below 2**63, a pure function of the texts of the names."""
    text = "/".join(map(str, names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(*names: object) -> np.random.Generator:
    """A counter-based generator (Philox) seeded by `derive`: the same stream on every platform."""
    return np.random.Generator(np.random.Philox(key=derive(*names)))
