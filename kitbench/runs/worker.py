"""A worker process: trains cells and scores images for the process that has started it, one piece of work at a time.

It stays alive from cell to cell: torch is imported and images are read once. SIGTERM, or the end of its parent, makes
it save its state and leave.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

import cv2

from kitbench.errors import METHOD_ERRORS, Interrupted
from kitbench.model.methods import Restore
from kitbench.runs.failure import record_failure
from kitbench.runs.prepare import Options, PreparedSuite, prepare
from kitbench.runs.probe import Probe
from kitbench.runs.score import Numbered, Share, restorer, score_share
from kitbench.runs.train_cell import train_cell
from kitbench.runs.work import CellWork, Phase, begin, record_of
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunLocked
from kitbench.system.environment import how_to_go_on
from kitbench.system.interrupt import Stop, interruptible


@dataclass(frozen=True)
class Train:
    """Train the cell of this number."""

    cell: int
    state: str
    """What the parent has read of the cell: `PreparedSuite.state_of`."""
    probe: Probe | None


@dataclass(frozen=True)
class ScoreShare:
    """Score images of the cell of this number; its run's folder is locked by the parent."""

    cell: int
    state: str
    share: Share


Task = Train | ScoreShare


@dataclass(frozen=True)
class Said:
    """A sentence about the cell."""

    text: str


@dataclass(frozen=True)
class Advanced:
    """So much of a phase is done: see `Reporter.advance`."""

    phase: Phase
    done: int
    total: int
    text: str


@dataclass(frozen=True)
class ImageScored:
    """The score of an image."""

    found: Numbered


@dataclass(frozen=True)
class Ended:
    """The task is over. `failed`: why it did not succeed; `locked`: who else works on the run; `changed`: this process
    has read another method file or other images than the parent, and has done nothing."""

    failed: str | None = None
    locked: str | None = None
    changed: bool = False


Message = Said | Advanced | ImageScored | Ended


@dataclass(frozen=True)
class ParentReporter:
    """Sends what happens to the parent."""

    send: Callable[[Message], None]

    def say(self, text: str) -> None:
        self.send(Said(text))

    def advance(self, phase: Phase, done: int, total: int, text: str) -> None:
        self.send(Advanced(phase, done, total, text))


def serve_parent(connection: Connection, suite: Suite, options: Options, log: Path) -> None:
    """Do what the parent asks until it ends the connection. Runs in the worker; what it prints goes to `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent passes it on
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    try:
        with interruptible(how_to_go_on, (signal.SIGTERM,)) as stop:
            server = _Server(prepare(suite, options, checked=False), connection, stop)
            while True:
                stop.idle = True
                task: Task = connection.recv()
                stop.idle = False
                connection.send(server.answer(task))
    except (Interrupted, EOFError, BrokenPipeError):
        return


def _leave_with_parent() -> None:
    """Stop, as on SIGTERM, when the parent has ended."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


class _Server:
    def __init__(self, prepared: PreparedSuite, connection: Connection, stop: Stop) -> None:
        self.prepared, self.connection, self.stop = prepared, connection, stop
        self.loaded: tuple[int, Restore] | None = None
        """The method that was scored last: number of its cell, and what restores an image."""

    def answer(self, task: Task) -> Ended:
        """Do a task. Raises Interrupted where it is stopped, its state saved."""
        cells = self.prepared.cells
        if task.cell >= len(cells) or self.prepared.state_of(cells[task.cell]) != task.state:
            return Ended(changed=True)
        cell = cells[task.cell]
        try:
            if isinstance(task, Train):
                folder = self.prepared.folder(cell)
                reporter = ParentReporter(self.connection.send)
                work = CellWork(self.prepared, cell, task.probe, reporter, self.stop)
                with folder.lock() as killed:
                    if killed:
                        reporter.say(f"{killed} was killed; going on from what it stored")
                    begin(folder, record_of(self.prepared, cell))
                    if not folder.trained:
                        train_cell(work)
            else:
                score_share(self.prepared, cell, task.share, self._restorer(task.cell), self._scored)
        except Interrupted:
            raise
        except RunLocked as error:
            return Ended(locked=str(error))
        except METHOD_ERRORS as error:
            # One run's failure (out of memory, a full disk, a damaged record) must not take the others with it.
            return Ended(failed=record_failure(self.prepared, cell, error))
        return Ended()

    def _restorer(self, number: int) -> Restore:
        if self.loaded is None or self.loaded[0] != number:
            self.loaded = (number, restorer(self.prepared, self.prepared.cells[number]))
        return self.loaded[1]

    def _scored(self, found: Numbered) -> None:
        self.connection.send(ImageScored(found))
        if self.stop():
            raise Interrupted("stopped between two images")
