"""`kitbench table --against METHOD`: differences of all methods from one of them, data set by data set."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kitbench.errors import InputError
from kitbench.store.folder import RunFolder
from kitbench.text import capitalised, counted
from kitbench.verdict.compare import Column, Columns, Compared, adjusted, compare, heading, paired_scores
from kitbench.verdict.contrasts import ComparedRuns, blocks
from kitbench.verdict.entries import entries
from kitbench.verdict.layout import caption_of
from kitbench.verdict.sheets import Sheet


def against_sheets(runs: Sequence[RunFolder], method: str, protocol: str | None = None) -> list[Sheet]:
    """A table for each comparison that holds `method`: a line for each other method, a column for each data set.

    Raises InputError where no comparison holds the method and another one.
    """
    found = blocks(entries(runs, protocol))
    sheets = [_sheet(block, method) for block in found if method in block.methods and len(block.methods) > 1]
    if not sheets:
        names = sorted({name for block in found for name in block.methods})
        raise InputError(
            f"Nothing to compare with method {method!r}: these runs hold {', '.join(names) or 'no trained method'}; "
            f"give one of several methods that were trained by one recipe."
        )
    return sheets


def _sheet(block: ComparedRuns, method: str) -> Sheet:
    others = [name for name in block.methods if name != method]
    columns = sorted({column for name in others for column in block.methods[name]})
    places = [(name, column) for name in others for column in columns]
    known = {place: c for place in places if (c := _compared(block, place[0], method, place[1])) is not None}
    compared = dict(zip(known, adjusted(list(known.values())), strict=True))
    errors = {place: _error_over_images(block, place[0], method, place[1]) for place in known}
    lines = tuple(
        (name, *(_cell(compared[name, column], errors[name, column]) if (name, column) in known else "n/a"
                 for column in columns))
        for name in others
    )  # fmt: skip
    caption = f"PSNR in dB above that of {method}: {caption_of(block.first.run, block.suites)}"
    notes = (*_notes(list(compared.values()), method), *block.unlike())
    return Sheet(caption, ("Method", *map(heading, columns)), lines, notes)


def _compared(block: ComparedRuns, a: str, b: str, column: Column) -> Compared | None:
    left, right = _only(block.methods[a], column), _only(block.methods[b], column)
    return compare(a, b, left, right) if left and right else None


def _only(columns: Columns, column: Column) -> Columns:
    return {column: columns[column]} if column in columns else {}


def _error_over_images(block: ComparedRuns, a: str, b: str, column: Column) -> float | None:
    """Standard error of the mean difference over images, for exactly these seeds; None for a single image."""
    scores = paired_scores([_only(block.methods[name], column) for name in (a, b)])
    assert scores is not None
    of_images = (scores.values[0] - scores.values[1]).mean(0)
    return float(of_images.std(ddof=1)) / math.sqrt(len(of_images)) if len(of_images) > 1 else None


def _cell(compared: Compared, error: float | None) -> str:
    """The mean, bold where it is decided, and its interval; of one seed the standard error over images."""
    found = compared.found
    if found.interval is not None:
        mean = f"**{found.mean:+.3f}**" if compared.decided else f"{found.mean:+.3f}"
        return f"{mean} [{found.interval.low:+.3f}, {found.interval.high:+.3f}]"
    return f"{found.mean:+.3f}" + (f" ({error:.3f})" if found.seeds == 1 and error is not None else "")


def _notes(compared: Sequence[Compared], method: str) -> tuple[str, ...]:
    notes = []
    if any(c.found.interval is not None for c in compared):
        notes.append("In square brackets the 95 % confidence interval over seeds and images.")
    if tested := sum(c.p_holm is not None for c in compared):
        tests = f"{counted(tested, 'difference')}"
        notes.append(
            f"**Bold**: differs from zero at 5 %, with Holm's correction over {tests} of this table; intervals are not "
            f"corrected. It holds if {method} was chosen before the scores were seen."
        )
    if any(c.found.seeds == 1 for c in compared):
        notes.append(
            "In parentheses the standard error over images of one seed; another seed may move a difference by more, so "
            "that nothing is decided."
        )
    reasons = dict.fromkeys(c.found.note for c in compared if c.found.note and c.found.seeds > 1)
    return (*notes, *(f"{capitalised(reason)}." for reason in reasons))
