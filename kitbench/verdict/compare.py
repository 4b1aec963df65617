"""Paired comparisons between the methods of stored runs: which differences are more than noise."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from kitbench.verdict.entries import Entry
from kitbench.verdict.statistics import (
    ALPHA,
    FEWEST_SEEDS,
    Array,
    Difference,
    detectable,
    difference,
    holm,
    testable,
    to_best,
)

Column = tuple[str, str]
"""Data set and condition (`σ25`, or nothing)."""
Columns = Mapping[Column, Sequence[Entry]]
"""The entries of one method, an entry per seed in each column."""
K = TypeVar("K", bound=Hashable)
SCENES = {
    "Levin09": r"(im\d+)_kernel",
    "GoPro": r".*(GOPR\d+_\d+_\d+)",
    "GoPro-gamma": r".*(GOPR\d+_\d+_\d+)",
    "HIDE": r".*from(GOPR\d+)",
    "RealBlur-J": r".*(scene\d+)",
    "RealBlur-R": r".*(scene\d+)",
    "SIDD-validation": r".*/(\d+)_\d+$",
    "PolyU": r"(?:.*/)?(.+)_\d+_real$",
    "Test2800": r"(?:.*/)?(\d+)_\d+$",
    "Rain100L": r".*?0*(\d+)$",
}
"""Sets that hold several images of one scene (kernels, frames of a video, shots, blocks or regions of a picture,
several rains), with what names the scene in an image's name. Such images are no independent images."""
REPEATED = {
    "Rain100L": {
        "4": "3", "14": "5", "25": "6", "36": "7", "47": "8", "58": "9", "69": "10", "80": "11", "91": "12",
    },
}  # fmt: skip
"""Pictures that a set holds twice, pixel for pixel, under another rain: the second one, and the first."""
SAME_SCENES = {
    "GoPro-gamma": "GoPro", "RealBlur-R": "RealBlur-J", "Repetition-none": "Repetition",
    "Kodak24-full": "Kodak24", "Urban100-centre512": "Urban100",
}  # fmt: skip
"""Sets that show the scenes of another one."""
DOWNSAMPLED = re.compile(r"(_SRF_\d+)?_HR$")
"""Ends the names of Urban100's pictures as its authors pack them, for super-resolution, and not those of its crops."""


def heading(column: Column) -> str:
    """The title of a column: `CBSD68 σ25`, or `Rain100L`."""
    return " ".join(part for part in column if part)


@dataclass(frozen=True)
class Compared:
    """Method a minus method b, in dB, and the runs that were compared."""

    a: str
    b: str
    found: Difference
    runs: tuple[str, ...]
    p_holm: float | None = None
    """Adjusted over all comparisons of the same family (a table, a page of claims)."""
    detectable: float | None = None
    """The smallest true difference in dB that would be found with 80 % power after that correction."""
    family: int = 1
    """How many comparisons were corrected together: those with a p value."""
    left_out: tuple[Column, ...] = ()
    """As in `Scores`."""

    @property
    def without(self) -> str:
        """What was left out, in words; empty where nothing was."""
        names = ", ".join(map(heading, self.left_out))
        return f"without {names}, which fewer than {FEWEST_SEEDS} of these seeds were scored on" if names else ""

    @property
    def decided(self) -> bool:
        """Whether the difference is more than noise, after the correction."""
        return self.p_holm is not None and self.p_holm < ALPHA


@dataclass(frozen=True)
class Scores:
    """PSNR in dB [methods, seeds, images] over the seeds and images that all methods have."""

    values: Array
    seeds: tuple[int, ...]
    images: tuple[tuple[str, str], ...]
    """Data set and image, or scene."""
    left_out: tuple[Column, ...] = ()
    """Columns that all methods have, but on so few seeds that with them nothing could be decided."""


def paired_scores(methods: Sequence[Columns]) -> Scores | None:
    """Scores of methods over the columns, seeds and images that all have; None where there are none.

    All columns count, unless these share fewer than FEWEST_SEEDS seeds and some of them share more.

    The conditions (noise levels) of an image are averaged, because they are no independent images; so are the images of
    one scene (`SCENES`), in one set or in two (`SAME_SCENES`), which stand for one image. An image that any method
    restored exactly has no finite PSNR and is left out.
    """
    shared = sorted(set.intersection(*(set(columns) for columns in methods)))
    tables = [{column: _by_seed(of[column]) for column in shared} for of in methods]
    columns, seeds = _columns_and_seeds(
        {c: frozenset.intersection(*(frozenset(of[c]) for of in tables)) for c in shared}
    )
    if not seeds:
        return None
    averaged: dict[tuple[str, str], list[Array]] = {}
    for column in columns:
        for image in tables[0][column][seeds[0]]:
            if all(image in of[column][seed] for of in tables for seed in seeds):
                values = np.array([[of[column][seed][image] for seed in seeds] for of in tables])
                averaged.setdefault((column[0], image), []).append(values)
    means = {image: np.mean(values, 0) for image, values in averaged.items()}
    by_scene: dict[tuple[str, str], list[Array]] = {}
    for (data_set, image), mean in means.items():
        if np.isfinite(mean).all():
            by_scene.setdefault((SAME_SCENES.get(data_set, data_set), scene(data_set, image)), []).append(mean)
    stacked = [np.mean(values, 0) for values in by_scene.values()]
    left_out = tuple(column for column in shared if column not in columns)
    return Scores(np.stack(stacked, -1), tuple(seeds), tuple(by_scene), left_out) if stacked else None


def _columns_and_seeds(seeds_of: Mapping[Column, frozenset[int]]) -> tuple[list[Column], list[int]]:
    """The columns and the seeds to compare over: as many columns as leave FEWEST_SEEDS seeds, else as many seeds as can
    be, whatever the scores are.
    """
    if not seeds_of:
        return [], []
    known = {*seeds_of.values(), frozenset.intersection(*seeds_of.values())}
    found = {seeds: [column for column, own in seeds_of.items() if seeds <= own] for seeds in known}
    seeds = max(found, key=lambda one: (min(len(one), FEWEST_SEEDS), len(found[one]), len(one), sorted(one)))
    return found[seeds], sorted(seeds)


def scene(data_set: str, image: str) -> str:
    """What an image of a set shows: the image itself, except in a set of `SCENES`.

    There it is nothing (an empty text) where the name of the image does not say it: all such images count as one, since
    nobody knows which of them are independent.
    """
    if data_set not in SCENES:
        twins = SAME_SCENES.keys() | set(SAME_SCENES.values())
        return DOWNSAMPLED.sub("", image.rpartition("/")[2]) if data_set in twins else image
    found = re.match(SCENES[data_set], image)
    name = found[1] if found else ""
    return REPEATED.get(data_set, {}).get(name, name)


def _by_seed(entries: Iterable[Entry]) -> dict[int, dict[str, float]]:
    """PSNR by seed and image; infinite where an image was restored exactly."""
    return {
        entry.run.seed: {s.image: math.inf if s.psnr is None else s.psnr for s in entry.evaluation.scores}
        for entry in entries
        if entry.run.seed is not None
    }


def compare(a: str, b: str, left: Columns, right: Columns) -> Compared | None:
    """Method a against b over all images that both were scored on; None where they share no seed or image."""
    scores = paired_scores([left, right])
    if scores is None:
        return None
    found = difference(scores.values[0] - scores.values[1])
    return Compared(a, b, found, _runs(scores, left, right), left_out=scores.left_out)


def _runs(scores: Scores, *methods: Columns) -> tuple[str, ...]:
    """The runs whose seeds were compared, each once."""
    used = [e for of in methods for group in of.values() for e in group if e.run.seed in scores.seeds]
    return tuple(dict.fromkeys(entry.run.key[:10] for entry in used))


def adjusted(compared: Sequence[Compared]) -> list[Compared]:
    """With Holm's correction over all of them: comparisons that were fixed before the scores were seen."""
    p = holm(np.array([np.nan if c.found.p is None else c.found.p for c in compared]))
    family = max(int(np.isfinite(p).sum()), 1)
    return [with_correction(c, float(value), family) for c, value in zip(compared, p, strict=True)]


def with_correction(compared: Compared, p_holm: float, family: int) -> Compared:
    """A comparison with its adjusted p value (NaN: none) among `family` comparisons."""
    p = None if math.isnan(p_holm) else p_holm
    return replace(compared, p_holm=p, detectable=detectable(compared.found.spread, family), family=family)


def equal_seeds(methods: Mapping[str, Columns]) -> list[str]:
    """The methods that can be ranked: trained ones with the same seeds in every column that all of them have, or where
    they share none, in every column.

    Where methods have several sets of seeds, the ranked ones are those of one set: a set of several seeds before a
    single seed, then the set that most methods have, then the larger one.
    """
    shared = sorted(set.intersection(*map(set, methods.values()))) if methods else []
    by_seeds: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for method, columns in methods.items():
        groups = [columns[column] for column in shared] or list(columns.values())
        seeds = tuple(tuple(sorted(e.run.seed for e in group if e.run.seed is not None)) for group in groups)
        if all(seeds) and (shared or len(set(seeds)) == 1):
            by_seeds.setdefault(seeds if shared else seeds[:1], []).append(method)

    def order(seeds: tuple[tuple[int, ...], ...]) -> tuple[bool, bool, int, int, tuple[tuple[int, ...], ...]]:
        most = max(map(len, seeds))
        return len(by_seeds[seeds]) > 1, most > 1, len(by_seeds[seeds]), most, seeds

    best = max(by_seeds, default=None, key=order)
    return [] if best is None else by_seeds[best]


def against_best(tables: Mapping[K, Mapping[str, Columns]]) -> dict[K, list[Compared]]:
    """Every method against the one with the highest mean PSNR, in each part of a table.

    tables: the methods of each part, which have equal seeds. The best is chosen from the same scores, so the
    correction counts all pairs of methods in all parts.
    """
    scores = {key: paired_scores(list(methods.values())) for key, methods in tables.items() if len(methods) > 1}
    known = {key: found for key, found in scores.items() if found is not None}
    if not known:
        return {}
    family = max(sum(math.comb(len(tables[key]), 2) for key, found in known.items() if testable(found.values)), 1)
    compared = {}
    for (key, found), (best, p) in zip(known.items(), to_best([s.values for s in known.values()]), strict=True):
        names, place = list(tables[key]), int(best)
        compared[key] = [
            with_correction(
                Compared(
                    name, names[place], difference(found.values[number] - found.values[place]),
                    _runs(found, tables[key][name], tables[key][names[place]]), left_out=found.left_out,
                ),
                float(p[number]), family,
            )
            for number, name in enumerate(names)
            if number != place
        ]  # fmt: skip
    return compared
