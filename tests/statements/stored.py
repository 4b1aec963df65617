"""Scores of the stored runs, and whether a page says a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from statistics import fmean

from kitbench.store.folder import find
from kitbench.verdict.entries import entries
from tests.conftest import ROOT

RESULTS = "results"
REFERENCE = ROOT / RESULTS / "reference"
SEEDS, MORE, TUNED = "denoise-standard-seeds-cpu", "denoise-standard-more-seeds-cpu", "denoise-standard-tuned-cpu"
SETS, REACH, GRAY = "denoise-standard-sets-seeds-cpu", "reach-standard-cpu", "denoise-standard-gray-cpu"
RAIN, SHORT_RAIN = "derain-standard-rain100l-cpu", "derain-standard-12000-cpu"
AS_LONG_RAIN, MORE_RAIN = "derain-standard-14000-cpu", "derain-standard-more-seeds-cpu"
SHAKE = "deblur-standard-levin09-cpu"
CAMERA, SHORT_CAMERA = "denoise-real-standard-cc15-cpu", "denoise-real-cc15-cpu"
LR, SHORT_LR = 0.002, 0.005
"""Of the recipes `standard` and `reach`; of `quick`."""
Scores = Mapping[str, float]
"""Mean PSNR over the images of a set, dB, by seed."""


@cache
def stored(folder: str) -> dict[tuple[str, str, float | None, float], dict[str, float]]:
    """Scores of a folder of stored runs, by method, test set, sigma and learning rate (0: not trained)."""
    found: dict[tuple[str, str, float | None, float], dict[str, float]] = {}
    for entry in entries(find([REFERENCE / folder]), None):
        run, scored = entry.run, entry.evaluation
        place = (run.method, scored.data_set, scored.sigma, run.recipe.lr if run.recipe else 0.0)
        found.setdefault(place, {})[str(run.seed)] = scored.mean_psnr
    return found


def scores(method: str, data_set: str, *folders: str, sigma: float | None = 25, lr: float = LR) -> dict[str, float]:
    """Of all seeds in these folders."""
    return {s: v for folder in folders for s, v in stored(folder).get((method, data_set, sigma, lr), {}).items()}


def mean(*of: object, **chosen: object) -> float:
    """The mean of `scores` over seeds, dB."""
    return fmean(scores(*of, **chosen).values())  # type: ignore[arg-type]


def step_ratios(folder: str, a: str, b: str) -> list[float]:
    """Time of a training step of a over that of b, where one command measured both in turn: the machine may be another
    at another time.
    """
    measured: dict[float | None, dict[str, float]] = {}
    for run in find([REFERENCE / folder]):
        if run.training is not None and run.training.cost.step_seconds is not None:
            cost = run.training.cost  # a calibration of its own for each command
            measured.setdefault(cost.calibration_seconds, {})[run.run.method] = cost.step_seconds
    return [both[a] / both[b] for both in measured.values() if {a, b} <= both.keys()]


def time_shares(a: tuple[str, str], b: tuple[str, str]) -> list[float]:
    """Time of whole trainings of a over that of b, of the same seeds: by the steps timed before training, by the same in
    units of the calibration, and by the median step of the training.

    a, b: a folder and a method.
    """
    found = []
    for folder, method in (a, b):
        of_seed = {}
        for run in find([REFERENCE / folder]):
            training, recipe = run.training, run.run.recipe
            if run.run.method == method and training is not None and recipe is not None:
                step, unit = training.cost.step_seconds, training.cost.calibration_seconds
                assert step is not None
                assert unit is not None
                of_seed[run.run.seed] = [recipe.steps * one for one in (step, step / unit, training.seconds_per_step)]
        found.append(of_seed)
    one, other = found
    return [x / y for seed in one.keys() & other.keys() for x, y in zip(one[seed], other[seed], strict=True)]


def gaps(a: Scores, b: Scores) -> list[float]:
    """a - b in dB, of the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def says(place: str, *sentences: str) -> None:
    """Fails unless a page, or the pages in a folder, contain each of these texts, wherever their lines break."""
    path = ROOT / place
    pages = [path] if path.is_file() else sorted(path.glob("*.md"))
    text = "\n\n".join(" ".join(page.read_text("utf-8").split()) for page in pages)
    for sentence in sentences:
        assert sentence in text, f"{place} does not say: {sentence}"


def up(value: float) -> str:
    """To hundredths, upwards: for a bound."""
    return f"{math.ceil(100 * value) / 100:.2f}"


def by_image(folder: str, method: str, data_set: str) -> dict[str, dict[str, float]]:
    """PSNR in dB by image, then by seed."""
    found: dict[str, dict[str, float]] = {}
    for entry in entries(find([REFERENCE / folder]), None):
        if (entry.run.method, entry.evaluation.data_set) == (method, data_set):
            for score in entry.evaluation.scores:
                found.setdefault(score.image, {})[str(entry.run.seed)] = score.psnr
    return found


def image_gains(folder: str, method: str, other: str) -> list[float]:
    """How far a method lies above another on each image of a folder's only test set, the mean over its seeds, dB."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in entries(find([REFERENCE / folder]), None):
        for score in entry.evaluation.scores:
            found.setdefault(entry.run.method, {}).setdefault(score.image, []).append(score.psnr)
    return [fmean(found[method][image]) - fmean(found[other][image]) for image in found[method]]
