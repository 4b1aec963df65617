"""Figures of learning curves, budget ladders and searches of learning rates, as bytes of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from kitbench.store.records import Tuning
from kitbench.verdict.curves import Curve, CurveSet, time_to_target
from kitbench.verdict.ladder import LadderLine
from kitbench.verdict.page.pictures import NARROWEST, Look, few_ticks, legend_below, logarithmic, new_figure

Axis = Literal["steps", "seconds", "multiply-adds"]
_SCALES: dict[Axis, Callable[[Curve], float | None]] = {
    "steps": lambda curve: 1.0,
    "seconds": lambda curve: curve.step_seconds,
    "multiply-adds": lambda curve: None if curve.step_macs is None else curve.step_macs / 1e12,
}
AXES: tuple[Axis, ...] = tuple(_SCALES)
SHOWN_FROM = 0.2
"""Share of the training whose values may lie below the axis: the first ones would flatten the rest."""
WIDE_RANGE = 3
"""Methods whose whole training differs by more than this factor are shown on a logarithmic axis."""


def curve_plot(found: CurveSet, axis: Axis, look: Look) -> bytes | None:
    """Validation PSNR against an axis: mean over seeds, in a band from the lowest to the highest seed.

    None where no method has this axis measured.
    """
    known = [(curve, scale) for curve in found.curves if (scale := _SCALES[axis](curve)) is not None]
    if not known:
        return None
    label = {
        "steps": "training steps", "seconds": f"seconds of training, {found.clock}",
        "multiply-adds": "multiply-adds of training, TMACs",
    }[axis]  # fmt: skip
    target = time_to_target(found)
    with new_figure(4.5, 4.0, look.form) as (figure, axes, buffer):
        if target is not None:
            axes.axhline(target.psnr_db, color="0.45", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for curve, scale in known:
            colour, marker = look[curve.method]
            x, psnr = curve.steps * scale, curve.psnr_db
            if len(psnr) > 1:
                axes.fill_between(x, psnr.min(0), psnr.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, psnr.mean(0), color=colour, marker=marker, markersize=4, linewidth=1.3, label=curve.method)
        ends = [float(curve.steps[-1] * scale) for curve, scale in known]
        if max(ends) > WIDE_RANGE * min(ends):
            logarithmic(axes)
        else:
            few_ticks(axes)
        axes.set_ylim(_shown([curve for curve, _ in known], [target.psnr_db] if target else []))
        axes.set(xlabel=label, ylabel="validation PSNR, dB")
        legend_below(figure)
    return buffer.getvalue()


def _shown(curves: Sequence[Curve], targets: Sequence[float]) -> tuple[float, float]:
    """The range of the axis: the targets and all values after the first SHOWN_FROM of the training."""
    late = [curve.psnr_db[:, curve.steps >= SHOWN_FROM * curve.steps[-1]].ravel() for curve in curves]
    values = np.concatenate([*late, targets])
    low, high = float(values.min()), float(values.max())
    margin = max(0.05 * (high - low), (NARROWEST - (high - low)) / 2)
    return low - margin, high + margin


def ladder_plot(lines: Sequence[LadderLine], look: Look) -> bytes:
    """Differences against the budget, with 95 % intervals. A difference has the look of the method that is not kit."""
    budgets = sorted({rung.budget.steps for line in lines for rung in line.rungs})
    with new_figure(4.5, 4.0, look.form) as (figure, axes, buffer):
        axes.axhline(0, color="0.4", linewidth=0.8)
        for number, line in enumerate(lines):
            colour, marker = look[line.b if line.a == "kit" and line.b != "conv" else line.a]
            shift = 1 + 0.03 * (number - (len(lines) - 1) / 2)  # bars side by side, not one on another
            x = [rung.budget.steps * shift for rung in line.rungs]
            mean = np.array([rung.compared.found.mean for rung in line.rungs])
            intervals = [rung.compared.found.interval for rung in line.rungs]
            ends = np.array([(i.low, i.high) if i else (m, m) for i, m in zip(intervals, mean, strict=True)])
            axes.errorbar(
                x, mean, np.abs(ends.T - mean), color=colour, marker=marker, markersize=5, linewidth=1.2, capsize=2.5,
                linestyle="-" if line.a == "kit" or line.b == "conv" else "--", label=f"{line.a} - {line.b}",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{steps:,}" for steps in budgets])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="budget: training steps", ylabel="difference in test PSNR, dB")
        legend_below(figure)
    return buffer.getvalue()


def tuning_plot(record: Tuning, look: Look) -> bytes:
    """Validation PSNR against the learning rate, a ring around each method's best; diverged trials have no point."""
    with new_figure(4.5, 4.0, look.form) as (figure, axes, buffer):
        for method, best in record.best.items():
            colour, marker = look[method]
            psnr = {t.lr: math.nan if t.psnr_db is None else t.psnr_db for t in record.trials if t.method == method}
            values = [psnr[rate] for rate in record.rates]
            axes.plot(record.rates, values, color=colour, marker=marker, markersize=5, linewidth=1.2, label=method)
            axes.plot([best], [psnr[best]], "o", color=colour, markersize=12, fillstyle="none", markeredgewidth=1.5)
        axes.set_xscale("log")
        axes.set_xticks(record.rates, [f"{rate:g}" for rate in record.rates])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="learning rate", ylabel="validation PSNR, dB")
        legend_below(figure)
    return buffer.getvalue()
