"""The sortable tables of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kitbench.store.records import Tuning
from kitbench.text import capitalised
from kitbench.verdict.compare import Compared, adjusted
from kitbench.verdict.contrasts import ComparedRuns, compare_methods
from kitbench.verdict.layout import Layout, TableValue
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


def table_of(layout: Layout) -> Grid:
    """The main table of a comparison: a column for each metric, under the heading of its data set."""
    columns = [column for column in layout.columns if column.title != "Protocol"]
    groups: list[tuple[str, int]] = []
    for column in columns:
        name, count = groups.pop() if groups and groups[-1][0] == column.group else (column.group, 0)
        groups.append((name, count + 1))
    lines = [list(map(_laid_out, cells)) for cells in zip(*(column.cells for column in columns), strict=True)]
    header = [column.title.replace(" (MiB)", ", MiB") for column in columns]
    return Grid(layout.caption, header, lines, list(layout.notes), layout.runs, groups)


def _laid_out(value: TableValue) -> TableCell:
    text = value.text.replace(",", ", ") if isinstance(value.key, str) else value.text
    return TableCell(text + value.sign, value.key, value.rank, f"± {value.spread}" if value.spread else "")


def differences_of(compared: Sequence[Compared], family: str = "all pairs of methods") -> Grid | None:
    """Differences with intervals and p values. family: what p is corrected for."""
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
        f"images; p is corrected for {family}, one interval is not.",
        "Detects: the smallest true difference that these seeds and images find with 80 % power after the correction.",
        *dict.fromkeys(f"{capitalised(reason)}." for c in compared for reason in (c.found.note, c.without) if reason),
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
    grid = differences_of(adjusted(compared), "all variants")
    assert grid is not None
    return Grid("Effect of each choice in our reading of KiT", grid.header, grid.lines, grid.notes)
