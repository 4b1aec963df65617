"""Figures of stored runs, as SVG, PDF and PNG bytes: the same runs give the same bytes.

A method has the same colour in all figures of a report (Okabe and Ito's palette, safe for colour-blind readers) and a
marker or line style of its own, so that the figures can be read in gray.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from kitbench.errors import InputError
from kitbench.store.folder import RunFolder
from kitbench.verdict.compare import Compared
from kitbench.verdict.scaling.plot import UNDATED, repeatable

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the backend was chosen: no display is needed

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
MARKERS = "osD^vPX*"
NARROWEST = 0.1
"""Extent of an axis of PSNR in dB: methods that differ by less must not look as if they differed."""
ERROR_FULL = 48
"""Error in grey levels that is drawn in the brightest colour of an error map."""


Form = Literal["svg", "pdf"]


@dataclass(frozen=True)
class Look:
    """How the figures of one report are drawn."""

    styles: Mapping[str, tuple[str, str]]
    """Colour and marker of every method."""
    form: Form = "svg"

    def __getitem__(self, method: str) -> tuple[str, str]:
        return self.styles[method]


@contextmanager
def new_figure(width: float, height: float, form: Form = "svg") -> Iterator[tuple[Any, Any, io.BytesIO]]:
    """A figure of one panel; after the block, the buffer contains its file."""
    buffer = io.BytesIO()
    with repeatable(10):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        axes.grid(visible=True, color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(ticker.ScalarFormatter(useOffset=False))
        axes.spines[["top", "right"]].set_visible(False)
        yield figure, axes, buffer
        figure.savefig(buffer, format=form, metadata=UNDATED[form])
        plt.close(figure)


def styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method, no two alike among 64."""
    return {
        m: (COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]) for i, m in enumerate(methods)
    }


@dataclass(frozen=True)
class Quality:
    """A method's mark in a figure of quality against cost."""

    cost: float
    psnr_db: float
    half: float | None
    """Half of the 95 % interval over seeds, dB; None for one seed."""


def pareto(points: Mapping[str, Quality], label: str, column: str, look: Look) -> bytes:
    """PSNR against a cost, with intervals over seeds; methods with one seed are hollow.

    A line joins the methods that no other one beats in both.
    """
    with new_figure(5.2, 3.6, look.form) as (_, axes, buffer):
        front, best = [], -np.inf
        for point in sorted(points.values(), key=lambda p: (p.cost, -p.psnr_db)):
            if point.psnr_db > best:
                front.append((point.cost, point.psnr_db))
                best = point.psnr_db
        axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, drawstyle="steps-post", zorder=1)
        low = min(p.psnr_db - (p.half or 0) for p in points.values())
        high = max(p.psnr_db + (p.half or 0) for p in points.values())
        for place, (method, point) in enumerate(sorted(points.items(), key=lambda item: item[1].psnr_db)):
            colour, marker = look[method]
            face = colour if point.half is not None else "white"
            axes.errorbar(
                [point.cost], [point.psnr_db], point.half, marker=marker, color=colour, markersize=8, capsize=3,
                markerfacecolor=face, linestyle="none",
            )  # fmt: skip
            # Names are in a column of their own, evenly spaced, because points may coincide.
            middle, extent = (low + high) / 2, max(high - low, NARROWEST * 0.9)
            at = middle + extent * ((place + 0.5) / len(points) - 0.5)
            axes.annotate(
                method, (point.cost, point.psnr_db), (1.04, at), textcoords=axes.get_yaxis_transform(), color="0.15",
                va="center", annotation_clip=False, arrowprops={"arrowstyle": "-", "color": "0.8", "linewidth": 0.7},
            )  # fmt: skip
        costs = [point.cost for point in points.values()]
        if min(costs) > 0 and max(costs) > 5 * min(costs):
            logarithmic(axes)
        else:
            few_ticks(axes)
        axes.set(xlabel=label, ylabel=f"PSNR, dB: {column}")
        if high - low < NARROWEST:
            axes.set_ylim((low + high - NARROWEST) / 2, (low + high + NARROWEST) / 2)
    return buffer.getvalue()


def training_curves(logs: Mapping[str, Sequence[RunFolder]], look: Look) -> bytes | None:
    """Training PSNR against steps, the mean over seeds of each method; None where no run has a log."""
    lines = {method: found for method, folders in logs.items() if (found := _curve(folders)) is not None}
    if not lines:
        return None
    with new_figure(4.5, 4.0, look.form) as (figure, axes, buffer):
        for number, (method, (steps, psnr)) in enumerate(lines.items()):
            line = ("-", "--", "-.")[number % 3]
            axes.plot(steps, psnr, color=look[method][0], linewidth=1.2, linestyle=line, label=method)
        legend_below(figure)
        axes.set(xlabel="step", ylabel="PSNR of training crops, dB")
    return buffer.getvalue()


def few_ticks(axes: Any) -> None:
    """So few numbers on the x axis that they do not touch, written plainly."""
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))


def logarithmic(axes: Any) -> None:
    """Make the x axis logarithmic, with plain numbers: the fewer of them in each decade, the more decades."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    decades = np.log10(high / low)
    subs = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 3 else (1,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def legend_below(figure: Any) -> None:
    """Put the legend under the axes, where no curve is."""
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize=9)


def _curve(folders: Sequence[RunFolder]) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and smoothed PSNR, the mean over runs of the same length."""
    lines = [folder.logged() for folder in folders]
    logs = [np.array([(line.step, line.psnr_db) for line in own]) for own in lines if own]
    logs = [log for log in logs if len(log) == len(logs[0]) > 0]
    if not logs:
        return None
    mean = np.mean([log[:, 1] for log in logs], axis=0)
    window = max(1, len(mean) // 20)
    smooth = np.convolve(mean, np.full(window, 1 / window), "valid")
    return logs[0][window - 1 :, 0], smooth


def difference_plot(compared: Sequence[tuple[Compared, np.ndarray]], form: Form) -> bytes:
    """Differences of each method from the best, dB: dots are images (mean over seeds), bars are 95 % intervals."""
    with new_figure(5.2, 0.9 + 0.42 * len(compared), form) as (_, axes, buffer):
        for place, (one, d) in enumerate(compared):
            axes.plot(d.mean(0), np.full(d.shape[1], place + 0.2), "o", color="#56B4E9", alpha=0.6, markersize=5)
            if one.found.interval is not None:
                axes.plot([one.found.interval.low, one.found.interval.high], [place] * 2, color="#000000", linewidth=2)
            axes.plot([one.found.mean], [place], "|", color="#000000", markersize=12)
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_yticks(range(len(compared)), [f"{one.a} - {one.b}" for one, _ in compared])
        axes.set(xlabel="difference in PSNR, dB", ylim=(len(compared) - 0.5, -0.5))
    return buffer.getvalue()


@dataclass(frozen=True)
class Crop:
    """The squares of a stored strip (PNG bytes). `place` is left, top, width and height in % of `whole`."""

    whole: bytes
    degraded: bytes
    restored: bytes
    clean: bytes
    error: bytes
    place: tuple[float, float, float, float]


def crop(path: Path) -> Crop:
    """Read a strip that was stored at evaluation. Raises InputError."""
    try:
        with Image.open(path) as file:
            assert isinstance(file, PngImageFile)
            top, left, side, height, width = json.loads(file.text["place"])
            strip = np.asarray(file.convert("RGB"))
    except (Image.DecompressionBombError, OSError, KeyError, ValueError, AssertionError) as error:
        raise InputError(f"{path} is not a stored crop ({error}); delete it, or run its evaluation again.") from error
    small, degraded, restored, clean = (strip[:, i * side : (i + 1) * side] for i in range(4))
    scale = side / max(height, width)
    small = small[: max(1, round(height * scale)), : max(1, round(width * scale))]
    error_map = np.abs(restored.astype(np.float32) - clean).mean(2) / ERROR_FULL
    coloured = (mpl.colormaps["magma"](np.clip(error_map, 0, 1))[..., :3] * 255).astype(np.uint8)
    place = (100 * left / width, 100 * top / height, 100 * side / width, 100 * side / height)
    palette = Image.fromarray(coloured).quantize(64)
    squares = [png(Image.fromarray(square)) for square in (small, degraded, restored, clean)]
    return Crop(squares[0], squares[1], squares[2], squares[3], png(palette), place)


def png(image: Image.Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
