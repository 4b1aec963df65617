"""What trained runs noted of their k-NN retrieval: how many of the nearest patches it finds, and how far they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kitbench.text import counted
from kitbench.verdict.entries import Entry

MEASURED = ("recall", "chance", "adjacent", "distance")
"""Recall and that of random patches, the share of adjacent neighbours, in [0, 1]; their median distance in patches."""


@dataclass(frozen=True)
class Retrieval:
    """What the runs of one method recorded of their k-NN retrieval."""

    runs: Mapping[str, Mapping[int, Mapping[str, float]]]
    """By run and level of the network: each of MEASURED, the mean over the places of that level."""
    k: int
    sample: str
    """What was measured on: `20 crops of 5 images of ..., at most 256 px`."""

    def by_seed(self, name: str) -> np.ndarray:
        """One value of MEASURED per run: the mean over the levels."""
        return np.array([np.mean([level[name] for level in levels.values()]) for levels in self.runs.values()])

    def levels(self) -> dict[int, dict[str, float]]:
        """By level: the means over the runs."""
        numbers = sorted({level for levels in self.runs.values() for level in levels})
        return {
            number: {name: float(np.mean([of[number][name] for of in self.runs.values()])) for name in MEASURED}
            for number in numbers
        }

    def __str__(self) -> str:
        """By level: recall, share of adjacent neighbours, distance; then what they were measured on."""
        found = [
            f"at level {number} recall {at['recall']:.3f} (random patches {at['chance']:.3f}), {at['adjacent']:.0%} "
            f"touch the query patch, median distance {at['distance']:.3g} patches"
            for number, at in self.levels().items()
        ]
        return f"of the {self.k - 1} neighbours besides itself, {'; '.join(found)}; on {self.sample}"


def noted(entries: Sequence[Entry]) -> Retrieval | None:
    """What these entries' runs of one method noted; None where none did.

    Runs that measured one clean image only, as earlier versions did, are left out.
    """
    runs: dict[str, dict[int, dict[str, float]]] = {}
    samples: dict[str, None] = {}
    k = 0
    for entry in entries:
        by_level: dict[int, list[Mapping[str, Any]]] = {}
        for place in _places(entry):
            by_level.setdefault(place["level"], []).append(place)
            k = place["k"]
            kind = f" with {place['condition']}" if place["condition"] else ""
            images = f"{counted(place['images'], 'image')} ({place['sets']}{kind})"
            samples[f"{place['crops']} degraded crops of {images}, at most {place['side']} px"] = None
        if by_level:
            runs[entry.run.key[:10]] = {
                level: {name: float(np.mean([place[name] for place in places])) for name in MEASURED}
                for level, places in sorted(by_level.items())
            }
    return Retrieval(runs, k, " or ".join(samples)) if runs else None


def _places(entry: Entry) -> Iterator[Mapping[str, Any]]:
    """The notes of an entry that hold all that is measured."""
    for note in entry.training.notes.values() if entry.training else ():
        if isinstance(note, dict) and {*MEASURED, "k", "level", "crops"} <= note.keys():
            yield note
