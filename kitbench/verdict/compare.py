"""Paired comparisons between the methods of stored runs: which differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kitbench.verdict.entries import Entry
from kitbench.verdict.statistics import ALPHA, Array, Difference, difference, holm

Column = tuple[str, str]
"""Data set and condition (`σ25`, or nothing)."""


def heading(column: Column) -> str:
    """What stands over a column: `CBSD68 σ25`, or `Rain100L`."""
    return " ".join(part for part in column if part)


@dataclass(frozen=True)
class Compared:
    """Method a minus method b, in dB, and the runs behind it."""

    a: str
    b: str
    found: Difference
    runs: tuple[str, ...]
    p_holm: float | None = None
    """Adjusted over all comparisons that are told together."""

    @property
    def decided(self) -> bool:
        """Whether the difference is more than noise, after the correction."""
        return self.p_holm is not None and self.p_holm < ALPHA


def scores(entries: Iterable[Entry]) -> dict[int, dict[str, float]]:
    """PSNR by seed and image; infinite where an image was restored exactly."""
    return {
        entry.run.seed: {s.image: math.inf if s.psnr is None else s.psnr for s in entry.evaluation.scores}
        for entry in entries
        if entry.run.seed is not None
    }


def paired(a: Sequence[Entry], b: Sequence[Entry]) -> tuple[Array, list[int], list[str]] | None:
    """Differences a - b [seeds, images] over the seeds and images that both have; None where there are none.

    An image that either restored exactly has no finite difference and is left out.
    """
    left, right = scores(a), scores(b)
    seeds = sorted(left.keys() & right.keys())
    if not seeds:
        return None
    images = [image for image in left[seeds[0]] if all(image in t[s] for t in (left, right) for s in seeds)]
    d = np.array(
        [[left[s][i] - right[s][i] if math.isfinite(right[s][i]) else math.nan for i in images] for s in seeds]
    )
    finite = np.isfinite(d).all(0)
    if not finite.any():
        return None
    return d[:, finite], seeds, [image for image, kept in zip(images, finite, strict=True) if kept]


def pooled(a: Mapping[Column, Sequence[Entry]], b: Mapping[Column, Sequence[Entry]]) -> Array | None:
    """Differences a - b [seeds, images] over all data sets, each image's mean over its conditions; None without pairs.

    The conditions of one image are no independent images, so they are averaged first.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for column in sorted(a.keys() & b.keys()):
        pairs = paired(a[column], b[column])
        if pairs is None:
            continue
        d, seeds, images = pairs
        for s, seed in enumerate(seeds):
            for i, image in enumerate(images):
                found.setdefault((column[0], image), {}).setdefault(seed, []).append(float(d[s, i]))
    if not found:
        return None
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    if not shared:
        return None
    return np.array([[np.mean(by_seed[seed]) for by_seed in found.values()] for seed in shared])


def compare(a: str, b: str, left: Sequence[Entry], right: Sequence[Entry]) -> Compared | None:
    """Method a against b in one column; None where they share no seed or image."""
    pairs = paired(left, right)
    if pairs is None:
        return None
    used = [e for e in (*left, *right) if e.run.seed in pairs[1]]
    return Compared(a, b, difference(pairs[0]), tuple(entry.run.key[:10] for entry in used))


def adjusted(compared: Sequence[Compared]) -> list[Compared]:
    """With Holm's correction over all of them."""
    return [replace(c, p_holm=p) for c, p in zip(compared, holm([c.found.p for c in compared]), strict=True)]
