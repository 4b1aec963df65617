"""Log-log pictures of a sweep: FLOPs, memory and time against pixels, a row for inference and one for training steps.

Methods differ in colour (Okabe and Ito's, safe for the colour-blind), in marker and in line, so that gray prints do as
well. Predicted points are hollow; out of memory is crossed out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from kitbench.store.files import write_atomic
from kitbench.store.sweeps import BRACKET, Point, Sweep
from kitbench.verdict.scaling.fit import WORDS, curves

_STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#000000", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#E69F00", "D", "-."),
    ("#0072B2", "^", "-"),
    ("#009E73", "v", "--"),
    ("#CC79A7", "P", ":"),
    ("#56B4E9", "X", "-."),
    ("#7F7F7F", "*", ":"),
)
UNDATED: dict[str, dict[str, None] | None] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": None}
"""Metadata by format: no date."""
_PANELS: dict[str, tuple[Callable[[Point], float | None], str]] = {
    "multiply-adds": (lambda p: p.macs / 1e9, "GMACs"),
    "peak memory": (lambda p: p.bytes / 2**20, "MiB"),
    "time": (lambda p: None if p.seconds is None else 1e3 * p.seconds, "ms"),
}


def repeatable(font_size: int) -> AbstractContextManager[None]:
    """Settings under which the same data give the same bytes, with text as text."""
    import matplotlib as mpl

    return mpl.rc_context(
        {"font.size": font_size, "svg.hashsalt": "kitbench", "svg.fonttype": "none", "pdf.fonttype": 42}
    )


def draw_sweep(sweep: Sweep, folder: Path) -> list[Path]:
    """Write scale.png and scale.svg into `folder`."""
    files = [folder / f"scale.{kind}" for kind in ("png", "svg")]
    for file, content in zip(files, sweep_figure(sweep, ("png", "svg")), strict=True):
        write_atomic(file, content)
    return files


def sweep_figure(sweep: Sweep, forms: Sequence[str]) -> list[bytes]:
    """The files of a sweep's picture in these formats: the sizes that were asked for."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    asked = tuple(p for p in sweep.points if p.reason != BRACKET)
    sweep = sweep.model_copy(update={"points": asked})
    whats = list(dict.fromkeys(what for _, what in curves(sweep)))
    sizes = sorted({p.size for p in sweep.points})
    with repeatable(9):
        figure, grid = plt.subplots(
            len(whats), len(_PANELS), figsize=(12, 3.6 * len(whats) + 0.9), squeeze=False, layout="constrained"
        )
        for row, what in zip(grid, whats, strict=True):
            for axes, (title, (value, unit)) in zip(row, _PANELS.items(), strict=True):
                for number, method in enumerate(sweep.methods):
                    points = [p for p in sweep.curve(method, what) if value(p)]
                    _curve(axes, points, value, _STYLES[number % len(_STYLES)])
                _dress(axes, f"{title}, {WORDS[what]}", unit, sizes)
        figure.legend(handles=_legend(sweep), loc="outside lower center", ncols=5, frameon=False)
        contents = []
        for form in forms:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=150, metadata=UNDATED[form])
            contents.append(buffer.getvalue())
        plt.close(figure)
    return contents


def _curve(axes: Any, points: list[Point], value: Any, style: tuple[str, str, Any]) -> None:
    colour, marker, line = style
    x, y = [p.size**2 for p in points], [value(p) for p in points]
    axes.plot(x, y, color=colour, linestyle=line, linewidth=1.4)
    counted = axes.get_subplotspec().colspan.start == 0  # FLOPs are counted, never predicted
    timed = axes.get_subplotspec().colspan.start == 2
    for p, px, py in zip(points, x, y, strict=True):
        solid = counted or timed or p.peak_bytes is not None
        face = colour if solid else "white"
        axes.plot([px], [py], marker=marker, markersize=6, color=colour, markerfacecolor=face, linestyle="none")
        if p.status == "oom" and not counted and not timed:
            axes.plot([px], [py], marker="x", markersize=11, color=colour, linestyle="none")


def _dress(axes: Any, title: str, unit: str, sizes: list[int]) -> None:
    if not any(len(line.get_xdata()) for line in axes.lines):
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", color="0.4")
        axes.set(title=title, xticks=[], yticks=[])
        return
    axes.set(xscale="log", yscale="log", title=title, ylabel=unit, xlabel="side of the square map, px")
    axes.set_xticks([s**2 for s in sizes], [str(s) for s in sizes])
    axes.minorticks_off()
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    left, right = sizes[0] ** 2 / 1.6, sizes[-1] ** 2 * 1.6  # the same in every panel
    axes.set(xlim=(left, right), ylim=(low, high))
    occupied = _along([line.get_xydata() for line in axes.lines], axes)
    for slope in (1, 2):  # from the lower left corner of the panel
        x = np.geomspace(left, right, 60)
        guide = np.stack([x, low * (x / left) ** slope], axis=1)
        axes.plot(*guide.T, color="0.6", linewidth=0.8, linestyle=(0, (1, 2)))
        # Its label stands to the right of it, where the curves are farthest.
        inside = guide[(guide[:, 1] < high) & (x < left * (right / left) ** 0.8)]
        centre = axes.transAxes.inverted().transform(axes.transData.transform(inside)) + np.array([0.07, -0.03])
        above = centre[:, 1] > 0.05
        inside, centre = inside[above], centre[above]
        if not above.any():
            continue
        gaps = np.abs(centre[:, None] - occupied[None]) / (0.09, 0.03)  # half a label's width and height
        spot = inside[int(gaps.max(2).min(1).argmax())]
        axes.annotate(
            f"slope {slope}", spot, color="0.4", fontsize=7, xytext=(4, -3), textcoords="offset points", va="top"
        )


def _along(curves: list[Any], axes: Any) -> np.ndarray:
    """Points all along the curves, and the guides drawn so far, in fractions of the panel: [points, 2]."""
    found = []
    for curve in filter(len, curves):  # a method without a single measured point has an empty one
        steps = np.linspace(0, len(curve) - 1, 20 * len(curve))
        dense = [np.exp(np.interp(steps, np.arange(len(curve)), np.log(column))) for column in np.transpose(curve)]
        found.append(axes.transAxes.inverted().transform(axes.transData.transform(np.stack(dense, axis=1))))
    return np.concatenate(found)


def _legend(sweep: Sweep) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle=line, label=method)
        for method, (colour, marker, line) in zip(sweep.methods, _STYLES * len(sweep.methods), strict=False)
    ]
    gray: dict[str, Any] = {"color": "0.3", "linestyle": "none"}
    handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="predicted, not measured", **gray))
    handles.append(Line2D([], [], marker="x", markersize=9, label="out of memory", **gray))
    return handles
