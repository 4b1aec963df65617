"""Evaluation of a sweep: exponents in pixels, sizes where two curves cross, the largest image within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import stats

from kitbench.store.sweeps import Point, Sweep, What

Quantity = Callable[[Point], "float | None"]
WORDS = {"infer": "inference", "train": "training step"}


@dataclass(frozen=True)
class Exponent:
    """The slope of log(quantity) over log(pixels), and half its 95 % interval, None with only two points."""

    value: float
    half_width: float | None
    points: int


def exponent(points: Sequence[Point], quantity: Quantity) -> Exponent | None:
    """Least squares over the points that have the quantity; None with fewer than two."""
    pairs = _pairs(points, quantity)
    if len(pairs) < 2:
        return None
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    fit = stats.linregress(x, y)
    if len(pairs) == 2:
        return Exponent(float(fit.slope), None, 2)
    half = float(stats.t.ppf(0.975, len(pairs) - 2) * fit.stderr)
    return Exponent(float(fit.slope), half, len(pairs))


@dataclass(frozen=True)
class Crossing:
    """The size, a side in pixels, at which the curves of a and b cross."""

    size: float
    cheaper_above: bool
    """Whether a is the cheaper one above that size; otherwise below it."""


def crossings(a: Sequence[Point], b: Sequence[Point], quantity: Quantity) -> list[Crossing]:
    """Sizes at which the curves of a and b cross, linear in logarithms between the sizes that both have."""
    left, right = dict(_pairs(a, quantity)), dict(_pairs(b, quantity))
    shared = sorted(left.keys() & right.keys())
    gaps = [(x, math.log(left[x] / right[x])) for x in shared]
    found = []
    for (x0, g0), (x1, g1) in pairwise(gaps):
        if g0 * g1 < 0:
            pixels = math.exp(math.log(x0) + (math.log(x1) - math.log(x0)) * g0 / (g0 - g1))
            found.append(Crossing(math.sqrt(pixels), cheaper_above=g1 < 0))
    return found


def largest(points: Sequence[Point], budget: int) -> float | None:
    """Side in pixels of the largest square map whose peak is within `budget` bytes; None with fewer than two points.

    Linear in logarithms between the points, and along the last two beyond them.
    """
    pairs = _pairs(points, lambda point: point.bytes)
    if len(pairs) < 2:
        return None
    place = next((i for i, (_, size) in enumerate(pairs) if size > budget), len(pairs) - 1)
    (x0, y0), (x1, y1) = pairs[max(0, place - 1)], pairs[max(1, place)]
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    return math.sqrt(x0 * (budget / y0) ** (1 / slope))


def _pairs(points: Sequence[Point], quantity: Quantity) -> list[tuple[int, float]]:
    """(pixels, value) of the points that have a positive value."""
    return [(p.size**2, value) for p in points if (value := quantity(p)) is not None and value > 0]


def curves(sweep: Sweep) -> list[tuple[str, What]]:
    """(method, what) in the order of the command."""
    whats: tuple[What, ...] = ("infer", "train")
    present = {(p.method, p.what) for p in sweep.points}
    return [(method, what) for what in whats for method in sweep.methods if (method, what) in present]
