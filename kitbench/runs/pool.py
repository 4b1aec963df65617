"""Cells side by side: worker processes that train and score, and the process that hands out the work.

An idle worker first scores what it has trained; then it takes the next cell, the longest first; where no cell is left
to be trained, it shares in the scoring of others. The worker that trains a cell holds the lock of its run; while a cell
is scored, this process holds it, which writes the evaluations. A worker that is killed is replaced, and its cell goes
on from the last checkpoint.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from kitbench.errors import Interrupted, RunError
from kitbench.runs.announce import Expected
from kitbench.runs.cell import Cell
from kitbench.runs.display import Display
from kitbench.runs.failure import record_failure
from kitbench.runs.finish import failed_meanwhile, finish, imported_meanwhile
from kitbench.runs.prepare import Options, PreparedSuite, Unit
from kitbench.runs.probe import Probe
from kitbench.runs.score import Numbered, Share, score_text, store_evaluation
from kitbench.runs.work import begin, record_of
from kitbench.runs.worker import Advanced, Ended, ImageScored, Said, ScoreShare, Task, Train, serve_parent
from kitbench.store.folder import RunLocked
from kitbench.store.records import now
from kitbench.system.interrupt import Stop
from kitbench.system.processes import process_context
from kitbench.system.progress import heartbeat
from kitbench.text import counted

ATTEMPTS = 3
"""How often a piece of work is begun before it counts as failed, where its worker was killed each time."""
IMAGES = 8
"""Images that are scored in one piece, at most."""
CHANGED = (
    "the method's file, its initial weights or the images have changed since this command checked them; give it again"
)
LEAVING_SECONDS = 12.0
"""Longest wait for a worker that was asked to stop; it ends itself before."""


def start_server() -> None:
    """Let the fork server import what workers need, beside what this process does meanwhile."""
    context = process_context()
    context.set_forkserver_preload(["kitbench.runs.worker"])
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


@dataclass
class Worker:
    """A worker process, and what it is at."""

    process: BaseProcess
    connection: Connection
    log: Path
    """What it prints."""
    task: Task | None = None
    loaded: int | None = None
    """Number of the cell whose trained network it holds."""


@dataclass
class Progressing:
    """A cell that is not complete yet."""

    number: int
    cell: Cell
    state: str
    expected: Expected
    attempts: int = 0
    began: float | None = None
    shares: deque[Share] = field(default_factory=deque)
    """To be scored, and not given to a worker."""
    scores: dict[Unit, list[Numbered]] = field(default_factory=dict)
    """Of the units that are being scored."""
    images: int = 0
    """To be scored in all."""
    beat: Callable[[int], None] = lambda done: None
    """Keeps progress.json fresh while the cell is scored."""
    locked: ExitStack = field(default_factory=ExitStack)
    waits: bool = False
    """Whether another process was found to work on the run."""


class Pool:
    """Works through cells with one worker process per device."""

    def __init__(
        self, prepared: PreparedSuite, work: Mapping[Cell, Expected], probes: Mapping[str, Probe], display: Display,
        stop: Stop,
    ) -> None:  # fmt: skip
        self.prepared, self.probes, self.display, self.stop = prepared, probes, display, stop
        numbers = {cell: number for number, cell in enumerate(prepared.cells)}
        self.cells = {
            numbers[cell]: Progressing(numbers[cell], cell, prepared.state_of(cell), expected)
            for cell, expected in work.items()
        }
        self.waiting = deque(sorted(self.cells, key=self._order))
        """Cells whose next step is not begun: training, or the first look at what is to be scored."""
        self.begun, self.later = now(), 0.0
        self.workers: list[Worker] = []
        self.failed: list[str] = []

    def _order(self, number: int) -> tuple[bool, float]:
        """Cells that have failed before come last, the longest first."""
        cell = self.cells[number].cell
        has_failed = (self.prepared.folder(cell).path / "failed.json").is_file()
        return has_failed, -self.cells[number].expected.training

    def run(self, devices: Sequence[str]) -> list[str]:
        """Do all work; returns a sentence for each cell that failed. Raises Interrupted, all states saved."""
        try:
            self.workers = [self._start(device) for device in devices]
            while self.cells:
                if self.stop():
                    raise Interrupted(f"stopped with {counted(len(self.cells), 'run')} unfinished, their state saved")
                for worker in self.workers:
                    if worker.task is None:
                        self._assign(worker)
                waited = [worker.connection for worker in self.workers]
                for connection in wait(waited, timeout=0.2):
                    self._hear(next(worker for worker in self.workers if worker.connection is connection))
        finally:
            self._end()
        return self.failed

    def _start(self, device: str) -> Worker:
        options = self.prepared.options
        log = options.out / ".launch" / f"worker-{time.monotonic_ns()}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        context = process_context()
        ours, theirs = context.Pipe()
        changed = Options(**(vars(options) | {"device": device}))
        process = context.Process(target=serve_parent, args=(theirs, self.prepared.suite, changed, log), name=device)
        process.start()
        theirs.close()
        return Worker(process, ours, log)

    def _assign(self, worker: Worker) -> None:
        """Give an idle worker its next piece of work, if there is one."""
        own = self.cells.get(worker.loaded) if worker.loaded is not None else None
        if own is not None and own.shares:
            self._give(worker, ScoreShare(own.number, own.state, own.shares.popleft()))
            return
        for _ in range(len(self.waiting)):
            progressing = self.cells[self.waiting.popleft()]
            if progressing.waits and time.monotonic() < self.later:
                self.waiting.append(progressing.number)
                continue
            if self._first_look(progressing):
                probe = self.probes.get(progressing.cell.method)
                self._give(worker, Train(progressing.number, progressing.state, probe))
                return
        shared = max(self.cells.values(), key=lambda one: len(one.shares), default=None)
        if shared is not None and shared.shares:
            self._give(worker, ScoreShare(shared.number, shared.state, shared.shares.popleft()))

    def _give(self, worker: Worker, task: Task) -> None:
        progressing = self.cells[task.cell]
        progressing.began = progressing.began or time.monotonic()
        worker.task, worker.loaded = task, task.cell
        with suppress(BrokenPipeError):  # it has just ended: it is heard of next
            worker.connection.send(task)

    def _first_look(self, progressing: Progressing) -> bool:
        """Whether the cell is to be trained. One that is not is scored, or is complete, or locked."""
        cell, folder = progressing.cell, self.prepared.folder(progressing.cell)
        if progressing.waits and (message := failed_meanwhile(folder, self.begun)) is not None:
            self._fail(progressing, message)  # the process that was waited for has tried
        elif cell.trained and not folder.trained:
            return True
        else:
            self._begin_scoring(progressing)
        return False

    def _begin_scoring(self, progressing: Progressing) -> None:
        """Lock the run, and cut what is to be scored into pieces."""
        prepared, cell = self.prepared, progressing.cell
        folder = prepared.folder(cell)
        if imported_meanwhile(prepared, cell):
            self.display.say(cell, "was imported meanwhile")
            self._drop(progressing)
            self.display.finished(cell, 0.0)
            return
        try:
            progressing.locked.enter_context(folder.lock())
            begin(folder, record_of(prepared, cell))
            missing = prepared.missing(cell, folder)
        except RunLocked as error:
            self._wait_for(progressing, str(error))
            return
        except Exception as error:  # noqa: BLE001 - a damaged record or a full disk is this run's failure alone
            self._fail(progressing, record_failure(prepared, cell, error))
            return
        progressing.scores = {unit: [] for unit in missing}
        for unit in missing:
            numbers = range(len(prepared.sets[cell.mode].test[unit[0]]))
            size = min(IMAGES, -(-len(numbers) // len(self.workers)))
            pieces = (numbers[at : at + size] for at in range(0, len(numbers), size))
            progressing.shares += [Share(unit, tuple(piece)) for piece in pieces]
        progressing.images = sum(len(share.numbers) for share in progressing.shares)
        progressing.beat = heartbeat(folder, "scoring", progressing.images)
        if not missing:
            self._complete(progressing)

    def _wait_for(self, progressing: Progressing, locked: str) -> None:
        """Put a cell back whose run another process works on."""
        if not progressing.waits:
            self.display.say(progressing.cell, f"waits: {locked}")
        progressing.waits, self.later = True, time.monotonic() + 0.5
        self.waiting.append(progressing.number)

    def _hear(self, worker: Worker) -> None:
        """Take a message of a worker, or notice that it has ended."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        assert worker.task is not None
        progressing = self.cells.get(worker.task.cell)
        if isinstance(message, Ended):
            task, worker.task = worker.task, None
            if progressing is not None:
                self._ended(progressing, task, message)
        elif progressing is None:
            return  # it has failed elsewhere
        elif isinstance(message, Said):
            self.display.say(progressing.cell, message.text)
        elif isinstance(message, Advanced):
            self.display.advance(progressing.cell, message.phase, message.done, message.total, message.text)
        elif isinstance(message, ImageScored) and isinstance(worker.task, ScoreShare):
            self._scored(progressing, worker.task.share.unit, message.found)

    def _ended(self, progressing: Progressing, task: Task, message: Ended) -> None:
        if message.locked is not None:
            self._wait_for(progressing, message.locked)
        elif message.changed:
            self._fail(progressing, record_failure(self.prepared, progressing.cell, RunError(CHANGED)))
        elif message.failed is not None:
            self._fail(progressing, message.failed)
        elif isinstance(task, Train):
            progressing.attempts = 0
            self._begin_scoring(progressing)

    def _scored(self, progressing: Progressing, unit: Unit, found: Numbered) -> None:
        """Take the score of an image; write the evaluation that it completes, and finish the cell with the last one."""
        prepared, cell = self.prepared, progressing.cell
        scores = progressing.scores[unit]
        scores.append(found)
        done = progressing.images - sum(
            len(prepared.sets[cell.mode].test[name]) - len(own) for (name, sigma), own in progressing.scores.items()
        )
        self.display.advance(cell, "scoring", done, progressing.images, score_text(unit, found[1]))
        try:
            progressing.beat(done)
            if len(scores) == len(prepared.sets[cell.mode].test[unit[0]]):
                store_evaluation(prepared, cell, unit, scores)
                del progressing.scores[unit]
            if not progressing.scores:
                self._complete(progressing)
        except Exception as error:  # noqa: BLE001 - a full disk is this run's failure alone
            self._fail(progressing, record_failure(prepared, cell, error))

    def _complete(self, progressing: Progressing) -> None:
        finish(self.prepared, progressing.cell)
        self._drop(progressing)
        self.display.finished(progressing.cell, time.monotonic() - (progressing.began or time.monotonic()))

    def _fail(self, progressing: Progressing, sentence: str) -> None:
        self._drop(progressing)
        self.failed.append(sentence)
        self.display.failed(progressing.cell, sentence)

    def _drop(self, progressing: Progressing) -> None:
        progressing.locked.close()
        del self.cells[progressing.number]

    def _replace(self, worker: Worker) -> None:
        """Start another worker in the place of one that has ended; its work goes on there."""
        worker.process.join()
        code, task = worker.process.exitcode or 0, worker.task
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
        words = last_words(worker.log)
        progressing = self.cells.get(task.cell) if task is not None else None
        if task is None and worker.loaded is None and not self.stop():
            raise RunError(f"a worker process {how} before it had any work: {words}; see {worker.log}")
        if progressing is not None and not self.stop():
            progressing.attempts += 1
            if progressing.attempts >= ATTEMPTS:
                error = RunError(f"its worker process {how}, {ATTEMPTS} times: {words}")
                self._fail(progressing, record_failure(self.prepared, progressing.cell, error))
            else:
                self.display.say(progressing.cell, f"its worker process {how}; another goes on with it")
                self._take_back(progressing, task)
        self.workers[self.workers.index(worker)] = self._start(worker.process.name)

    def _take_back(self, progressing: Progressing, task: Task | None) -> None:
        """A piece of work whose worker has ended is to be done again."""
        if isinstance(task, ScoreShare):
            unit, again = task.share.unit, set(task.share.numbers)
            kept = [found for found in progressing.scores.get(unit, []) if found[0] not in again]
            if unit in progressing.scores:
                progressing.scores[unit] = kept
            progressing.shares.appendleft(task.share)
        else:
            self.waiting.appendleft(progressing.number)

    def _end(self) -> None:
        """Ask all workers to leave, and wait until they have: a worker at work saves its state before."""
        for worker in self.workers:
            if worker.task is None:
                worker.connection.close()
            elif worker.process.is_alive():
                worker.process.terminate()
        deadline = time.monotonic() + LEAVING_SECONDS
        for worker in self.workers:
            while worker.process.is_alive() and time.monotonic() < deadline:
                _drain(worker.connection)
                worker.process.join(0.05)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
            if worker.log.is_file() and not worker.log.stat().st_size:
                worker.log.unlink()
        for progressing in self.cells.values():
            progressing.locked.close()


def _drain(connection: Connection) -> None:
    """Read what a leaving worker still sends, so that it is not kept by a full pipe."""
    with suppress(EOFError, OSError):
        while connection.poll():
            connection.recv()


def last_words(log: Path) -> str:
    """The last line that a worker printed."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    return (lines or ["it printed nothing"])[-1]
