"""What a method gains from copies: its scores on the set with repetition minus those on the same set without."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kitbench.errors import InputError
from kitbench.store.folder import RunFolder
from kitbench.verdict.compare import Column
from kitbench.verdict.contrasts import ComparedRuns, blocks
from kitbench.verdict.entries import Entry, entries
from kitbench.verdict.layout import caption_of
from kitbench.verdict.sheets import Sheet
from kitbench.verdict.statistics import Array

WITH, WITHOUT = "Repetition", "Repetition-none"
"""Names of the two sets."""
KINDS = {"copies": "squares that stand twice", "periodic": "periodic textures"}
"""What the names of their images begin with, and what these images show."""
CONTROL = "conv"
"""A method that looks at no other patch than its surroundings: what it gains is due to the content of the images."""


@dataclass(frozen=True)
class Gain:
    """What one method gains on one kind of images."""

    method: str
    seeds: tuple[int, ...]
    images: tuple[str, ...]
    values: Array
    """PSNR with and without copies, dB [2, seeds, images]."""

    @property
    def by_image(self) -> Array:
        """With minus without, mean over seeds, dB [images]."""
        difference: Array = (self.values[0] - self.values[1]).mean(0)
        return difference

    def only(self, other: Gain) -> Gain:
        """On the seeds and images that another one has too."""
        seeds = [place for place, seed in enumerate(self.seeds) if seed in other.seeds]
        images = [place for place, image in enumerate(self.images) if image in other.images]
        return Gain(
            self.method, tuple(self.seeds[place] for place in seeds), tuple(self.images[place] for place in images),
            self.values[:, seeds][:, :, images],
        )  # fmt: skip

    @property
    def mean(self) -> float:
        return float(self.by_image.mean())

    @property
    def error(self) -> float | None:
        """Standard error over images; None for one image."""
        n = len(self.by_image)
        return float(self.by_image.std(ddof=1)) / math.sqrt(n) if n > 1 else None


def gains(block: ComparedRuns, condition: str, kind: str) -> list[Gain]:
    """The gain of every method of a comparison that was scored on both sets; infinite scores are left out."""
    found = []
    for method, columns in block.methods.items():
        scored = [_scores(columns, (name, condition), kind) for name in (WITH, WITHOUT)]
        seeds = sorted(set(scored[0]) & set(scored[1]))
        images = sorted(set.intersection(*(set(of[seed]) for of in scored for seed in seeds)) if seeds else set[str]())
        if not images:
            continue
        values = np.array([[[of[seed][image] for image in images] for seed in seeds] for of in scored])
        finite = np.isfinite(values).all((0, 1))
        if finite.any():
            kept = tuple(image for image, known in zip(images, finite, strict=True) if known)
            found.append(Gain(method, tuple(seeds), kept, values[:, :, finite]))
    return found


def _scores(columns: Mapping[Column, Sequence[Entry]], column: Column, kind: str) -> dict[int, dict[str, float]]:
    """PSNR by seed and image, of the images of one kind."""
    return {
        entry.run.seed: {
            score.image: math.inf if score.psnr is None else score.psnr
            for score in entry.evaluation.scores
            if score.image.startswith(f"{kind}-")
        }
        for entry in columns.get(column, ())
        if entry.run.seed is not None
    }


def gain_sheets(runs: Sequence[RunFolder], protocol: str | None) -> list[Sheet]:
    """A table for each comparison, noise level and kind of images.

    Raises InputError where no run was scored on both sets, or the runs were scored under several protocols and none
    was chosen.
    """
    sheets = []
    for block in blocks(entries(runs, protocol)):
        conditions = dict.fromkeys(c for columns in block.methods.values() for name, c in columns if name == WITH)
        for condition in conditions:
            for kind in KINDS:
                found = gains(block, condition, kind)
                if found:
                    sheets.append(_sheet(block, condition, kind, found))
    if not sheets:
        raise InputError(
            f"None of these trained runs was scored on both {WITH} and {WITHOUT}; "
            f"run a suite that tests on them, such as reach."
        )
    return sheets


def _sheet(block: ComparedRuns, condition: str, kind: str, found: Sequence[Gain]) -> Sheet:
    control = next((gain for gain in found if gain.method == CONTROL), None)
    header = (
        "Method",
        "With copies, dB",
        "Without, dB",
        "Gain, dB",
        "Standard error",
        f"Beyond {CONTROL}, dB",
        "Seeds",
    )
    lines = tuple(
        (
            gain.method, *(f"{mean:.2f}" for mean in gain.values.mean((1, 2))), f"{gain.mean:+.3f}",
            "n/a" if gain.error is None else f"{gain.error:.3f}",
            "n/a" if control is None else _beyond(gain, control), str(len(gain.seeds)),
        )
        for gain in found
    )  # fmt: skip
    counts = sorted({len(gain.images) for gain in found})
    notes = (
        f"Means over the {' or '.join(map(str, counts))} images of {WITH} that are {KINDS[kind]}, and over those of "
        f"{WITHOUT} in their place. "
        "Where a copy was replaced the content is another, so every method gains or loses something; what is gained "
        f"beyond {CONTROL}, which compares no patches, is put down to the copies. Standard errors are over images.",
        *block.unlike(),
    )
    stamp = block.first.evaluation.stamp
    return Sheet(
        f"Gain from {KINDS[kind]}: {caption_of(block.first.run, block.suites)}, {condition}, {stamp}",
        header,
        lines,
        notes,
    )


def _beyond(gain: Gain, control: Gain) -> str:
    """Paired by seed and image, with its standard error over images."""
    if gain.method == control.method:
        return "-"
    difference = gain.only(control).by_image - control.only(gain).by_image
    if not np.isfinite(difference).any():  # no seed, or no image, that both have
        return "n/a"
    mean, n = float(difference.mean()), len(difference)
    return f"{mean:+.3f}" + (f" ± {float(difference.std(ddof=1)) / math.sqrt(n):.3f}" if n > 1 else "")
