"""The main job: a suite's cells, side by side or one after another, each trained, scored and stored.

What is asked for is checked first (prepare.py); from here on a cell that fails leaves the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rich.console import Console

from kitbench.errors import METHOD_ERRORS, Interrupted, RunError, describe_error
from kitbench.runs.announce import Expected, announce, expected
from kitbench.runs.cell import Cell
from kitbench.runs.display import CellReporter, Display
from kitbench.runs.failure import record_failure
from kitbench.runs.finish import failed_meanwhile, finish, imported_meanwhile
from kitbench.runs.limits import require_space
from kitbench.runs.plan import planned
from kitbench.runs.pool import Pool, start_server
from kitbench.runs.prepare import Options, PreparedSuite, prepare
from kitbench.runs.probe import Probe, probe
from kitbench.runs.score import restorer, score_cell
from kitbench.runs.train_cell import train_cell
from kitbench.runs.work import CellWork, begin, record_of
from kitbench.runs.workers import worker_devices
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder, RunLocked
from kitbench.store.records import Owner, now
from kitbench.system.environment import how_to_go_on
from kitbench.system.interrupt import GRACE, Stop, interruptible
from kitbench.system.processes import World, joined


def run_suite(suite: Suite, options: Options, console: Console) -> tuple[list[RunFolder], list[str]]:
    """Run every cell of the suite that is not stored yet.

    Returns, in every process of torchrun, the folders of all complete cells, and a sentence for each that failed.
    Raises InputError before anything is written, and Interrupted (state saved) on Ctrl-C or SIGTERM.
    """
    with joined() as world, interruptible(how_to_go_on) as stop:
        if not world.first:
            console = Console(quiet=True)
        if world.size == 1 and options.jobs != 1:
            start_server()
        prepared = prepare(suite, options, console=console)
        todo = [prepared.cells[number] for number in world.agree(unfinished_cells(prepared))]
        probes, unfit = probe(prepared, todo, console)
        for name, said in world.gather([(name, describe_error(error)) for name, error in unfit.items()]):
            unfit.setdefault(name, RunError(f"another process of torchrun cannot train it: {said}"))
        require_space(
            prepared, [cell for cell in todo if cell.method in probes], {n: p.cost for n, p in probes.items()}
        )
        devices = worker_devices(prepared, [cell for cell in todo if cell.method not in unfit], probes)
        work = {cell: expected(prepared, cell, probes.get(cell.method)) for cell in todo}
        announce(prepared, work, probes, devices, console)
        stop.idle = False
        failed = [record_failure(prepared, cell, unfit[cell.method]) for cell in todo if cell.method in unfit]
        work = {cell: one for cell, one in work.items() if cell.method not in unfit}
        display = Display(console, work, len(devices))
        with display.shown(), planned(suite, options.out, list(work)):
            if len(devices) > 1:
                stop.grace = 2 * GRACE  # the workers save their state; this process waits for them
                failed += Pool(prepared, work, probes, display, stop).run(devices)
            else:
                failed += run_here(prepared, work, probes, display, stop)
        complete = [prepared.folder(cell) for cell in prepared.cells if not prepared.unfinished(cell)]
        return world.agree((complete, failed))


def planned_cells(suite: Suite, options: Options, console: Console) -> list[Cell]:
    """The cells that `run` would work on, in order. Raises InputError; writes nothing."""
    prepared = prepare(suite, options, console=console)
    return [prepared.cells[number] for number in unfinished_cells(prepared)]


def unfinished_cells(prepared: PreparedSuite) -> list[int]:
    """The numbers of the cells that are to be worked on, in order: last those that have failed before."""
    left = [number for number, cell in enumerate(prepared.cells) if prepared.unfinished(cell)]
    return sorted(left, key=lambda number: (prepared.folder(prepared.cells[number]).path / "failed.json").is_file())


def run_here(
    prepared: PreparedSuite,
    cells: Mapping[Cell, Expected],
    probes: Mapping[str, Probe],
    display: Display,
    stop: Stop,
) -> list[str]:
    """Work through the cells one after another, in this process or with those that torchrun has started.

    Cells that other processes work on come last. Returns a sentence for each that failed.
    """
    begun, failed, alone = now(), [], prepared.world.size == 1
    queue, held = deque(cells), set()
    while queue:
        if stop():
            raise Interrupted(f"stopped between two runs, {len(queue)} of {len(cells)} are left")
        cell = queue.popleft()
        folder = prepared.folder(cell)
        work = CellWork(prepared, cell, probes.get(cell.method), CellReporter(display, cell), stop)
        clock = time.monotonic()
        try:
            message = prepared.world.agree(failed_meanwhile(folder, begun)) if cell in held else None
            if message is None:
                run_cell(work)
                display.finished(cell, time.monotonic() - clock)
            else:  # the process that was waited for has tried
                failed.append(message)
                display.failed(cell, message)
        except Interrupted:
            raise
        except RunLocked as error:
            if cell not in held:
                display.say(cell, f"waits: {error}")
            held.add(cell)
            queue.append(cell)
            if held.issuperset(queue):
                time.sleep(0.5)
        except METHOD_ERRORS as error:
            if not alone and stop():  # its connection to a process that has left before it is lost
                raise Interrupted(f"stopped in {cell.folder}; what was stored before is kept") from error
            # One run's failure (out of memory, a full disk, a damaged record) must not take the others with it.
            known = None if alone else failed_meanwhile(folder, begun)  # by the process whose end is this one's error
            sentence = known or record_failure(prepared, cell, error)
            if not alone:  # the other processes may be waiting for this one: torchrun ends them
                raise RunError(sentence) from error
            failed.append(sentence)
            display.failed(cell, sentence)
    return failed


def run_cell(work: CellWork) -> None:
    """Train a cell from where it stands, do the evaluations that are missing, and finish it."""
    prepared, cell, folder = work.prepared, work.cell, work.folder
    first = prepared.world.first
    if prepared.world.agree(imported_meanwhile(prepared, cell)):
        work.reporter.say("was imported meanwhile")
        return
    with _locked(prepared.world, folder) as killed:
        if killed:
            work.reporter.say(f"{killed} was killed; going on from what it stored")
        if first:
            begin(folder, record_of(prepared, cell))
        if cell.trained and not folder.trained:
            train_cell(work)
        prepared.world.agree(None)  # the others load what the first has stored
        if prepared.missing(cell, folder):
            score_cell(prepared, cell, restorer(prepared, cell), work.reporter, work.stop)
        if first:
            finish(prepared, cell)


@contextmanager
def _locked(world: World, folder: RunFolder) -> Iterator[Owner | None]:
    """`folder.lock()` by the first process; all raise RunLocked where it does, so that none waits for it in vain."""
    with ExitStack() as stack:
        killed: Owner | None = None
        locked: RunLocked | None = None
        if world.first:
            try:
                killed = stack.enter_context(folder.lock())
            except RunLocked as error:
                locked = error
        if (locked := world.agree(locked)) is not None:
            raise locked
        yield killed
