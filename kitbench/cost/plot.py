"""Log-log pictures of a sweep: FLOPs, memory and time against pixels, a row for inference and one for training steps.

Methods differ in colour (Okabe and Ito's, safe for the colour-blind), in marker and in line, so that gray prints do as
well. Predicted points are hollow; out of memory is crossed out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitbench.cost.report import WORDS, curves

if TYPE_CHECKING:
    from kitbench.cost.scale import Point, Sweep

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
_PANELS = {
    "multiply-adds": (lambda p: p.macs / 1e9, "GMACs"),
    "peak memory": (lambda p: p.bytes / 2**20, "MiB"),
    "time": (lambda p: None if p.seconds is None else 1e3 * p.seconds, "ms"),
}


def draw(sweep: Sweep, folder: Path) -> list[Path]:
    """Write scale.png and scale.svg into `folder`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    whats = list(dict.fromkeys(what for _, what in curves(sweep)))
    sizes = sorted({p.size for p in sweep.points})
    with plt.rc_context({"font.size": 9, "svg.hashsalt": "kitbench", "svg.fonttype": "none"}):
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
        files = [folder / f"scale.{kind}" for kind in ("png", "svg")]
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=150, metadata=metadata)
        plt.close(figure)
    return files


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
    for slope in (1, 2):  # from the lower left corner of the panel
        axes.plot(
            [left, right], [low, low * (right / left) ** slope], color="0.6", linewidth=0.8, linestyle=(0, (1, 2))
        )
        # Where the guide leaves the panel, or two thirds along it: a label beside it.
        end = min(left * (right / left) ** 0.62, left * (high / low) ** (0.8 / slope))
        axes.annotate(
            f"slope {slope}", (end, low * (end / left) ** slope), color="0.4", fontsize=7,
            xytext=(4, -3), textcoords="offset points", va="top",
        )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(low, high))


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
