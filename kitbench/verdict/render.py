"""Tables as papers print them: the same runs give the same bytes.

The wide form prints methods down, data sets and sigmas across, a block per comparison: only runs that share everything
but the attention are in one block. Bold (best), underline (second) and star (not distinguishable from the best, by
compare.py and statistics.py) speak of the same rows: the trained ones that have the same seeds. Rows of two protocols
are refused. Published figures are in a block of their own.
"""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from tabulate import tabulate

from kitbench.store.folder import RunFolder
from kitbench.store.records import Run
from kitbench.verdict import published
from kitbench.verdict.compare import Column, heading
from kitbench.verdict.entries import Entry, entries
from kitbench.verdict.rows import rows

Format = Literal["markdown", "latex", "csv", "json", "terminal"]
NOT_MEASURED = "n/a"
NARROW = 100
"""Characters of a table on the terminal."""
SLOWED = 0.05
"""Share of the time that a training waited for a processor, from which on its seconds a step carry a sign."""


def render(runs: Sequence[RunFolder], form: Format, protocol: str | None = None, wide: bool = False) -> str:
    """The table of these runs in one of the formats, ending in a newline.

    On the terminal it is at most NARROW characters wide and shows PSNR and the main costs; `wide`: all columns.
    """
    table = rows(runs, protocol)
    if form == "csv":
        text = io.StringIO()
        table.to_csv(text, index=False, lineterminator="\n", float_format="%.6g")
        return text.getvalue()
    if form == "json":
        records = json.loads(table.to_json(orient="records", double_precision=10))
        return json.dumps(records, indent=1) + "\n"
    narrow = form == "terminal" and not wide
    blocks = [_block(block, run, form, narrow) for block, run in split(table, entries(runs, protocol))]
    figures = published.lines(set(zip(table["data_set"], table["condition"], strict=True)))
    if figures:
        blocks.append(_published(figures, form))
    return "\n".join(blocks)


def split(table: pd.DataFrame, found: Sequence[Entry]) -> Iterator[tuple[pd.DataFrame, Run]]:
    """The rows that may be compared, block by block, each with a run that shares what the block shares."""
    described = {entry.run.comparison[:10]: entry.run for entry in found}
    for mode in dict.fromkeys(table["mode"]):
        here = table[table["mode"] == mode]
        for comparison in [name for name in dict.fromkeys(here["comparison"]) if name] or [""]:
            yield here[here["comparison"].isin([comparison, ""])], described[comparison]


def _published(figures: list[list[str]], form: Format) -> str:
    styles = _STYLES[form]
    lines = [[styles.escape(cell) for cell in line] for line in figures]
    if form == "latex":
        return _latex(published.HEADING, published.HEADER, lines, [published.CAUTION], aligned="llllrl")
    return f"{styles.bold(published.HEADING)}\n\n{_grid(published.HEADER, lines, form)}\n\n{published.CAUTION}\n"


def _block(block: pd.DataFrame, run: Run, form: Format, narrow: bool) -> str:
    styles = _STYLES[form]
    columns: list[Column] = list(dict.fromkeys(zip(block["data_set"], block["condition"], strict=True)))
    metrics = [("psnr_db", "PSNR dB", 2, True)]
    metrics += [] if narrow else [("ssim", "SSIM", 4, True)]
    metrics += [("lpips", "LPIPS", 4, False)] if block["lpips"].notna().any() and not narrow else []
    rows_of = dict(iter(block.groupby("method", sort=False)))
    layout = {"Method": [styles.escape(row_name(own.iloc[0])) for own in rows_of.values()]}
    for column in columns:
        ranks = [(m, digits, ranked(block, column, m, digits, higher)) for m, _, digits, higher in metrics]
        layout[f"{heading(column)}: {' / '.join(name for _, name, _, _ in metrics)}"] = [
            _scores(own[(own["data_set"] == column[0]) & (own["condition"] == column[1])], ranks, styles)
            for own in rows_of.values()
        ]
    layout |= _costs(block, [own.iloc[0] for own in rows_of.values()], styles, narrow)
    notes, caption = notes_of(block), caption_of(run)
    runs = {method: dict.fromkeys(",".join(own["runs"]).split(",")) for method, own in rows_of.items()}
    if not narrow:
        notes.append("Runs: " + "; ".join(f"{method!s} {', '.join(keys)}" for method, keys in runs.items()) + ".")
    if form == "latex":
        lines = [list(line) for line in zip(*layout.values(), strict=True)]
        return _latex(caption, list(layout), lines, notes, "l" + "r" * (len(layout) - 1))
    below = "".join(f"\n{styles.escape(note)}\n" if form == "markdown" else f"{_wrapped(note)}\n" for note in notes)
    grids = [_grid(list(part), [list(line) for line in zip(*part.values(), strict=True)], form)
             for part in (_parts(layout) if narrow else [layout])]  # fmt: skip
    head = styles.bold(_wrapped(caption) if form == "terminal" else caption)
    return f"{head}\n\n{chr(10).join(f'{grid}{chr(10)}' for grid in grids)}{below}"


def _costs(block: pd.DataFrame, firsts: Sequence[pd.Series], styles: Styles, narrow: bool) -> dict[str, list[str]]:
    """The columns behind the scores. firsts: a row of each method."""
    resolution = block["resolution"].dropna()
    at = f" at {resolution.iloc[0]:.0f} px" if len(resolution) else ""
    columns = {
        "Parameters": [number(row["parameters"], 0) for row in firsts],
        f"GMACs{at}": [
            number(row["gmacs"], 2) + (styles.dagger if isinstance(row["gmacs_note"], str) else "") for row in firsts
        ],
        "Peak memory of a step (MiB)": [
            number(None if pd.isna(row["train_peak_bytes"]) else row["train_peak_bytes"] / 2**20, 1) for row in firsts
        ],
        "s a step": [
            NOT_MEASURED + styles.double_dagger if slowed(row) else number(row["seconds_per_step"], 3)
            for row in firsts
        ],
        "Seeds": [str(row["seeds"]) for row in firsts],
        "Protocol": [str(row["protocol"]) for row in firsts],
    }  # fmt: skip
    shown = ("Parameters", f"GMACs{at}", "s a step") if narrow else tuple(columns)
    return {name: columns[name] for name in shown}


def _parts(layout: dict[str, list[str]]) -> Iterator[dict[str, list[str]]]:
    """A table cut into tables of at most NARROW characters, each with the column of the methods."""
    first, *others = layout
    part = {first: layout[first]}
    for name in others:
        longer = {**part, name: layout[name]}
        if len(part) > 1 and sum(_width(title, cells) + 2 for title, cells in longer.items()) - 2 > NARROW:
            yield part
            longer = {first: layout[first], name: layout[name]}
        part = longer
    yield part


def _width(title: str, cells: Sequence[str]) -> int:
    plain = (re.sub(r"\033\[\d+m", "", cell) for cell in cells)
    return max(*(len(line) for line in _broken(title).splitlines()), *map(len, plain))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, NARROW, break_long_words=False, break_on_hyphens=False))


def _scores(match: pd.DataFrame, metrics: Sequence[tuple[str, int, tuple[str, str | None]]], styles: Styles) -> str:
    """One method's scores in one column. metrics: name, digits, best and second as printed."""
    if not len(match):
        return " / ".join(NOT_MEASURED for _ in metrics)
    row, parts = match.iloc[0], []
    for metric, digits, (best, second) in metrics:
        text = part = number(row[metric], digits)
        if row["ranked"]:
            part = styles.bold(text) if text == best else styles.underline(text) if text == second else text
        spread = None if metric == "lpips" else row[metric.removesuffix("_db") + "_pm_seeds"]
        if spread is not None and pd.notna(spread):
            part += f" {styles.plus_minus} {spread:.{digits}f}"
        if metric == "psnr_db":
            part += styles.star if row["within_noise"] == 1 else styles.section if unranked(row) else ""
        parts.append(part)
    return " / ".join(parts)


def unranked(row: pd.Series) -> bool:
    """Whether a trained row is left out of the ranking because it has other seeds than the rows that are ranked."""
    return bool(row["seeds"] != "-" and not row["ranked"])


def notes_of(block: pd.DataFrame) -> list[str]:
    """What the signs in a block mean, and what its seeds and images could have shown."""
    noted = block.dropna(subset=["gmacs_note"]).drop_duplicates("method")
    notes = [f"† {row['method']}: {row['gmacs_note']}." for row in noted.to_dict("records")]
    waited = [row["contended"] for _, row in block.iterrows() if slowed(row)]
    if waited:
        notes.append(
            f"‡ not shown, because other work slowed these steps: they waited for a processor up to {max(waited):.0%} "
            "of the time."
        )
    compared = block[block["best"].notna()]
    if block["psnr_pm_seeds"].notna().any():
        notes.append("± half the 95 % interval over seeds (Student), for exactly these images.")
    if compared["p_holm"].notna().any():
        star = (
            "* not distinguishable from the best of its column at 5 % (paired over seeds and images, Holm's correction "
            "over all pairs of the table)."
        )
        notes.append(f"{star} {detects(compared['detectable_db'].max())}")
    others = block[[unranked(row) for _, row in block.iterrows()]]
    if len(others):
        seeds = "; ".join(dict.fromkeys(block[block["ranked"]]["seeds"]))
        notes.append(f"§ not ranked and not compared: other seeds than the ranked rows ({seeds}).")
    made = block.dropna(subset=["deviation"]).drop_duplicates("method")
    notes += [f"¶ {row['method']} was made unlike most rows: {row['deviation']}." for row in made.to_dict("records")]
    reasons = dict.fromkeys(compared["statistics_note"].dropna())
    return notes + [f"{reason[0].upper()}{reason[1:]}; such differences are not decided." for reason in reasons]


def detects(db: float) -> str:
    """What the seeds and images of a table or a comparison can show. Empty for NaN."""
    return "" if pd.isna(db) else f"These seeds and images detect differences of {db:.2f} dB or more with 80 % power."


def row_name(row: pd.Series) -> str:
    """What a row is called: its method, with the form of its computation, and a sign where other code made it."""
    return named(str(row["method"]), row["form"]) + ("¶" if isinstance(row["deviation"], str) else "")


def slowed(row: pd.Series) -> bool:
    """Whether a row's seconds a step were measured while other work held the processors."""
    return bool(pd.notna(row["contended"]) and row["contended"] > SLOWED)


def caption_of(run: Run) -> str:
    if run.recipe is None or run.backbone is None:
        return f"{run.suite}, {run.mode}: references, not trained here"
    recipe, backbone = run.recipe, run.backbone
    threads = recipe.threads or run.environment.threads
    where = f"{run.device}, {threads} thread{'s' * (threads > 1)}" if run.device == "cpu" else run.device
    return (
        f"{run.suite}, {run.mode}, recipe {recipe.name} ({recipe.steps} steps of {recipe.batch} x {recipe.crop} px), "
        f"width {backbone.width}, attention at levels {', '.join(map(str, backbone.attention_levels))}, on {where}"
    )


def ranked(block: pd.DataFrame, column: Column, metric: str, digits: int, higher: bool) -> tuple[str, str | None]:
    """The best and the second value among the ranked rows of a column, as printed: equal prints share a rank."""
    here = block["ranked"] & (block["data_set"] == column[0]) & (block["condition"] == column[1])
    match = block[here][metric].dropna()
    values = sorted({round(float(value), digits) for value in match}, reverse=higher)
    return (number(values[0], digits) if values else "", number(values[1], digits) if len(values) > 1 else None)


def named(method: str, form: object) -> str:
    """The name of a row: the method and the form of its computation, which decides the memory that it takes."""
    return method if not isinstance(form, str) or f"form {form}" in method else f"{method} ({form})"


def number(value: Any, digits: int) -> str:
    if value is None or pd.isna(value):
        return NOT_MEASURED
    return "inf" if math.isinf(value) else f"{value:,.{digits}f}"


@dataclass(frozen=True)
class Styles:
    bold: Callable[[str], str]
    underline: Callable[[str], str]
    escape: Callable[[str], str]
    plus_minus: str
    star: str
    section: str
    dagger: str
    double_dagger: str


_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "σ": r"$\sigma$=",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "§": r"\S{}",
    "¶": r"\P{}",
} | {letter: rf"\{letter}" for letter in "_%&#${}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


_STYLES = {
    "markdown": Styles(lambda t: f"**{t}**", lambda t: f"<u>{t}</u>", _markdown, "±", r"\*", "§", "†", "‡"),
    "latex": Styles(
        lambda t: f"\\textbf{{{t}}}",
        lambda t: f"\\underline{{{t}}}",
        _tex,
        r"$\pm$",
        "*",
        r"\S{}",
        r"$\dagger$",
        r"$\ddagger$",
    ),
    "terminal": Styles(
        lambda t: f"\033[1m{t}\033[0m", lambda t: f"\033[4m{t}\033[0m", lambda t: t, "±", "*", "§", "†", "‡"
    ),
}


def _grid(header: list[str], lines: list[list[str]], form: Format) -> str:
    if form == "markdown":
        return tabulate(
            lines, header, tablefmt="pipe", disable_numparse=True, colalign=["left", *["right"] * (len(header) - 1)]
        )
    return tabulate(
        lines, list(map(_broken, header)), tablefmt="simple", disable_numparse=True,
        colalign=["left", *["right"] * (len(header) - 1)],
    )  # fmt: skip


def _broken(title: str) -> str:
    """A column's title in several lines."""
    return title.replace(": ", ":\n").replace(" of a step (MiB)", "\na step (MiB)").replace(" at ", "\nat ")


def _latex(caption: str, header: list[str], lines: list[list[str]], notes: list[str], aligned: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs} and \\usepackage{graphicx}."""
    body = [" & ".join(line[:1] + [cell.replace("%", r"\%") for cell in line[1:]]) + r" \\" for line in lines]
    below = [rf"\par {{\footnotesize {_tex(note)}}}" for note in notes]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(caption)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{{aligned}}}",
            r"\toprule",
            " & ".join(map(_tex, header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            *below,
            r"\end{table}",
            "",
        ]
    )
