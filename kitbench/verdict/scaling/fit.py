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
COMPARED_BYTES = 16 << 20
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


@dataclass(frozen=True)
class LargestSide:
    """The side in pixels of the largest square map whose peak memory is within a budget."""

    side: float | None
    """None where the budget lies outside the sizes of the sweep; then one end of the interval is None as well."""
    low: float | None
    """The interval holds the side if predictions err by no more than they did where memory was measured too."""
    high: float | None

    def __str__(self) -> str:
        if self.side is not None:
            return f"{int(self.side)} ({math.floor(self.low or 0)} to {math.ceil(self.high or self.side)})"
        return f"below {self.high:g}" if self.high is not None else f"at least {self.low:g}"


def largest(sweep: Sweep, method: str, what: What) -> LargestSide | None:
    """The largest side within the sweep's budget; None where the sweep has no such curve.

    A training step contains a forward pass, so its side is never above that of inference.
    """
    points = sweep.curve(method, what)
    if not points:
        return None
    found = _largest(points, sweep.budget, prediction_error(sweep, method, what))
    bound = None if what == "infer" else largest(sweep, method, "infer")
    return found if bound is None else _within(found, bound)


def _within(found: LargestSide, bound: LargestSide) -> LargestSide:
    """A side of training, at most that of inference."""
    if found.side is not None and bound.side is not None:
        pairs = ((found.side, bound.side), (found.low, bound.low), (found.high, bound.high))
        return LargestSide(*(min(a or 0.0, b or 0.0) for a, b in pairs))
    # One lies outside the sweep: `high` alone says below it, `low` alone above it.
    return min(found, bound, key=lambda one: one.side or (0.0 if one.low is None else math.inf))


def prediction_error(sweep: Sweep, method: str, what: What) -> float:
    """The largest factor between measured and predicted bytes on a curve; where it has none, in the whole sweep.

    Of points from COMPARED_BYTES on, as far as there are any: below, buffers of a fixed size inside torch's kernels
    matter, which no large map shows.
    """
    for own in (sweep.curve(method, what), sweep.points):
        measured = [p for p in own if p.peak_bytes]
        compared = [p for p in measured if p.bytes >= COMPARED_BYTES] or measured
        if compared:
            return max(max(p.bytes / p.predicted_bytes, p.predicted_bytes / p.bytes) for p in compared)
    return 1.0


def _largest(points: Sequence[Point], budget: int, error: float) -> LargestSide:
    """Between the last size within the budget and the first above it.

    Memory is a sum of powers of the pixels, which is convex in logarithms. So the chord between the two sizes gives a
    lower bound of the side, and the chord before it, prolonged, an upper one; the size above the budget is another.
    """
    pairs = [(math.log(x), math.log(y)) for x, y in _pairs(points, lambda point: point.bytes)]
    wanted, slack = math.log(budget), math.log(error)
    above = next((i for i, (_, y) in enumerate(pairs) if y > wanted), len(pairs))
    if above == 0:
        return LargestSide(None, None, points[0].size)
    if above == len(pairs):
        return LargestSide(None, points[-1].size, None)
    (x0, y0), (x1, y1) = pairs[above - 1], pairs[above]
    slope = (y1 - y0) / (x1 - x0)
    chord, low = (x0 + (y - y0) / slope for y in (wanted, wanted - slack))
    high = max(x1, x1 + (wanted + slack - y1) / slope)
    if above > 1 and (before := (y0 - pairs[above - 2][1]) / (x0 - pairs[above - 2][0])) > 0:
        high = max(chord + slack / slope, min(high, x0 + (wanted + slack - y0) / before))
    return LargestSide(*(math.exp(x / 2) for x in (chord, low, high)))


def _pairs(points: Sequence[Point], quantity: Quantity) -> list[tuple[int, float]]:
    """(pixels, value) of the points that have a positive value."""
    return [(p.size**2, value) for p in points if (value := quantity(p)) is not None and value > 0]


def curves(sweep: Sweep) -> list[tuple[str, What]]:
    """(method, what) in the order of the command."""
    whats: tuple[What, ...] = ("infer", "train")
    present = {(p.method, p.what) for p in sweep.points}
    return [(method, what) for what in whats for method in sweep.methods if (method, what) in present]
