"""The end of a cell's work, and what another process made of it meanwhile."""

from __future__ import annotations

from kitbench.runs.cell import Cell
from kitbench.runs.prepare import PreparedSuite
from kitbench.store.folder import RunFolder
from kitbench.system.tracking import test_means, tracked


def finish(prepared: PreparedSuite, cell: Cell) -> None:
    """Clear what only an unfinished run keeps, and let the trackers know the scores of the test sets."""
    folder = prepared.folder(cell)
    for name in ("failed.json", "progress.json"):
        (folder.path / name).unlink(missing_ok=True)
    if cell.trained and prepared.options.track:
        with tracked(prepared.trackers(), folder, None) as log:
            log(prepared.suite.recipe.steps, test_means(folder))


def imported_meanwhile(prepared: PreparedSuite, cell: Cell) -> bool:
    """Whether somebody else's run stands in the cell's place by now, with all that is asked for: nothing is added."""
    return prepared.folder(cell).origin is not None and not prepared.unfinished(cell)


def failed_meanwhile(folder: RunFolder, since: str) -> str | None:
    """Why the run failed in another process since that time (UTC, ISO 8601); None where it did not."""
    failed = folder.failed
    return failed.message if failed is not None and failed.when >= since else None
