"""What went wrong with a cell, kept with its run."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from kitbench.errors import describe_error
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import PreparedSuite
from kitbench.runs.work import record_of
from kitbench.store.folder import RunFolder


def record_failure(prepared: PreparedSuite, cell: Cell, error: BaseException) -> str:
    """One line of what went wrong; it and the traceback are kept in the run's folder as far as they can be, and not
    where the run was imported meanwhile.
    """
    rate = "" if cell.lr is None else f" (learning rate {cell.lr:g})"
    folder, sentence = prepared.folder(cell), f"{cell.folder}{rate}: {describe_error(error)}"
    if (folder.path / "origin.json").is_file():
        return sentence
    try:
        if not (folder.path / "run.json").is_file():
            folder.write("run.json", record_of(prepared, cell))
        folder.fail(cell.key, sentence, "".join(traceback.format_exception(error)))
    except OSError as second:
        return f"{sentence} (which could not be noted there: {describe_error(second)})"
    return sentence


def stored_tracebacks(out: Path, sentences: Sequence[str]) -> Iterator[str]:
    """Run and traceback of each of the failures that these sentences tell of, read from failed.json below `out`."""
    for path in sorted(out.rglob("failed.json")):
        failed = RunFolder(path.parent).failed
        if failed is not None and failed.message in sentences and failed.traceback is not None:
            yield f"{path.parent.name}:\n{failed.traceback}"
