"""The layout of a table: what stands in each of its cells, whoever prints it.

Text formats (render.py) and the report (page/tables.py) print the same cells, signs and notes.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd

from kitbench.spec.shipped import builtin
from kitbench.store.records import Run
from kitbench.text import capitalised, counted, shown
from kitbench.verdict.compare import SCENES, Column, heading

NOT_MEASURED = "n/a"
SLOWED = 0.05
"""Share of the time that a training waited for a processor, from which on its seconds per step are not shown."""


@dataclass(frozen=True)
class TableValue:
    """A cell."""

    text: str
    """The value as printed."""
    key: float | str
    """To sort by."""
    rank: int = 0
    """1: the best of its column, 2: the second."""
    spread: str = ""
    """Half the interval over seeds, as printed; empty where there is none."""
    sign: str = ""
    """What refers to a note."""


@dataclass(frozen=True)
class TableColumn:
    """A column, with a cell for each method."""

    title: str
    cells: tuple[TableValue, ...]
    group: str = ""
    """The data set and condition that several columns belong to."""


@dataclass(frozen=True)
class Layout:
    """A table."""

    caption: str
    columns: tuple[TableColumn, ...]
    notes: tuple[str, ...]
    runs: dict[str, list[str]]
    """Keys of the runs behind each method."""


def layout_of(block: pd.DataFrame, caption: str) -> Layout:
    """The table of the rows of one comparison."""
    rows = dict(iter(block.groupby("method", sort=False)))
    runs = {str(method): list(dict.fromkeys(",".join(own["runs"]).split(","))) for method, own in rows.items()}
    firsts = [own.iloc[0] for own in rows.values()]
    names = TableColumn("Method", tuple(TableValue(row_name(row), row_name(row)) for row in firsts))
    own = list(rows.values())
    columns = (names, *_score_columns(block, own), *_cost_columns(block, firsts), *_origin_columns(own))
    return Layout(caption, columns, tuple(notes_of(block)), runs)


def _score_columns(block: pd.DataFrame, rows: list[pd.DataFrame]) -> Iterator[TableColumn]:
    metrics = [("psnr_db", "PSNR dB", 2, True), ("ssim", "SSIM", 4, True)]
    metrics += [("lpips", "LPIPS", 4, False)] if block["lpips"].notna().any() else []
    columns: list[Column] = list(dict.fromkeys(zip(block["data_set"], block["condition"], strict=True)))
    for column in columns:
        for metric, title, digits, higher in metrics:
            best = ranked(block, column, metric, digits, higher)
            matches = [own[(own["data_set"] == column[0]) & (own["condition"] == column[1])] for own in rows]
            cells = (_score(match, metric, digits, best) for match in matches)
            yield TableColumn(title, tuple(cells), heading(column))


def _score(match: pd.DataFrame, metric: str, digits: int, best: tuple[str, str | None]) -> TableValue:
    if not len(match):
        return _amount(None, digits)
    row = match.iloc[0]
    value = _amount(row[metric], digits)
    spread = row.get(metric.removesuffix("_db") + "_pm_seeds")
    sign = "" if metric != "psnr_db" else "*" if row["within_noise"] == 1 else "§" if unranked(row) else ""
    rank = 0 if not row["ranked"] else 1 if value.text == best[0] else 2 if value.text == best[1] else 0
    return TableValue(
        value.text, value.key, rank, "" if spread is None or pd.isna(spread) else f"{spread:.{digits}f}", sign
    )


def _cost_columns(block: pd.DataFrame, firsts: list[pd.Series]) -> Iterator[TableColumn]:
    """What each method costs. firsts: a row of each."""
    resolution = block["resolution"].dropna()
    at = f" at {resolution.iloc[0]:.0f} px" if len(resolution) else ""
    yield TableColumn("Parameters", tuple(_amount(row["parameters"], 0) for row in firsts))
    yield TableColumn(f"GMACs{at}", tuple(map(_macs, firsts)))
    peaks = (
        _amount(None if pd.isna(row["train_peak_bytes"]) else row["train_peak_bytes"] / 2**20, 1) for row in firsts
    )
    yield TableColumn("Peak memory per step (MiB)", tuple(peaks))
    steps = (
        _amount(None, 3, "‡") if slowed(row) else _amount(row["seconds_per_step"], 3) for row in firsts
    )  # fmt: skip
    yield TableColumn("s per step", tuple(steps))


def _origin_columns(rows: list[pd.DataFrame]) -> Iterator[TableColumn]:
    yield TableColumn("Seeds", tuple(TableValue(seeds, seeds) for seeds in map(_seeds, rows)))
    yield TableColumn("Protocol", tuple(TableValue(str(p), str(p)) for p in (own["protocol"].iloc[0] for own in rows)))


def _seeds(own: pd.DataFrame) -> str:
    """The seeds of a method: `0,1,2`, or `0,1,2; 0 on Set12 σ25` where it has others on some of its sets."""
    on: dict[str, list[str]] = {}
    for seeds, data_set, condition in zip(own["seeds"], own["data_set"], own["condition"], strict=True):
        on.setdefault(str(seeds), []).append(heading((data_set, condition)))
    usual, *others = sorted(on, key=lambda seeds: -len(on[seeds]))  # the first of equally frequent ones
    return "; ".join([usual, *(f"{seeds} on {', '.join(on[seeds])}" for seeds in others)])


def _amount(value: Any, digits: int, sign: str = "") -> TableValue:
    key = -math.inf if value is None or pd.isna(value) else float(value)
    return TableValue(number(value, digits), key, sign=sign)


def _macs(row: pd.Series) -> TableValue:
    """What the implementation executes and, where that is more, what the method's definition needs."""
    executed = _amount(row["gmacs"], 2)
    needed = "" if pd.isna(row["gmacs_needed"]) else f" (needs {number(row['gmacs_needed'], 2)})"
    return TableValue(executed.text + needed, executed.key, sign="†" * isinstance(row["gmacs_note"], str))


def unranked(row: pd.Series) -> bool:
    """Whether a trained row is left out of the ranking because it has other seeds than the rows that are ranked."""
    return bool(row["seeds"] != "-" and not row["ranked"])


def notes_of(block: pd.DataFrame) -> list[str]:
    """What the signs in a block mean, and what its seeds and images could have shown."""
    noted = block.dropna(subset=["gmacs_note"]).drop_duplicates("method")
    notes = [f"† {row['method']}: {row['gmacs_note']}." for row in noted.to_dict("records")]
    if block["gmacs_needed"].notna().any():
        notes.append(
            "GMACs: those that the implementation executes; in parentheses those that the definition needs, where the "
            "implementation executes more."
        )
    searched = block.dropna(subset=["retrieval"]).drop_duplicates("method")
    notes += [f"Retrieval of {row['method']}: {row['retrieval']}." for row in searched.to_dict("records")]
    waited = [row["contended"] for _, row in block.iterrows() if slowed(row)]
    if waited:
        notes.append(
            f"‡ not shown, because other work slowed these steps: they waited for a processor up to {max(waited):.0%} "
            "of the time."
        )
    compared = block[block["best"].notna()]
    if block["psnr_pm_seeds"].notna().any():
        notes.append("± half the 95 % confidence interval over seeds (Student), for exactly these images.")
    if compared["p_holm"].notna().any():
        star = (
            "* not distinguishable from the best of its column at 5 % (paired over seeds and images, Holm's correction "
            "over all pairs of the table)."
        )
        notes.append(f"{star} {detects(compared['detectable_db'].max())}")
    together = [str(name) for name in dict.fromkeys(compared["data_set"]) if name in SCENES]
    notes += [f"{name}: the images of one scene are averaged and count as one image." for name in together]
    notes += _other_bests(block)
    others = block[[unranked(row) for _, row in block.iterrows()]]
    if len(others):
        seeds = "; ".join(dict.fromkeys(block[block["ranked"]]["seeds"]))
        notes.append(f"§ not ranked and not compared: other seeds than the ranked rows ({seeds}).")
    made: dict[str, list[str]] = {}
    for row in block.dropna(subset=["deviation"]).drop_duplicates("method").to_dict("records"):
        made.setdefault(row["deviation"], []).append(row["method"])
    notes += [f"¶ Runs of {', '.join(methods)} were {text}." for text, methods in made.items()]
    reasons = dict.fromkeys(compared["statistics_note"].dropna())
    return notes + [f"{capitalised(reason)}; such differences are not decided." for reason in reasons]


def _other_bests(block: pd.DataFrame) -> list[str]:
    """Of columns whose best by printed means is not the one that the others are compared with."""
    notes = []
    for (data_set, condition), own in block[block["ranked"]].groupby(["data_set", "condition"], sort=False):
        tested = next(iter(own["best"].dropna()), None)
        printed = own.set_index("method")["psnr_db"].round(2)
        if tested is not None and printed[tested] < printed.max():
            notes.append(
                f"{heading((str(data_set), str(condition)))}: the others are compared with {tested}, whose mean is the "
                "highest where every scene, or every image that all of them have, counts once."
            )
    return notes


def detects(db: float) -> str:
    """What the seeds and images of a table or a comparison can show. Empty for NaN."""
    return (
        ""
        if pd.isna(db)
        else f"These seeds and images detect differences of {shown(db, 2)} dB or more with 80 % power."
    )


def row_name(row: pd.Series) -> str:
    """What a row is called: its method, with the form of its computation, and a sign where other code made it."""
    return named(str(row["method"]), row["form"]) + ("¶" if isinstance(row["deviation"], str) else "")


def slowed(row: pd.Series) -> bool:
    """Whether a row's seconds per step were measured while other work held the processors."""
    return bool(pd.notna(row["contended"]) and row["contended"] > SLOWED)


@cache
def _shipped(key: str) -> dict[str, float]:
    """A number of every shipped recipe, by its name: a caption names another one."""
    return {name: float(tomllib.loads(text).get(key, 0.0)) for name, text in builtin("recipes").items()}


def caption_of(run: Run, suites: Iterable[str] = ()) -> str:
    """What all runs of a table share, one of which is given. suites: theirs, where they are of several."""
    names = ", ".join(sorted(set(suites))) or run.suite
    if run.recipe is None or run.backbone is None:
        return f"{names}, {run.mode}: training-free methods"
    recipe, backbone = run.recipe, run.backbone
    crops = f"{counted(recipe.batch, 'crop')}"
    threads = recipe.threads or run.environment.threads
    where = f"{run.device}, {counted(threads, 'thread')}" if run.device == "cpu" else run.device
    tuned = f", fine-tuned from {recipe.init.rpartition('/')[2]}" if recipe.init is not None else ""
    rate = "" if _shipped("lr").get(recipe.name) in (None, recipe.lr) else f", learning rate {recipe.lr:g}"
    ema = "" if _shipped("ema").get(recipe.name) in (None, recipe.ema) else f", ema {recipe.ema:g}"
    return (
        f"{names}, {run.mode}, recipe {recipe.name} "
        f"({counted(recipe.steps, 'step')} of {crops} of {recipe.crop} px{rate}{ema}{tuned}), "
        f"width {backbone.width}, attention at levels {', '.join(map(str, backbone.attention_levels))}, on {where}"
    )


def ranked(block: pd.DataFrame, column: Column, metric: str, digits: int, higher: bool) -> tuple[str, str | None]:
    """The best and the second value among the ranked rows of a column, as printed: equal prints share a rank.

    Empty, None where none is the best: one row is ranked alone, or a trained row with other seeds has a better value.
    """
    here = block[(block["data_set"] == column[0]) & (block["condition"] == column[1])]
    match, left_out = (
        here[here["ranked"]][metric].dropna(),
        here[(here["seeds"] != "-") & ~here["ranked"]][metric].dropna(),
    )
    values = sorted({round(float(value), digits) for value in match}, reverse=higher) if len(match) > 1 else []
    if values and any(value > values[0] if higher else value < values[0] for value in left_out.round(digits)):
        values = []
    return (number(values[0], digits) if values else "", number(values[1], digits) if len(values) > 1 else None)


def named(method: str, form: object) -> str:
    """The name of a row: the method and the form of its computation, which decides the memory that it takes."""
    return method if not isinstance(form, str) or f"form {form}" in method else f"{method} ({form})"


def number(value: Any, digits: int) -> str:
    if value is None or pd.isna(value):
        return NOT_MEASURED
    return "inf" if math.isinf(value) else f"{value:,.{digits}f}"
