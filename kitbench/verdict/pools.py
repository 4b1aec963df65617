"""PSNR against the size of the tiles that an image is restored in: what a method makes of a wider pool.

Every size is a protocol of its own, so methods are ranked within a column only, never across columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kitbench.errors import InputError
from kitbench.spec.pools import WHOLE, pool_family, size_text
from kitbench.store.folder import RunFolder
from kitbench.verdict.compare import Column, heading, scene
from kitbench.verdict.contrasts import ComparedRuns, blocks
from kitbench.verdict.entries import Entry, entries
from kitbench.verdict.layout import caption_of
from kitbench.verdict.sheets import Sheet
from kitbench.verdict.statistics import Array


@dataclass(frozen=True)
class PoolRow:
    """One method on one data set at one noise level."""

    method: str
    seeds: tuple[int, ...]
    """Those that were scored at every size."""
    by_size: dict[int, Array]
    """PSNR of every image, mean over seeds, dB [images], by the side of the tiles; widest last (0: whole images)."""
    scenes: tuple[str, ...]
    """What each image shows."""

    def mean(self, size: int) -> float:
        return float(self.by_size[size].mean())

    @property
    def best(self) -> int:
        """The size with the highest mean."""
        return max(self.by_size, key=self.mean)

    def gain(self) -> tuple[float, float | None]:
        """Widest - narrowest, dB: the mean over images, and its standard error, None for one image.

        The images of one scene, which are not independent, are averaged and count as one in both.
        """
        narrowest, *_, widest = self.by_size.values()
        difference = widest - narrowest
        by_scene = [difference[np.array(self.scenes) == one].mean() for one in dict.fromkeys(self.scenes)]
        error = float(np.std(by_scene, ddof=1)) / math.sqrt(len(by_scene)) if len(by_scene) > 1 else None
        return float(np.mean(by_scene)), error


def by_width(size: int) -> float:
    """Sorts sizes of tiles, whole images last."""
    return math.inf if size == WHOLE else size


def pool_sheets(runs: Sequence[RunFolder], data_sets: Sequence[str] = (), sizes: Sequence[int] = ()) -> list[Sheet]:
    """A table for each family of protocols, comparison, data set and noise level that has two sizes of tiles.

    data_sets, sizes (sides of tiles in pixels, 0: whole images): those to show; empty: all. Raises InputError where no
    run was scored at two of the sizes.
    """
    families: dict[str, dict[int, str]] = {}
    for folder in runs:
        for evaluation in folder.evaluations():
            family = pool_family(evaluation.protocol)
            if family is not None and (not sizes or evaluation.protocol.tile in sizes):
                families.setdefault(family, {})[evaluation.protocol.tile] = evaluation.stamp
    sheets = []
    for family, stamps in sorted(families.items()):
        by_size = {size: blocks(entries(runs, stamps[size])) for size in sorted(stamps, key=by_width)}
        for comparison, blocks_of in _by_comparison(by_size).items():
            columns = dict.fromkeys(
                column for block in blocks_of.values() for of in block.methods.values() for column in of
            )
            for column in columns:
                rows = pool_rows(blocks_of, column)
                if rows and comparison and (not data_sets or column[0] in data_sets):
                    suites = set[str]().union(*(block.suites for block in blocks_of.values()))
                    shared = caption_of(next(iter(blocks_of.values())).first.run, suites)
                    caption = f"{shared}: {heading(column)}, {family}"
                    unlike = dict.fromkeys(note for block in blocks_of.values() for note in block.unlike())
                    sheets.append(_sheet(f"PSNR against the size of the tiles, {caption}", rows, list(unlike)))
    if not sheets:
        raise InputError(
            f"None of these trained runs was scored at two {'of these ' if sizes else ''}sizes of tiles; score them "
            f"with `kitbench pools RUNS`, which needs their weights."
        )
    return sheets


def _by_comparison(by_size: Mapping[int, Sequence[ComparedRuns]]) -> dict[str, dict[int, ComparedRuns]]:
    found: dict[str, dict[int, ComparedRuns]] = {}
    for size, compared in by_size.items():
        for block in compared:
            found.setdefault(block.first.run.comparison, {})[size] = block
    return found


def pool_rows(blocks_of: Mapping[int, ComparedRuns], column: Column) -> list[PoolRow]:
    """The methods of one comparison that were scored on a column at two sizes or more, by method.

    An image that was restored exactly at any size has no finite PSNR and is left out at all.
    """
    methods = dict.fromkeys(method for block in blocks_of.values() for method in block.methods)
    found = []
    for method in methods:
        scored = {
            size: _scores(block.methods[method][column])
            for size, block in blocks_of.items()
            if column in block.methods.get(method, {})
        }
        seeds = sorted(set.intersection(*map(set, scored.values()))) if len(scored) > 1 else []
        if not seeds:
            continue
        images = sorted(set.intersection(*(set(of[seed]) for of in scored.values() for seed in seeds)))
        values = np.array([[[of[seed][image] for image in images] for seed in seeds] for of in scored.values()])
        finite = np.isfinite(values).all((0, 1))
        if finite.any():
            by_size = dict(zip(scored, values[:, :, finite].mean(1), strict=True))
            scenes = tuple(scene(column[0], image) for image, kept in zip(images, finite, strict=True) if kept)
            found.append(PoolRow(method, tuple(seeds), by_size, scenes))
    return found


def _scores(group: Sequence[Entry]) -> dict[int, dict[str, float]]:
    """PSNR by seed and image."""
    return {
        entry.run.seed: {s.image: math.inf if s.psnr is None else s.psnr for s in entry.evaluation.scores}
        for entry in group
        if entry.run.seed is not None
    }


def _sheet(caption: str, rows: Sequence[PoolRow], unlike: Sequence[str]) -> Sheet:
    sizes = sorted({size for row in rows for size in row.by_size}, key=by_width)
    means = {size: [round(row.mean(size), 2) for row in rows if size in row.by_size] for size in sizes}
    leaders = {size: max(values) for size, values in means.items() if len(values) > 1}
    ranking = "**bold** is the best of a column"
    if len({row.seeds for row in rows}) > 1:
        leaders, ranking = {}, "no column is ranked, because the methods have different seeds"
    lines = []
    for row in rows:
        cells = [_cell(row, size, leaders.get(size)) for size in sizes]
        mean, error = row.gain()
        best = f"{row.mean(row.best):.2f} ({size_text(row.best)})"
        gain = f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")
        lines.append((row.method, *cells, gain, best, ",".join(map(str, row.seeds))))
    header = ("Method", *map(size_text, sizes), "Widest - narrowest", "At its best size", "Seeds")
    notes = (
        "PSNR in dB, mean over images and seeds. Each size is a protocol of its own, so columns are not ranked against "
        f"one another; {ranking}. Widest - narrowest: mean ± standard error over images (over scenes, where a set has "
        "several images of one), of the sizes that the method was scored at. The best size is chosen on these same "
        "images, so its value is a little too high.",
        *unlike,
    )
    return Sheet(caption, header, tuple(lines), notes)


def _cell(row: PoolRow, size: int, leader: float | None) -> str:
    if size not in row.by_size:
        return "n/a"
    text = f"{row.mean(size):.2f}"
    return f"**{text}**" if leader is not None and text == f"{leader:.2f}" else text
