"""The main job: a suite's cells, one after another, each trained, evaluated and stored.

What is asked for is checked first (prepare.py); from here on a cell that fails leaves the others.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext

from rich.console import Console
from rich.markup import escape

from kitbench.errors import InputError, Interrupted, RunError, describe_error
from kitbench.runs.announce import announce
from kitbench.runs.cell import Cell
from kitbench.runs.one_cell import record_of, run_cell
from kitbench.runs.prepare import Job, Options
from kitbench.runs.probe import Probe, probe, require_space
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder, RunLocked
from kitbench.store.records import now
from kitbench.system.environment import how_to_go_on
from kitbench.system.interrupt import Stop, interruptible
from kitbench.system.processes import joined


def run(suite: Suite, options: Options, console: Console) -> tuple[list[RunFolder], list[str]]:
    """Run every cell of the suite that is not stored yet.

    Returns the folders of all cells that are complete, and a sentence for each that failed. Raises InputError before
    anything is written, and Interrupted (state saved) on Ctrl-C or SIGTERM.
    """
    with joined() as world, interruptible(how_to_go_on) as stop:
        if not world.first:
            console = Console(quiet=True)
        job = Job(suite, options)
        folders = {cell: RunFolder(options.out / cell.folder) for cell in job.cells}
        todo = [job.cells[number] for number in world.agree(unfinished_cells(job, folders))]
        probes, unfit = probe(job, todo, console)
        require_space(job, [cell for cell in todo if cell.method in probes], probes)
        announce(job, todo, probes, console)
        stop.idle = False
        failed = work_off(job, todo, folders, probes, unfit, console, stop)
        complete = [folders[cell] for cell in job.cells if not unfinished(job, cell, folders[cell])]
        return (complete, failed) if world.first else ([], [])


def unfinished_cells(job: Job, folders: dict[Cell, RunFolder]) -> list[int]:
    """The numbers of the job's cells that are to be worked on, in order: last those that have failed before."""
    left = [number for number, cell in enumerate(job.cells) if unfinished(job, cell, folders[cell])]
    return sorted(left, key=lambda number: (folders[job.cells[number]].path / "failed.json").is_file())


def unfinished(job: Job, cell: Cell, folder: RunFolder) -> bool:
    """Whether something of the cell is still to be done; a damaged record is told where the cell's turn comes."""
    try:
        return job.unfinished(cell, folder)
    except InputError:
        return True


def work_off(
    job: Job,
    todo: list[Cell],
    folders: dict[Cell, RunFolder],
    probes: dict[str, Probe],
    unfit: dict[str, Exception],
    console: Console,
    stop: Stop,
) -> list[str]:
    """Run the cells, those last that other processes work on now. Returns a sentence for each that failed."""
    begun, failed = now(), []
    titles = {}
    for number, cell in enumerate(todo, 1):
        seed = f" seed {cell.seed}" if cell.trained else ""
        titles[cell] = f"[{number}/{len(todo)}] {cell.mode} {cell.method}{seed}"
    queue, held = deque(todo), set()

    def attempt(cell: Cell, folder: RunFolder) -> str | None:
        with folder.lock() if job.world.first else nullcontext() as killed:
            if killed:
                console.print(f"{titles[cell]}  {killed} was killed; going on from what it stored", highlight=False)
            if cell in held and folder.failed is not None and folder.failed.when >= begun:
                return folder.failed.message  # the process that was waited for has tried
            try:
                if cell.method in unfit:
                    raise unfit[cell.method]
                if job.unfinished(cell, folder):
                    run_cell(job, cell, folder, probes.get(cell.method), titles[cell], console, stop)
                (folder.path / "failed.json").unlink(missing_ok=True)
            except Interrupted:
                raise
            except Exception as error:
                # One run's failure (out of memory, a full disk, a damaged record) must not take the others with it.
                sentence = failure(job, cell, folder, error)
                if job.world.size > 1:  # the other processes may be waiting for this one: torchrun ends them
                    raise RunError(sentence) from error
                return sentence
        return None

    while queue:
        if stop():
            raise Interrupted(f"stopped between two runs, {len(queue)} of {len(todo)} are left")
        cell = queue.popleft()
        try:
            sentence = attempt(cell, folders[cell])
        except RunLocked as error:
            if job.world.size > 1:
                raise
            if cell not in held:
                console.print(f"{titles[cell]}  waits: {error}", highlight=False)
            held.add(cell)
            queue.append(cell)
            if held.issuperset(queue):
                time.sleep(0.5)
            continue
        except OSError as error:  # no lock can be made
            sentence = f"{cell.folder}: {describe_error(error)}"
        if sentence is not None:
            failed.append(sentence)
            console.print(f"[red]failed[/red] {escape(sentence)}", highlight=False)
    return failed


def failure(job: Job, cell: Cell, folder: RunFolder, error: Exception) -> str:
    """One line of what went wrong, kept with the run as far as it can be."""
    sentence = f"{cell.folder}: {describe_error(error)}"
    try:
        if not (folder.path / "run.json").is_file():
            folder.write("run.json", record_of(job, cell))
        folder.fail(cell.key, sentence)
    except OSError as second:
        return f"{sentence} (which could not be noted there: {describe_error(second)})"
    return sentence
