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
SLOWED = 0.05
"""Share of the time that a training waited for a processor, from which on its seconds a step carry a sign."""


def render(runs: Sequence[RunFolder], form: Format, protocol: str | None = None) -> str:
    """The table of these runs in one of the formats, ending in a newline."""
    table = rows(runs, protocol)
    if form == "csv":
        text = io.StringIO()
        table.to_csv(text, index=False, lineterminator="\n", float_format="%.6g")
        return text.getvalue()
    if form == "json":
        records = json.loads(table.to_json(orient="records", double_precision=10))
        return json.dumps(records, indent=1) + "\n"
    blocks = [_block(block, run, form) for block, run in split(table, entries(runs, protocol))]
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


def _block(block: pd.DataFrame, run: Run, form: Format) -> str:
    styles = _STYLES[form]
    columns = list(dict.fromkeys(zip(block["data_set"], block["condition"], strict=True)))
    shows_lpips = block["lpips"].notna().any()
    metrics = [("psnr_db", 2, True), ("ssim", 4, True)] + ([("lpips", 4, False)] if shows_lpips else [])
    ranks = {
        (column, metric): ranked(block, column, metric, digits, higher)
        for column in columns
        for metric, digits, higher in metrics
    }
    names = ["PSNR dB", "SSIM", "LPIPS"][: len(metrics)]
    resolution = block["resolution"].dropna()
    at = f" at {resolution.iloc[0]:.0f} px" if len(resolution) else ""
    header = ["Method", *(f"{heading(column)}: {' / '.join(names)}" for column in columns)]
    header += ["Parameters", f"GMACs{at}", "Peak memory of a step (MiB)", "s a step", "Seeds", "Protocol"]
    lines, notes = [], notes_of(block)
    for method, own in block.groupby("method", sort=False):
        cells = []
        for column in columns:
            match = own[(own["data_set"] == column[0]) & (own["condition"] == column[1])]
            cells.append(
                _scores(match, [(metric, digits, ranks[column, metric]) for metric, digits, _ in metrics], styles)
            )
        first = own.iloc[0]
        mark = ""
        if isinstance(first["gmacs_note"], str):
            mark = styles.dagger
        cells += [
            number(first["parameters"], 0),
            number(first["gmacs"], 2) + mark,
            number(None if pd.isna(first["train_peak_bytes"]) else first["train_peak_bytes"] / 2**20, 1),
            NOT_MEASURED + styles.double_dagger if slowed(first) else number(first["seconds_per_step"], 3),
            str(first["seeds"]),
            str(first["protocol"]),
        ]
        lines.append([styles.escape(named(str(method), first["form"])), *cells])
    runs = {
        method: dict.fromkeys(",".join(own["runs"]).split(",")) for method, own in block.groupby("method", sort=False)
    }
    notes.append("Runs: " + "; ".join(f"{method!s} {', '.join(keys)}" for method, keys in runs.items()) + ".")
    caption = caption_of(run)
    if form == "latex":
        return _latex(caption, header, lines, notes, "l" + "r" * (len(header) - 1))
    below = "".join(f"\n{styles.escape(note)}\n" if form == "markdown" else f"{note}\n" for note in notes)
    return f"{styles.bold(caption)}\n\n{_grid(header, lines, form)}\n{below}"


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
    reasons = dict.fromkeys(compared["statistics_note"].dropna())
    return notes + [f"{reason[0].upper()}{reason[1:]}; such differences are not decided." for reason in reasons]


def detects(db: float) -> str:
    """What the seeds and images of a table or a comparison can show. Empty for NaN."""
    return "" if pd.isna(db) else f"These seeds and images detect differences of {db:.2f} dB or more with 80 % power."


def slowed(row: pd.Series) -> bool:
    """Whether a row's seconds a step were measured while other work held the processors."""
    return bool(pd.notna(row["contended"]) and row["contended"] > SLOWED)


def caption_of(run: Run) -> str:
    if run.recipe is None or run.backbone is None:
        return f"{run.suite}, {run.mode}: references, not trained here"
    recipe, backbone = run.recipe, run.backbone
    return (
        f"{run.suite}, {run.mode}, recipe {recipe.name} ({recipe.steps} steps of {recipe.batch} x {recipe.crop} px), "
        f"width {backbone.width}, attention at levels {', '.join(map(str, backbone.attention_levels))}, on {run.device}"
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
    narrow = [
        name.replace(": ", ":\n").replace(" of a step (MiB)", "\na step (MiB)").replace(" at ", "\nat ")
        for name in header
    ]
    return tabulate(
        lines, narrow, tablefmt="simple", disable_numparse=True, colalign=["left", *["right"] * (len(header) - 1)]
    )


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
