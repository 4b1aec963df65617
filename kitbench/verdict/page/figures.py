"""The figures of the report: costs, curves, ladders, searches, differences, sweeps and crops."""

from __future__ import annotations

import base64
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from kitbench.store.folder import RunFolder
from kitbench.store.records import Run, Tuning
from kitbench.store.sweeps import Sweep
from kitbench.verdict.claims import QUESTIONS
from kitbench.verdict.compare import Column, Compared, heading
from kitbench.verdict.contrasts import ComparedRuns
from kitbench.verdict.curves import learning_curves, target_sheet, time_to_target
from kitbench.verdict.entries import Entry, labels, suites_by_comparison
from kitbench.verdict.ladder import Ladder, ladder_sheet
from kitbench.verdict.layout import caption_of
from kitbench.verdict.page import curve_pictures, pictures
from kitbench.verdict.page.tables import Grid, grid_of, tuning_grid
from kitbench.verdict.scaling.plot import sweep_figure

CROP_BYTES = 5_000_000
"""Largest size in bytes of all crops in a report; it states how many images were left out."""


@dataclass(frozen=True)
class Figure:
    """A figure and what names it."""

    name: str
    """Of its file, without suffix."""
    title: str
    image: bytes
    """SVG or PDF."""
    wide: bool = False

    @property
    def source(self) -> str:
        """An SVG as a data URL."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.image).decode()


@dataclass(frozen=True)
class Curves:
    """How the methods of one comparison learn."""

    pictures: list[Figure]
    note: str
    target: Grid | None


@dataclass(frozen=True)
class Panel:
    """One method's crop of an image."""

    method: str
    psnr: str
    run: str
    image: str
    error: str | None


@dataclass(frozen=True)
class Gallery:
    """The crops of one image under one condition."""

    title: str
    comparison: str
    """What its runs share, where the page has several comparisons; else empty."""
    whole: str
    place: tuple[float, float, float, float]
    panels: list[Panel]


def pictures_of(
    block: pd.DataFrame, trained: ComparedRuns | None, compared: list[tuple[Compared, Any]], look: pictures.Look
) -> list[Figure]:
    """Of one comparison: PSNR against costs, and the differences from the best."""
    if trained is None:
        return []
    methods = list(trained.methods)
    records = block.to_dict("records")
    scored: dict[Column, list[float]] = {}
    for row in records:
        if row["method"] in methods:
            scored.setdefault((row["data_set"], row["condition"]), []).append(_from_25(row["sigma"]))
    column = min(scored, key=lambda one: (-len(scored[one]), scored[one][0]))  # the first that most methods have
    here = {row["method"]: row for row in records if (row["data_set"], row["condition"]) == column}
    name = heading(column)
    shown = []
    for kind, field_name, scale, label in (
        ("multiply-adds", "gmacs", 1.0, f"GMACs of an image of {_side(records)} px"),
        ("memory", "train_peak_bytes", 2.0**20, "peak memory of a training step, MiB"),
    ):
        points = {
            m: pictures.Quality(
                float(here[m][field_name]) / scale, float(here[m]["psnr_db"]), _known(here[m]["psnr_pm_seeds"])
            )
            for m in methods
            if m in here and pd.notna(here[m][field_name]) and math.isfinite(here[m]["psnr_db"])
        }
        if points:
            drawn = pictures.pareto(points, label, name, look)
            title = f"PSNR on {name} against {label}; bar: 95 % interval over seeds, hollow: one seed"
            shown.append(Figure(f"{_prefix(trained.first.run)}-psnr-{kind}", title, drawn))
    if compared:
        title = "Differences from the best, image by image; bar: 95 % interval over seeds and images"
        drawn = pictures.difference_plot(compared, look.form)
        shown.append(Figure(f"{_prefix(trained.first.run)}-differences", title, drawn))
    return shown


def _side(records: Sequence[Mapping[Hashable, Any]]) -> str:
    """Side in pixels of the square image that multiply-adds are stated for."""
    return " or ".join(
        f"{side:.0f}" for side in sorted({row["resolution"] for row in records if row["resolution"] > 0})
    )


def curves_of(block: ComparedRuns, folders: dict[str, RunFolder], look: pictures.Look) -> Curves:
    """The learning curves of a comparison and its time to target; training curves where nothing was validated."""
    found, prefix = learning_curves(block, folders), _prefix(block.first.run)
    if found is None:
        drawn = pictures.training_curves({m: _folders(block, m, folders) for m in block.methods}, look)
        note = (
            "These runs were not validated during training, so there is no time to target. Shown is the PSNR of "
            "training crops, the mean over seeds, smoothed over 5 % of the steps."
        )
        shown = [] if drawn is None else [Figure(f"{prefix}-training", "Training curves", drawn)]
        return Curves(shown, note, None)
    drawn_by_axis = {axis: curve_pictures.curve_plot(found, axis, look) for axis in curve_pictures.AXES}
    shown = [
        Figure(f"{prefix}-curve-{axis}", f"Validation PSNR against {axis}", drawn)
        for axis, drawn in drawn_by_axis.items()
        if drawn is not None
    ]
    dashed = "; dashed: the target" if time_to_target(found) else ""
    note = (
        f"Crops of {found.measured_on}. Mean over seeds; band: from the lowest to the highest seed{dashed}. "
        "The first fifth of the training may lie below the axis."
    )
    return Curves(shown, note, replace(grid_of(target_sheet(found)), caption="Time to target"))


def ladder_of(ladder: Ladder, look: pictures.Look) -> tuple[list[Figure], Grid]:
    """A budget ladder: the contrasts of the claims and all methods against the control without attention."""
    claimed = {(a, b) for a, b, _ in QUESTIONS.values()}
    parts = {
        "claims": (
            "pairs that the claims compare",
            [line for line in ladder.lines if (line.a, line.b) in claimed],
        ),
        "conv": ("each method against conv", [line for line in ladder.lines if (line.a, line.b) not in claimed]),
    }
    shown = [
        Figure(
            f"ladder-{ladder.name}-{kind}",
            f"Difference against budget, {name}: mean over images and seeds, 95 % interval over both",
            curve_pictures.ladder_plot(lines, look),
        )
        for kind, (name, lines) in parts.items()
        if lines
    ]
    return shown, grid_of(ladder_sheet(ladder))


def tuning_of(record: Tuning, look: pictures.Look) -> tuple[list[Figure], Grid]:
    """A search of learning rates."""
    title = "Validation PSNR against the learning rate; ring: the method's best"
    name = f"rates-{record.suite}-{record.preset}-{record.mode}-{record.steps}"
    return [Figure(name, title, curve_pictures.tuning_plot(record, look))], tuning_grid(record)


def _prefix(run: Run) -> str:
    """What the names of the figures of a run's comparison begin with."""
    assert run.recipe is not None
    return f"{run.suite}-{run.mode}-{run.recipe.name}-{run.recipe.steps}-lr{run.recipe.lr:g}"


def _known(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


def _from_25(sigma: float | None) -> float:
    """Distance of a noise level from 25, which is shown first; 0 where a task has none."""
    return 0.0 if sigma is None or math.isnan(sigma) else abs(sigma - 25)


def _folders(block: ComparedRuns, method: str, folders: dict[str, RunFolder]) -> list[RunFolder]:
    keys = dict.fromkeys(e.run.key for group in block.methods[method].values() for e in group)
    return [folders[key] for key in keys]


def _png(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def galleries_of(found: Sequence[Entry], folders: dict[str, RunFolder]) -> tuple[list[Gallery], int]:
    """Stored crops of the lowest seed of each method, up to CROP_BYTES; and the number of images left out.

    A gallery shows the runs of one comparison, with the references that need no training.
    """
    names = labels(found)
    suites = suites_by_comparison(found)
    captions: dict[str, dict[str, tuple[int, str]]] = {}
    for run in sorted((entry.run for entry in found), key=lambda run: run.key):
        if run.recipe is not None:
            captions.setdefault(run.mode, {})[run.comparison] = (
                run.recipe.steps,
                caption_of(run, suites[run.comparison]),
            )
    groups: dict[tuple[Any, ...], dict[str, tuple[Path, Entry, int]]] = {}
    for entry in sorted(found, key=lambda e: (bool(e.run.comparison), names[e.run.key, e.run.method], e.run.seed or 0)):
        evaluation, own = entry.evaluation, captions.get(entry.run.mode, {"": (0, "")})
        for place in range(len(evaluation.scores)):
            path = folders[entry.run.key].crop_path(evaluation.data_set, evaluation.sigma, evaluation.stamp, place)
            if not path.is_file():
                break
            for comparison in [entry.run.comparison] if entry.run.comparison else own:
                image = (_from_25(evaluation.sigma), entry.run.mode, evaluation.data_set, place)
                key = (*image, comparison, own[comparison] if len(own) > 1 else (0, ""))
                name = names[entry.run.key, entry.run.method]
                groups.setdefault(key, {}).setdefault(name, (path, entry, place))
    # A comparison whose runs have no crops of an image gets no gallery of references alone.
    groups = {
        key: methods
        for key, methods in groups.items()
        if key[-1] == (0, "") or any(entry.run.comparison for _, entry, _ in methods.values())
    }
    galleries, size, left_out = [], 0, 0
    for (*_, (_, caption)), methods in sorted(groups.items(), key=lambda item: (*item[0][:4], item[0][5], item[0][4])):
        if size > CROP_BYTES:
            left_out += 1
            continue
        gallery = _gallery(methods, caption)
        size += sum(len(p.image) + len(p.error or "") for p in gallery.panels)
        galleries.append(gallery)
    return galleries, left_out


def _gallery(methods: dict[str, tuple[Path, Entry, int]], comparison: str) -> Gallery:
    cut = {name: pictures.crop(path) for name, (path, _, _) in methods.items()}
    first = next(iter(cut.values()))
    _, entry, place = next(iter(methods.values()))
    panels = [Panel("ground truth", "", "", _png(first.clean), None)]
    panels += [Panel("input", "", "", _png(first.degraded), None)] if "input" not in methods else []
    for name, (_, own, _) in sorted(methods.items(), key=lambda item: item[0] != "input"):
        psnr = own.evaluation.scores[place].psnr
        shown = "exact" if psnr is None else f"{psnr:.2f} dB"
        panels.append(Panel(name, shown, own.run.key[:10], _png(cut[name].restored), _png(cut[name].error)))
    evaluation = entry.evaluation
    image = f"{evaluation.scores[place].image} {evaluation.condition}".strip()
    title = f"{evaluation.data_set}: {image} ({entry.run.mode})"
    return Gallery(title, comparison, _png(first.whole), first.place, panels)


def scaling(sweep: Sweep, form: pictures.Form = "svg") -> Figure:
    """Cost against resolution."""
    title = f"Cost against resolution: {sweep.subject}, on {sweep.device} (sweep {sweep.key[:10]})"
    [drawn] = sweep_figure(sweep, [form])
    return Figure(f"scale-{sweep.key[:10]}", title, drawn, wide=True)
