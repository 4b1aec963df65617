"""Figures in the prose of the pages, computed from the stored runs that they are about."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from kitbench.store.folder import find
from kitbench.verdict.entries import entries
from tests.conftest import ROOT

Scores = Mapping[str, float]
"""Mean PSNR over the images of a set, dB, by seed."""


@cache
def stored(folder: str) -> dict[tuple[str, str, float | None, float], dict[str, float]]:
    """Scores of a folder of stored runs, by method, test set, sigma and learning rate (0: not trained)."""
    found: dict[tuple[str, str, float | None, float], dict[str, float]] = {}
    for entry in entries(find([ROOT / "results" / "reference" / folder]), None):
        run, scored = entry.run, entry.evaluation
        place = (run.method, scored.data_set, scored.sigma, run.recipe.lr if run.recipe else 0.0)
        found.setdefault(place, {})[str(run.seed)] = scored.mean_psnr
    return found


def scores(method: str, data_set: str, *folders: str, sigma: float | None = 25, lr: float = 0.002) -> dict[str, float]:
    """Of all seeds in these folders."""
    return {s: v for folder in folders for s, v in stored(folder).get((method, data_set, sigma, lr), {}).items()}


def gaps(a: Scores, b: Scores) -> list[float]:
    """a - b of the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
