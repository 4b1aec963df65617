"""The sortable tables of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from kitbench.store.records import Tuning
from kitbench.verdict.compare import Column, Compared, adjusted, heading
from kitbench.verdict.contrasts import ComparedRuns, compare_methods
from kitbench.verdict.render import notes_of, number, ranked, row_name, slowed, unranked
from kitbench.verdict.sheets import Sheet
from kitbench.verdict.tuning import tuning_caption, tuning_cell


@dataclass(frozen=True)
class TableCell:
    """A cell of a table: its text, and the value to sort by."""

    text: str
    key: float | str
    rank: int = 0
    """1 best, 2 second."""
    below: str = ""
    """A second line, in small print."""


@dataclass(frozen=True)
class Grid:
    """A sortable table."""

    caption: str
    header: list[str]
    lines: list[list[TableCell]]
    notes: list[str] = field(default_factory=list)
    runs: dict[str, list[str]] = field(default_factory=dict)
    """Keys of the runs behind each line, where no column states them."""
    groups: list[tuple[str, int]] = field(default_factory=list)
    """Headings over several columns, each with their number; empty: none."""


def table_cell(text: str, key: float | str | None = None, rank: int = 0) -> TableCell:
    return TableCell(text, text if key is None else key, rank)


def grid_of(sheet: Sheet) -> Grid:
    """A table of texts, sorted by the numbers that they state; never comes behind all of them."""
    return Grid(
        sheet.caption, list(sheet.header), [list(map(_sorted, line)) for line in sheet.lines], list(sheet.notes)
    )


def _sorted(text: str) -> TableCell:
    number = text.partition(" [")[0].replace(",", "")
    try:
        return TableCell(text, float(number))
    except ValueError:
        return TableCell(text, math.inf if text == "never" else text)


def tuning_grid(record: Tuning) -> Grid:
    """A search of learning rates: a line for each method, its best rate marked."""
    trials = {(trial.method, trial.lr): trial.psnr_db for trial in record.trials}
    lines = []
    for method, best in record.best.items():
        line = [table_cell(method)]
        for rate in record.rates:
            psnr, mark = trials[method, rate], "*" * (rate == best)
            line.append(table_cell(tuning_cell(psnr) + mark, -math.inf if psnr is None else psnr, rank=len(mark)))
        lines.append(line)
    return Grid(tuning_caption(record), ["Learning rate", *(f"{rate:g}" for rate in record.rates)], lines)


def _amount(value: Any, digits: int) -> TableCell:
    return TableCell(number(value, digits), -math.inf if value is None or pd.isna(value) else float(value))


def table_of(block: pd.DataFrame, caption: str) -> Grid:
    columns: list[Column] = list(dict.fromkeys(zip(block["data_set"], block["condition"], strict=True)))
    metrics = [("psnr_db", "PSNR dB", 2, True), ("ssim", "SSIM", 4, True)]
    metrics += [("lpips", "LPIPS", 4, False)] if block["lpips"].notna().any() else []
    resolution = block["resolution"].dropna()
    at = f" at {resolution.iloc[0]:.0f} px" if len(resolution) else ""
    header = ["Method", *(name for _ in columns for _, name, _, _ in metrics)]
    groups = [("", 1), *((heading(column), len(metrics)) for column in columns), ("", 5)]
    header += ["Parameters", f"GMACs{at}", "Peak memory of a step, MiB", "s a step", "Seeds"]
    lines, runs = [], {}
    for method, own in block.groupby("method", sort=False):
        line = [table_cell(row_name(own.iloc[0]))]
        for column in columns:
            match = own[(own["data_set"] == column[0]) & (own["condition"] == column[1])]
            for metric, _, digits, higher in metrics:
                line.append(_score(block, match, column, metric, digits, higher))
        first = own.iloc[0]
        peak = first["train_peak_bytes"]
        macs, step = _amount(first["gmacs"], 2), _amount(None if slowed(first) else first["seconds_per_step"], 3)
        mark = "†" if isinstance(first["gmacs_note"], str) else ""
        line += [
            _amount(first["parameters"], 0),
            TableCell(macs.text + mark, macs.key),
            _amount(None if pd.isna(peak) else peak / 2**20, 1),
            TableCell(step.text + ("‡" if slowed(first) else ""), step.key),
            table_cell(str(first["seeds"]).replace(",", ", ")),
        ]
        lines.append(line)
        runs[str(method)] = list(dict.fromkeys(",".join(own["runs"]).split(",")))
    return Grid(caption, header, lines, notes_of(block), runs, groups)


def _score(
    block: pd.DataFrame, match: pd.DataFrame, column: Column, metric: str, digits: int, higher: bool
) -> TableCell:
    if not len(match):
        return _amount(None, digits)
    row = match.iloc[0]
    text = number(row[metric], digits)
    best, second = ranked(block, column, metric, digits, higher)
    spread = row.get(metric.removesuffix("_db") + "_pm_seeds")
    below = "" if spread is None or pd.isna(spread) else f"± {spread:.{digits}f}"
    star = "" if metric != "psnr_db" else "*" if row["within_noise"] == 1 else "§" if unranked(row) else ""
    rank = 0 if not row["ranked"] else 1 if text == best else 2 if text == second else 0
    return TableCell(text + star, _amount(row[metric], digits).key, rank, below)


def differences_of(compared: Sequence[Compared]) -> Grid | None:
    if not compared:
        return None
    header = [
        "Difference",
        "Mean, dB",
        "95 % interval",
        "on these images alone",
        "p (Holm)",
        "Detects, dB",
        "Seeds",
        "Images",
        "Runs",
    ]
    lines = []
    for c in compared:
        f = c.found
        intervals = [
            table_cell("no interval" if i is None else f"[{i.low:+.3f}, {i.high:+.3f}]")
            for i in (f.interval, f.interval_seeds)
        ]
        lines.append(
            [
                table_cell(f"{c.a} - {c.b}"), TableCell(f"{f.mean:+.3f}", f.mean), *intervals,
                TableCell("n/a" if c.p_holm is None else f"{c.p_holm:.3g}", math.inf if c.p_holm is None else c.p_holm),
                TableCell("n/a" if c.detectable is None else f"{c.detectable:.3f}", c.detectable or math.inf),
                table_cell(str(f.seeds), f.seeds), table_cell(str(f.images), f.images), table_cell(" ".join(c.runs)),
            ]
        )  # fmt: skip
    notes = [
        "Paired by seed and image; an image's mean over its conditions. Interval and p hold for other seeds and other "
        "images; p is corrected for all pairs of methods, one interval is not.",
        "Detects: the smallest true difference that these seeds and images find with 80 % power after the correction.",
        *dict.fromkeys(c.found.note + "." for c in compared if c.found.note),
    ]
    return Grid("Differences from the best", header, lines, notes)


def ablation(block: ComparedRuns | None) -> Grid | None:
    """The effect of each choice in our reading of KiT: every variant of kit against kit."""
    if block is None or "kit" not in block.methods:
        return None
    variants = [m for m in block.methods if m.startswith("kit-")]
    compared = [c for c in (compare_methods(block, m, "kit") for m in variants) if c is not None]
    if not compared:
        return None
    grid = differences_of(adjusted(compared))
    assert grid is not None
    return Grid("Effect of each choice in our reading of KiT", grid.header, grid.lines, grid.notes)
