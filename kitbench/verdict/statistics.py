"""What paired differences between two methods allow one to conclude, given the spread over seeds and over images.

A difference is an array d[s, i] in dB: seed s, image i, method a minus method b, trained on the same batches and scored
on the same noise. Seeds and images are crossed (every seed is scored on the same images) and both are samples, so that
a conclusion speaks of other seeds and other images of the kind: d = mean + seed effect + image effect + residual.

The variance of the mean of d is at most A + B, where A is the variance of the mean over seeds (images as they are) and
B that of the mean over images (seeds as they are). The interval at level 1 - x is

    mean +- sqrt(t(x, seeds - 1)^2 A + t(x, images - 1)^2 B)

with Student's two-sided quantiles t and the usual unbiased estimates of A and B. It keeps its level for any A and B,
however unequal: the distribution function F of a chi-squared variable with one degree of freedom is concave, so with
w = A / (A + B) the coverage is at least E F(w t^2 U + (1 - w) t'^2 U') >= w E F(t^2 U) + (1 - w) E F(t'^2 U') = 1 - x,
where U and U' are the estimates over their expectations (Banerjee, Sankhya 22, 1960, for differences of two means). It
is never narrower than Student's interval over seeds alone or over images alone. The p value is the x at which the
interval touches zero, so it is never below either Student's p value.

A family of comparisons is corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979), which holds however
the comparisons depend on one another. All functions take whole stacks of arrays: what the tables call is what
benchmarks/error_rates.py simulates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.8
FEWEST_IMAGES = 6
"""Fewer images decide nothing: with so few, a p value would rest on normally distributed image effects alone."""
FEWEST_SEEDS = 3
"""Of two, the p value rests on normally distributed seed effects alone."""
EXACT = 1e-9
"""dB; a spread below it is rounding."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Means of differences d [..., seeds, images], and the two parts of their variance; arrays [...], dB and dB^2."""

    mean: Array
    of_seeds: Array
    """A: estimated variance of the mean, seeds drawn anew, for exactly these images."""
    of_images: Array
    """B: estimated variance of the mean, images drawn anew, for exactly these seeds."""
    seeds: int
    images: int


@dataclass(frozen=True)
class Difference:
    """Mean paired difference in dB, its intervals and its p value."""

    mean: float
    seeds: int
    images: int
    interval: Interval | None
    """Over seeds and images; None for the reason in `note`."""
    interval_seeds: Interval | None
    """Over seeds alone, for exactly these images."""
    p: float | None
    """Two-sided, of "no difference on other seeds and images", for one comparison; None for the reason in `note`."""
    note: str | None
    spread: Spread


def spread(d: Array) -> Spread:
    """Of differences d [..., seeds > 1, images > 1], float64."""
    seeds, images = d.shape[-2:]
    by_seed, by_image = d.mean(-1), d.mean(-2)
    return Spread(
        d.mean((-1, -2)), by_seed.var(-1, ddof=1) / seeds, by_image.var(-1, ddof=1) / images, seeds, images
    )  # fmt: skip


def testable(scores: Array) -> bool:
    """Whether differences of scores [..., seeds, images] have p values, if they have any spread."""
    seeds, images = scores.shape[-2:]
    return bool(seeds > 1 and images >= FEWEST_IMAGES)


def half_width(found: Spread, alpha: float = ALPHA) -> Array:
    """Half the width [...], dB, of the interval that covers the true mean in a share 1 - alpha of cases or more."""
    of_seeds, of_images = (stats.t.isf(alpha / 2, n - 1) for n in (found.seeds, found.images))
    return np.sqrt(of_seeds**2 * found.of_seeds + of_images**2 * found.of_images)


def p_values(found: Spread) -> Array:
    """The level [...] at which the interval touches zero; NaN with fewer than FEWEST_IMAGES images."""
    mean, a, b = np.broadcast_arrays(np.square(found.mean), found.of_seeds, found.of_images)
    if found.images < FEWEST_IMAGES:
        return np.full(mean.shape, np.nan)
    freedom = found.seeds - 1, found.images - 1
    # Bisection on log p. Below: the larger of Student's two p values. Above: Student's with the lesser freedom.
    below = np.maximum(*(_student(mean / v, f) for v, f in zip((a, b), freedom, strict=True)))
    low, high = np.log(below), np.log(_student(mean / (a + b), min(freedom)))
    for _ in range(24):
        middle = (low + high) / 2
        squares = [np.square(special.stdtrit(f, np.exp(middle) / 2)) for f in freedom]
        outside = mean > squares[0] * a + squares[1] * b  # zero lies outside: p is smaller
        low, high = np.where(outside, low, middle), np.where(outside, middle, high)
    p: Array = np.exp(high)
    return p


def _student(square: Array, freedom: int) -> Array:
    """Two-sided p values of squares of Student's t; at least the smallest normal number, so that logarithms exist."""
    found: Array = np.maximum(2 * special.stdtr(freedom, -np.sqrt(square)), np.finfo(np.float64).tiny)
    return found


def holm(p: Array) -> Array:
    """p values [..., comparisons] adjusted by Holm's method over the last axis; NaN stays NaN and does not count."""
    order = np.argsort(p, axis=-1)  # NaN last
    ordered = np.take_along_axis(p, order, -1)
    left = np.isfinite(p).sum(-1, keepdims=True) - np.arange(p.shape[-1])
    running = np.minimum(np.maximum.accumulate(ordered * left, axis=-1), 1.0)
    adjusted = np.empty_like(running)
    np.put_along_axis(adjusted, order, running, -1)
    return adjusted


def to_best(columns: Sequence[Array]) -> list[tuple[NDArray[np.intp], Array]]:
    """Every method of a table against the best of its column, the best being chosen from the same scores.

    columns: scores [..., methods, seeds, images] in dB of each column. Returns for each the index [...] of the method
    with the highest mean, and the p values [..., methods] of the differences to it, adjusted over all pairs of methods
    of all columns, because any of them could have been compared; NaN for the best itself and where p values do not
    exist (one seed, fewer than FEWEST_IMAGES images, no spread).
    """
    pairs = [list(combinations(range(scores.shape[-3]), 2)) for scores in columns]
    raw = [_pair_p(scores, places) for scores, places in zip(columns, pairs, strict=True)]
    adjusted = np.split(holm(np.concatenate(raw, -1)), np.cumsum([len(places) for places in pairs])[:-1], axis=-1)
    found = []
    for scores, places, p in zip(columns, pairs, adjusted, strict=True):
        methods = scores.shape[-3]
        square = np.full((*scores.shape[:-3], methods, methods), np.nan)
        for number, (a, b) in enumerate(places):
            square[..., a, b] = square[..., b, a] = p[..., number]
        best = scores.mean((-1, -2)).argmax(-1)
        found.append((best, np.take_along_axis(square, best[..., None, None], -1)[..., 0]))
    return found


def _pair_p(scores: Array, pairs: Sequence[tuple[int, int]]) -> Array:
    """p values [..., pairs] of the differences between methods, each for one comparison."""
    if not pairs or scores.shape[-2] < 2 or scores.shape[-1] < 2:
        return np.full((*scores.shape[:-3], len(pairs)), np.nan)
    first, second = (list(side) for side in zip(*pairs, strict=True))
    found = spread(scores[..., first, :, :] - scores[..., second, :, :])
    with np.errstate(divide="ignore", invalid="ignore"):  # no spread
        return np.where(_has_spread(found), p_values(found), np.nan)


def _has_spread(found: Spread) -> NDArray[np.bool_]:
    return np.minimum(found.of_seeds, found.of_images) > EXACT**2


def difference(d: Array) -> Difference:
    """Mean, intervals and p value of paired differences d [seeds, images], float64.

    Raises ValueError for an array that is empty, not finite or of another shape.
    """
    if d.ndim != 2 or not d.size or not np.isfinite(d).all():
        raise ValueError(f"differences must be finite, [seeds, images] and not empty, but are {d.shape}")
    seeds, images = d.shape
    if seeds > 1 and images > 1 and _has_spread(found := spread(d)):
        mean, half = float(found.mean), float(half_width(found))
        few = images < FEWEST_IMAGES
        return Difference(
            mean, seeds, images, Interval(mean - half, mean + half), mean_interval(d.mean(1)),
            None if few else float(p_values(found)),
            f"{images} images are too few to decide a difference, at least {FEWEST_IMAGES} are needed" if few else None,
            found,
        )  # fmt: skip
    if seeds < 2:
        note = "one seed: no interval"
    elif images < 2:
        note = "one image: no interval over images"
    else:
        note = "no spread between seeds or between images: no interval"
    over_seeds = mean_interval(d.mean(1)) if images < 2 else None
    nothing = np.array(np.nan)
    found = Spread(d.mean((-1, -2)), nothing, nothing, seeds, images)
    return Difference(float(d.mean()), seeds, images, None, over_seeds, None, note, found)


def mean_interval(values: Sequence[float] | Array) -> Interval | None:
    """Student's 95 % interval of the mean of independent values; None for one value, equal or infinite ones."""
    known = np.asarray(values, np.float64)
    if len(known) < 2 or not np.isfinite(known).all() or np.ptp(known) < EXACT:
        return None
    half = float(stats.t.isf(ALPHA / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return Interval(float(known.mean()) - half, float(known.mean()) + half)


@cache
def _quantiles(freedom: int) -> Array:
    """48 equally likely values of an estimated variance over the true one."""
    return stats.chi2.ppf((np.arange(48) + 0.5) / 48, freedom) / freedom


def detectable(found: Spread, comparisons: int) -> float | None:
    """The smallest true difference in dB that the test finds with 80 % power among so many comparisons.

    found: of one array of differences, whose variances are taken for the true ones. The level is that of the first of
    Holm's steps, ALPHA / comparisons. None where the test decides nothing.
    """
    a, b = float(found.of_seeds), float(found.of_images)
    if not (math.isfinite(a) and math.isfinite(b)) or found.images < FEWEST_IMAGES:
        return None
    of_seeds, of_images = (stats.t.isf(ALPHA / comparisons / 2, n - 1) for n in (found.seeds, found.images))
    half = np.sqrt(
        of_seeds**2 * a * _quantiles(found.seeds - 1)[:, None] + of_images**2 * b * _quantiles(found.images - 1)
    )
    error = math.sqrt(a + b)
    low, high = 0.0, float(half.max()) + 6 * error
    for _ in range(50):
        middle = (low + high) / 2
        power = special.ndtr((middle - half) / error).mean() + special.ndtr((-middle - half) / error).mean()
        low, high = (low, middle) if power > POWER else (middle, high)
    return high


MOST_SEEDS = 200


def seeds_to_find(found: Spread, comparisons: int) -> int | None:
    """The fewest seeds, up to MOST_SEEDS, with which a true difference of the measured size is found with 80 % power.

    found: of one array of differences, whose variances are taken for the true ones; the images stay as many. None where
    MOST_SEEDS are too few: then images are what is lacking, or the spread is not known.
    """

    def enough(seeds: int) -> bool:
        more = replace(found, of_seeds=found.of_seeds * (found.seeds / seeds), seeds=seeds)
        least = detectable(more, comparisons)
        return least is not None and least <= abs(float(found.mean))

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
