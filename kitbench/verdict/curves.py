"""Learning curves: how fast each method learns.

The curve of a run is the validation PSNR in its log. Time to target is the training that a method needs until it
reaches what the best control reaches at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low

import numpy as np

from kitbench.errors import InputError
from kitbench.spec.fields import digest
from kitbench.spec.tasks import condition
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run, Training, Tuning
from kitbench.verdict.contrasts import ComparedRuns, blocks
from kitbench.verdict.entries import entries
from kitbench.verdict.ladder import ladder_sheet, ladders
from kitbench.verdict.layout import caption_of
from kitbench.verdict.sheets import Sheet, sheet_markdown
from kitbench.verdict.statistics import Array
from kitbench.verdict.tuning import tuning_table

CONTROLS = ("conv", "kit-random")
"""Methods without attention, and without a choice of what is attended: what the others have to beat."""
FORWARDS = 3
"""Multiply-adds of a training step per multiply-add of its forward pass: one forward and two in the backward pass."""

MACS_NOTE = (
    f"Those of a training step are {FORWARDS} times those of the forward pass, scaled by pixels from the stated size "
    "to the crop; too many for global attention, which needs fewer per pixel on a small crop."
)


@dataclass(frozen=True)
class Curve:
    """Validation PSNR of one method."""

    method: str
    steps: Array
    """[points], ascending; the last one is the end of the training."""
    psnr_db: Array
    """[seeds, points]"""
    step_seconds: float | None
    """Of a training step: the median over seeds of the time that was measured before training. None: not measured."""
    step_macs: float | None
    """Multiply-adds of a training step; None where the method's are not known."""

    @property
    def final_db(self) -> float:
        """Median over seeds at the end of the training."""
        return float(median(self.psnr_db[:, -1]))


@dataclass(frozen=True)
class CurveSet:
    """The curves of one comparison, all measured on the same crops."""

    title: str
    curves: tuple[Curve, ...]
    measured_on: str
    """Sets and noise level of the crops."""
    clock: str
    """Whose seconds are meant."""
    left_out: tuple[str, ...]
    """Methods with runs that have no validation PSNR on these crops, each with the number of such runs."""
    unlike: tuple[str, ...] = ()
    """Notes on runs that were made differently from most, or by somebody else."""


@dataclass(frozen=True)
class Reached:
    """When one method reached the target."""

    method: str
    seeds: int
    reached: int
    """The number of seeds that reached it."""
    final_db: float
    steps: float
    """The first validated step by which half of the seeds had reached it; infinite: never."""
    seconds: float | None
    macs: float | None


@dataclass(frozen=True)
class Target:
    """The median final validation PSNR of the best control, and when each method reached it."""

    control: str
    psnr_db: float
    lines: tuple[Reached, ...]


def learning_curves(block: ComparedRuns, folders: Mapping[str, RunFolder]) -> CurveSet | None:
    """The curves of a comparison; None where no run has validation PSNR.

    folders: of the runs, by key. Where runs were validated on different sets or noise levels, which say nothing about
    one another, the curves are those of the crops that most runs have. Raises InputError for a damaged log.
    """
    logs: dict[tuple[str, str], dict[str, list[tuple[RunFolder, dict[int, float]]]]] = {}
    runs = {method: _runs(block, method) for method in block.methods}
    for method, keys in runs.items():
        for key in keys:
            found = {n.step: n.validation_psnr_db for n in folders[key].logged() if n.validation_psnr_db is not None}
            if found:
                logs.setdefault(_crops(folders[key].run), {}).setdefault(method, []).append((folders[key], found))
    if not logs:
        return None
    crops = max(logs, key=lambda crops: (sum(map(len, logs[crops].values())), crops))
    missing = {method: len(keys) - len(logs[crops].get(method, [])) for method, keys in runs.items()}
    return CurveSet(
        caption_of(block.first.run, block.suites),
        tuple(_curve(method, own) for method, own in logs[crops].items()),
        crops[1],
        _clock(block.first.run),
        tuple(f"{method} ({count} of {len(runs[method])} runs)" for method, count in missing.items() if count),
        block.unlike(),
    )


def _runs(block: ComparedRuns, method: str) -> list[str]:
    return list(dict.fromkeys(e.run.key for group in block.methods[method].values() for e in group if e.training))


def _crops(run: Run) -> tuple[str, str]:
    """What decides the validation crops: the content of the sets with the noise level; and both in words."""
    level = condition(run.task.conditions[len(run.task.conditions) // 2])
    words = f"{', '.join(run.validation_sets)} {level}".strip()
    return digest([run.validation_sets, level]), words


def _clock(run: Run) -> str:
    threads = run.recipe.threads if run.recipe else None
    if run.device != "cpu":
        return f"on {run.device}"
    if threads is None:
        return "threads not fixed"
    return "one thread" if threads == 1 else f"{threads} threads"


def _curve(method: str, own: Sequence[tuple[RunFolder, dict[int, float]]]) -> Curve:
    """The steps are those at which every seed was validated; the last step of the training always is one."""
    steps = sorted(set.intersection(*(set(log) for _, log in own)))
    psnr = np.array([[log[step] for step in steps] for _, log in own])
    trainings = [folder.training for folder, _ in own]
    known = [training for training in trainings if training is not None]
    seconds = [t.cost.step_seconds for t in known if t.cost.step_seconds is not None]
    macs = step_macs(own[0][0].run, known[0]) if known else None
    return Curve(method, np.array(steps, np.float64), psnr, median(seconds) if seconds else None, macs)


def step_macs(run: Run, training: Training) -> float | None:
    """Multiply-adds of one training step: FORWARDS times those of one forward pass, scaled from the stated resolution.

    Scaling by pixels is exact for methods whose cost is linear in them. None where the multiply-adds are not known.
    """
    macs = training.cost.stated_macs
    if macs is None or run.recipe is None:
        return None
    return FORWARDS * macs * run.recipe.batch * run.recipe.crop**2 / training.cost.resolution**2


def time_to_target(found: CurveSet) -> Target | None:
    """When each method reaches the median final PSNR of the best control; None where there is no control."""
    controls = [curve for curve in found.curves if curve.method in CONTROLS]
    if not controls:
        return None
    best = max(controls, key=lambda curve: curve.final_db)
    return Target(best.method, best.final_db, tuple(_reached(curve, best.final_db) for curve in found.curves))


def _reached(curve: Curve, target: float) -> Reached:
    """With an even number of seeds, the lower median: half of the seeds have then reached the target."""
    first = [curve.steps[above.argmax()] if above.any() else math.inf for above in curve.psnr_db >= target]
    steps = float(median_low(first))
    return Reached(
        curve.method, len(first), sum(map(math.isfinite, first)), curve.final_db, steps,
        None if curve.step_seconds is None else steps * curve.step_seconds,
        None if curve.step_macs is None else steps * curve.step_macs,
    )  # fmt: skip


def target_sheet(found: CurveSet) -> Sheet:
    """Time to target as a table. Without a control it has no line."""
    target = time_to_target(found)
    caption = f"Time to target: {found.title}"
    left_out = [f"Without validation PSNR on these crops: {', '.join(found.left_out)}."] if found.left_out else []
    if target is None:
        controls = " or ".join(CONTROLS)
        none = f"No target: no run of a control ({controls}) has validation PSNR; train one by this recipe."
        return Sheet(caption, (), (), (none, "`kitbench report` draws the curves.", *left_out))
    lines = tuple(
        (
            one.method, f"{one.reached} of {one.seeds}", f"{one.final_db:.2f}", _until(one.steps, "{:,.0f}".format),
            _until(one.seconds, _rounded), _until(one.macs, lambda macs: _rounded(macs / 1e12)),
        )
        for one in target.lines
    )  # fmt: skip
    notes = (
        f"Target: {target.psnr_db:.2f} dB on {found.measured_on}, the median over seeds at the end of the best control "
        f"({target.control}). Counted is the first validated step by which half of a method's seeds had reached it.",
        f"TMACs: 10^12 multiply-adds. {MACS_NOTE}",
        *left_out,
        *found.unlike,
    )
    header = ("Method", "Seeds that reach it", "Final PSNR, dB", "Steps", f"Seconds ({found.clock})", "TMACs")
    return Sheet(caption, header, lines, notes)


def _until(value: float | None, written: Callable[[float], str]) -> str:
    return "n/a" if value is None else written(value) if math.isfinite(value) else "never"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def curves_markdown(runs: Sequence[RunFolder], tunings: Sequence[Tuning], protocol: str | None = None) -> str:
    """Time to target, budget ladders and searches of learning rates as Markdown.

    Raises InputError where these folders hold none of them, or results of two protocols and none was chosen.
    """
    folders = {folder.run.key: folder for folder in runs}
    compared = blocks(entries(runs, protocol)) if runs else []
    curves = [found for block in compared if (found := learning_curves(block, folders)) is not None]
    sheets = [*map(target_sheet, curves), *map(ladder_sheet, ladders(compared))]
    texts = [*map(sheet_markdown, sheets), *(tuning_table(record, "pipe") for record in tunings)]
    if not texts:
        raise InputError(
            "These folders hold no validation PSNR, no two lengths of one recipe and no search of learning rates; "
            "train a suite that names validation sets, or two values of recipe.steps, or give other folders."
        )
    return "\n".join(texts)
