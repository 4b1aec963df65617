"""Tables as papers print them: the same runs give the same bytes.

The wide form prints methods down, data sets and sigmas across, a block per comparison: only runs that share everything
but the attention are in one block. Bold (best), underline (second) and star (not distinguishable from the best, by
compare.py and statistics.py) speak of the same rows: the trained ones that have the same seeds. Rows of two protocols
are refused. Published figures are in a block of their own.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from tabulate import MIN_PADDING, tabulate

from kitbench.store.folder import RunFolder
from kitbench.verdict import published
from kitbench.verdict.entries import entries
from kitbench.verdict.layout import Layout, TableColumn, TableValue, caption_of, layout_of
from kitbench.verdict.rows import rows, split, suites_of
from kitbench.verdict.sheets import Sheet

Format = Literal["markdown", "latex", "csv", "json", "terminal"]
NARROW = 100
"""Characters of a table on the terminal."""
NARROW_COLUMNS = ("Method", "PSNR dB", "Parameters", "s per step")
"""What such a table shows, besides GMACs."""


def render(runs: Sequence[RunFolder], form: Format, protocol: str | None = None, wide: bool = False) -> str:
    """The table of these runs in one of the formats, ending in a newline.

    On the terminal it is at most NARROW characters wide and shows PSNR and the main costs; `wide`: all columns.
    """
    table = rows(runs, protocol)
    columns = list(dict.fromkeys(zip(table["data_set"], table["condition"], strict=True)))
    if form in ("csv", "json"):
        own = table.assign(read_in=None)
        printed = pd.DataFrame(published.records(columns), columns=own.columns)
        if form == "csv":
            parts = ((own, True), (printed, False))
            return "".join(
                part.to_csv(header=head, index=False, lineterminator="\n", float_format="%.10g") for part, head in parts
            )
        records = [
            r for part in (own, printed) for r in json.loads(part.to_json(orient="records", double_precision=10))
        ]
        return json.dumps(records, indent=1) + "\n"
    narrow = form == "terminal" and not wide
    blocks = [
        _block(layout_of(block, caption_of(run, suites_of(block))), form, narrow)
        for block, run in split(table, entries(runs, protocol))
    ]
    blocks += [_published(sheet, form, narrow) for sheet in published.sheets(columns)]
    return "\n".join(blocks)


def _published(sheet: Sheet, form: Format, narrow: bool) -> str:
    styles = _STYLES[form]
    cells = zip(*([styles.escape(cell) for cell in line] for line in sheet.lines), strict=True)
    return _printed(sheet.caption, dict(zip(sheet.header, map(list, cells), strict=True)), sheet.notes, form, narrow)


def _block(layout: Layout, form: Format, narrow: bool) -> str:
    styles = _STYLES[form]
    columns = _columns(layout, styles, narrow)
    notes = list(layout.notes)
    if not narrow:
        notes.append("Runs: " + "; ".join(f"{name} {', '.join(keys)}" for name, keys in layout.runs.items()) + ".")
    return _printed(layout.caption, columns, notes, form, narrow)


def _printed(caption: str, columns: dict[str, list[str]], notes: Sequence[str], form: Format, narrow: bool) -> str:
    """A table of escaped cells by title, its caption above and its notes below."""
    styles = _STYLES[form]
    if form == "latex":
        lines = [list(line) for line in zip(*columns.values(), strict=True)]
        return _latex(caption, list(columns), lines, notes)
    below = "".join(f"\n{styles.escape(note)}\n" if form == "markdown" else f"{_wrapped(note)}\n" for note in notes)
    grids = [_grid(list(part), [list(line) for line in zip(*part.values(), strict=True)], form)
             for part in (_parts(columns) if narrow else [columns])]  # fmt: skip
    head = styles.bold(_wrapped(caption) if form == "terminal" else caption)
    return f"{head}\n\n{chr(10).join(f'{grid}{chr(10)}' for grid in grids)}{below}"


def _columns(layout: Layout, styles: Styles, narrow: bool) -> dict[str, list[str]]:
    """The printed columns by title. The scores on one data set share a column; a narrow table has PSNR alone."""
    grouped: dict[str, list[TableColumn]] = {}
    for column in layout.columns:
        if not (narrow and column.title not in NARROW_COLUMNS and not column.title.startswith("GMACs")):
            grouped.setdefault(column.group or column.title, []).append(column)
    return {
        f"{name}: {' / '.join(column.title for column in own)}" if own[0].group else name: [
            " / ".join(_styled(cell, styles) for cell in cells)
            for cells in zip(*(column.cells for column in own), strict=True)
        ]
        for name, own in grouped.items()
    }


def _styled(cell: TableValue, styles: Styles) -> str:
    text = styles.escape(cell.text)
    text = styles.bold(text) if cell.rank == 1 else styles.underline(text) if cell.rank == 2 else text
    return text + styles.escape((f" ± {cell.spread}" if cell.spread else "") + cell.sign)


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
    return max(*(len(line) + MIN_PADDING for line in _broken(title).splitlines()), *map(len, plain))


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, NARROW, break_long_words=False, break_on_hyphens=False))


@dataclass(frozen=True)
class Styles:
    bold: Callable[[str], str]
    underline: Callable[[str], str]
    escape: Callable[[str], str]


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
    "markdown": Styles(lambda t: f"**{t}**", lambda t: f"<u>{t}</u>", _markdown),
    "latex": Styles(lambda t: f"\\textbf{{{t}}}", lambda t: f"\\underline{{{t}}}", _tex),
    "terminal": Styles(lambda t: f"\033[1m{t}\033[0m", lambda t: f"\033[4m{t}\033[0m", lambda t: t),
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
    return title.replace(": ", ":\n").replace(" per step (MiB)", "\na step (MiB)").replace(" at ", "\nat ")


def _latex(caption: str, header: list[str], lines: list[list[str]], notes: Sequence[str]) -> str:
    """A booktabs table of escaped cells; needs \\usepackage{booktabs} and \\usepackage{graphicx}."""
    body = [" & ".join(line) + r" \\" for line in lines]
    below = [rf"\par {{\footnotesize {_tex(note)}}}" for note in notes]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(caption)}}}",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
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
