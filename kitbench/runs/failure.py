"""What went wrong with a cell, kept with its run."""

from __future__ import annotations

from kitbench.errors import describe_error
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import PreparedSuite
from kitbench.runs.work import record_of


def failure(prepared: PreparedSuite, cell: Cell, error: Exception) -> str:
    """One line of what went wrong, kept in the run's folder as far as it can be."""
    folder, sentence = prepared.folder(cell), f"{cell.folder}: {describe_error(error)}"
    try:
        if not (folder.path / "run.json").is_file():
            folder.write("run.json", record_of(prepared, cell))
        folder.fail(cell.key, sentence)
    except OSError as second:
        return f"{sentence} (which could not be noted there: {describe_error(second)})"
    return sentence
