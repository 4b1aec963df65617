"""What differences between two methods allow one to conclude, given the spread over seeds and over images.

A difference is an array d[s, i] in dB (or another score): seed s, image i, method a minus method b, trained on the same
batches and scored on the same noise. Seeds and images are crossed: every seed is scored on the same images. The model
behind the interval is d = mean + seed effect + image effect + rest, seeds and images both being samples, so the
interval speaks of other seeds and other images of the kind. One seed, or one image, gives no such interval.

Sources: two-way random effects (Searle, Casella and McCulloch, Variance Components, 1992) with Satterthwaite's degrees
of freedom (1946); expanded percentile interval (Hesterberg, The American Statistician 69, 2015), which corrects the
narrowness of the bootstrap with few seeds; sign-flip permutation test (Fisher 1935); Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kitbench.seeds import generator

LEVEL = 0.95
ALPHA = 1 - LEVEL
POWER = 0.8
REPLICATES = 2000
EXACT_UP_TO = 12  # images: 2^12 sign flips are all done, beyond that FLIPS random ones
FLIPS = 9999

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean paired difference, and what may be said of it."""

    mean: float
    seeds: int
    images: int
    interval: Interval | None
    """Over seeds and images; None where either cannot be told, for the reason in `note`."""
    interval_seeds: Interval | None
    """Over seeds alone, for exactly these images."""
    p: float | None
    """Two-sided, of "no difference": the larger of that of the permutation test and that over seeds and images."""
    detectable: float | None
    """The smallest true difference that so many seeds and images show at 5 % in four cases of five."""
    note: str | None


def difference(d: Array) -> Difference:
    """Judge paired differences d [seeds, images], float64, finite. Raises ValueError for an empty or other array."""
    if d.ndim != 2 or not d.size or not np.isfinite(d).all():
        raise ValueError(f"differences must be finite, [seeds, images] and not empty, but are {d.shape}")
    seeds, images = d.shape
    mean = float(d.mean())
    note = _no_interval(d)
    if note is not None:
        over_seeds = mean_interval(d.mean(1)) if seeds > 1 else None
        return Difference(mean, seeds, images, None, over_seeds, None, None, note)
    error, freedom = standard_error(d)
    p = max(permutation_p(d.mean(0)), float(2 * stats.t.sf(abs(mean) / error, freedom)))
    factor = stats.t.ppf(1 - ALPHA / 2, freedom) + stats.t.ppf(POWER, freedom)
    least = least_p(images)
    too_few = f"{images} images cannot show a difference at 5 %, at least {fewest_images()} are needed"
    return Difference(
        mean, seeds, images, _bootstrap(d, error, freedom), mean_interval(d.mean(1)), p,
        float(factor * error) if least < ALPHA else None, too_few if least >= ALPHA else None,
    )  # fmt: skip


def _no_interval(d: Array) -> str | None:
    if d.shape[0] < 2:
        return "one seed: no interval"
    if d.shape[1] < 2:
        return "one image: no interval over images"
    return "no spread between seeds and images: no interval" if np.ptp(d) == 0 else None


def standard_error(d: Array) -> tuple[float, float]:
    """Standard error of the mean of d [seeds > 1, images > 1], with its degrees of freedom (Satterthwaite).

    By mean squares of the crossed two-way layout: (MS_seeds + MS_images - MS_rest) / (seeds * images). It is never
    taken below what seeds, images or the rest alone imply.
    """
    seeds, images = d.shape
    rows, columns, grand = d.mean(1), d.mean(0), d.mean()
    rest = d - rows[:, None] - columns[None, :] + grand
    of_seeds = images * float(np.square(rows - grand).sum()) / (seeds - 1)
    of_images = seeds * float(np.square(columns - grand).sum()) / (images - 1)
    of_rest = float(np.square(rest).sum()) / ((seeds - 1) * (images - 1))
    total = max(of_seeds + of_images - of_rest, of_seeds, of_images, of_rest)
    squares = of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1) + of_rest**2 / ((seeds - 1) * (images - 1))
    freedom = total**2 / squares
    return math.sqrt(total / (seeds * images)), max(1.0, freedom)


@cache
def _weights(count: int, axis: str) -> Array:
    """Shares [REPLICATES, count] of a resampling with replacement, the same on every call."""
    random = generator("bootstrap", axis, count)
    return random.multinomial(count, np.full(count, 1 / count), REPLICATES) / count


def _bootstrap(d: Array, error: float, freedom: float) -> Interval:
    """Hierarchical bootstrap: seeds are drawn first, then images, the same for all drawn seeds, as they are crossed.

    Deviations are scaled to the unbiased standard error and by t / z: without it three seeds cover far too little.
    """
    drawn = np.einsum("bi,bi->b", _weights(d.shape[0], "seeds") @ d, _weights(d.shape[1], "images"))
    mean, spread = float(d.mean()), float(drawn.std())
    scale = error / spread * stats.t.ppf(1 - ALPHA / 2, freedom) / stats.norm.ppf(1 - ALPHA / 2)
    low, high = np.quantile(drawn - drawn.mean(), [ALPHA / 2, 1 - ALPHA / 2])
    return Interval(mean + float(low * scale), mean + float(high * scale))


def mean_interval(values: Sequence[float] | Array) -> Interval | None:
    """Student's 95 % interval of the mean of independent values; None for one value, or where all are equal."""
    known = np.asarray(values, np.float64)
    if len(known) < 2 or not np.isfinite(known).all() or np.ptp(known) == 0:
        return None
    half = float(stats.t.ppf(1 - ALPHA / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return Interval(float(known.mean()) - half, float(known.mean()) + half)


@cache
def _signs(count: int) -> NDArray[np.int8]:
    """Rows of +1 and -1: all 2^count of them, or FLIPS random ones."""
    if count <= EXACT_UP_TO:
        return np.array(list(product((1, -1), repeat=count)), np.int8)
    return (2 * generator("permutation", count).integers(0, 2, (FLIPS, count)) - 1).astype(np.int8)


def permutation_p(values: Sequence[float] | Array) -> float:
    """Two-sided p of "the two methods could be exchanged on every image": signs of paired differences [images] flipped.

    Exact up to EXACT_UP_TO images; beyond, the share among FLIPS random flips and the observed one.
    """
    known = np.asarray(values, np.float64)
    flipped = np.abs(_signs(len(known)) @ known)
    reached = int((flipped >= abs(known.sum()) * (1 - 1e-12)).sum())
    return reached / len(flipped) if len(known) <= EXACT_UP_TO else (reached + 1) / (len(flipped) + 1)


def least_p(images: int) -> float:
    """The smallest p that so many images can give."""
    return 2.0 ** (1 - images) if images <= EXACT_UP_TO else 1 / (FLIPS + 1)


def fewest_images() -> int:
    """Images from which on a difference can be shown at 5 %, without a correction for further comparisons."""
    return next(images for images in range(1, EXACT_UP_TO) if least_p(images) < ALPHA)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment over the comparisons that have a p; None stays None and does not count."""
    order = sorted((value, place) for place, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    running = 0.0
    for rank, (value, place) in enumerate(order):
        running = max(running, min(1.0, value * (len(order) - rank)))
        adjusted[place] = running
    return adjusted
