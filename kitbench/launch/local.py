"""Many runs on this machine: the cells of a suite over worker processes.

A worker is an ordinary `python -m kitbench run` that is restricted to one cell (`--only`), so its lock, checkpoints,
resume and refusals are those of any run. The launcher only starts workers, watches how they end, and starts them again
where they were killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from kitbench.errors import InputError, Interrupted
from kitbench.launch.plan import Spread, command, label, show, write_plan
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import Job, Options
from kitbench.runs.queue import unfinished
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder
from kitbench.store.records import now
from kitbench.text import duration

FAILED = 3
"""Exit code of a run that failed or was stopped, as the command line gives it."""
ATTEMPTS = 3
"""How often a cell is started before it counts as failed, where its worker was killed each time."""


def local(
    suite: Suite, options: Options, spread: Spread, arguments: Sequence[str], console: Console
) -> tuple[list[RunFolder], list[str]]:
    """Run the cells that are not stored yet in worker processes, one cell a process.

    Returns the folders of all cells that are complete, and a sentence for each that failed. A cell whose worker is
    killed is started again, up to ATTEMPTS times; a cell that fails by itself is not. Raises InputError before
    anything is written, and Interrupted, with the state of all cells saved, on Ctrl-C or SIGTERM.
    """
    for name, value in (("--partition", spread.partition), ("--time", spread.minutes)):
        if value is not None:
            raise InputError(f"{name} is of --launcher slurm; leave it out with --launcher local.")
    job = Job(suite, options)
    todo = [cell for cell in job.cells if unfinished(job, cell, RunFolder(options.out / cell.folder))]
    # Without a number, every GPU of the model may be used; the job's own device has the number of the first.
    every = job.device.type == "cuda" and options.device in ("auto", "cuda")
    workers = slots(torch.device("cuda") if every else job.device, spread, max(1, len(todo)))
    device = arguments.index("--device") + 1  # a worker sees its own GPU alone
    arguments = [*arguments[:device], job.device.type, *arguments[device + 1 :]]
    console.print(
        f"{len(todo)} of {len(job.cells)} cells are to be run by {len(workers)} workers: "
        + "; ".join(
            f"{number}: {' '.join(f'{k}={v}' for k, v in slot.items())}" for number, slot in enumerate(workers)
        ),
        highlight=False,
        soft_wrap=True,
    )
    if spread.dry_run:
        show(todo, arguments, console)
        return [], []
    plan = write_plan(suite, options.out, "local", todo)
    try:
        failed = work(todo, workers, arguments, options.out, console)
    finally:
        plan.unlink(missing_ok=True)
    complete = []
    for cell in job.cells:
        folder = RunFolder(options.out / cell.folder)
        if not unfinished(job, cell, folder):
            complete.append(folder)
        elif cell not in failed:
            failed[cell] = f"{label(cell)}: its worker ended well, but {folder.path} is not complete"
    return complete, list(failed.values())


def slots(device: torch.device, spread: Spread, cells: int) -> list[dict[str, str]]:
    """The environment of each worker: its share of the cores, and its GPU where there are any.

    Without `jobs` there is one worker a GPU, or one a core: one thread a cell is the most efficient there.
    Raises InputError for GPUs that are not there.
    """
    cores = len(os.sched_getaffinity(0))
    if device.type != "cuda":
        if spread.gpus:
            raise InputError(f"--gpus {spread.gpus} was asked for, but the device is the CPU; leave it out.")
        count = min(spread.jobs or max(1, cores // (spread.cpus or 1)), cells)
        return [{"OMP_NUM_THREADS": str(spread.cpus or max(1, cores // count))} for _ in range(count)]
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    chosen = gpus(spread.gpus, names, device)
    count = min(spread.jobs or len(chosen), cells)
    # The numbers of torch are those of CUDA_VISIBLE_DEVICES, where that is set.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(number) for number in range(len(names))]
    threads = str(spread.cpus or max(1, cores // count))
    return [
        {"CUDA_VISIBLE_DEVICES": ids[chosen[number % len(chosen)]], "OMP_NUM_THREADS": threads}
        for number in range(count)
    ]


def gpus(wanted: str | None, names: Sequence[str], device: torch.device) -> list[int]:
    """Numbers of the GPUs to use: those wanted, or all that are of the same model, since runs of two do not compare."""
    first = device.index or 0
    if wanted is None:
        return (
            [number for number, name in enumerate(names) if name == names[first]] if device.index is None else [first]
        )
    if not re.fullmatch(r"\d+(,\d+)*", wanted):
        raise InputError(f"--gpus takes the numbers of GPUs like 0,1 with --launcher local; found {wanted!r}.")
    chosen = list(dict.fromkeys(int(part) for part in wanted.split(",")))
    absent = [number for number in chosen if number >= len(names)]
    if absent:
        raise InputError(f"--gpus names GPU {absent[0]}, but this machine has {len(names)}, numbered from 0.")
    models = {names[number] for number in chosen}
    if len(models) > 1:
        raise InputError(f"--gpus names {' and '.join(sorted(models))}, whose runs do not compare; give those of one.")
    return chosen


@dataclass(frozen=True)
class Worker:
    """A worker process at its cell."""

    cell: Cell
    attempt: int
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    started: float
    begun: str
    """UTC, ISO 8601."""

    def why(self, code: int) -> str | None:
        """Why the cell failed by itself; None where its worker was killed or stopped, with the exit code `code`."""
        if code < 0:
            return None
        failed = RunFolder(self.folder).failed
        if failed is not None and failed.when >= self.begun:
            return failed.message
        return None if code == FAILED else self.last_words()

    def last_words(self) -> str:
        """The last sentence that the worker printed of itself, else its last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        own = [line.removeprefix("kitbench: ") for line in lines if line.startswith("kitbench: ")]
        return (own or lines or ["no message"])[-1]


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has come while the block runs: the workers save their state then."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def work(
    cells: Sequence[Cell], workers: Sequence[dict[str, str]], arguments: Sequence[str], out: Path, console: Console
) -> dict[Cell, str]:
    """Work through the cells; returns a sentence for each that failed. Raises Interrupted on Ctrl-C or SIGTERM."""
    waiting = deque((cell, 1) for cell in cells)
    busy: dict[int, Worker] = {}
    failed: dict[Cell, str] = {}
    done, began, told = 0, time.monotonic(), False

    def say(text: str) -> None:
        console.print(f"[{done}/{len(cells)}] {text}", highlight=False, soft_wrap=True, markup=False)

    with asked_to_stop() as stopping:
        while busy or (waiting and not stopping()):
            for number, environment in enumerate(workers):
                if number not in busy and waiting and not stopping():
                    busy[number] = start(*waiting.popleft(), environment, arguments, out)
            if stopping() and not told:
                told = True
                say(f"stopping: {len(busy)} workers save their state")
                for worker in busy.values():
                    worker.process.terminate()
            time.sleep(0.1)
            for number, worker in list(busy.items()):
                code = worker.process.poll()
                if code is None:
                    continue
                del busy[number]
                name = label(worker.cell)
                if code == 0:
                    done += 1
                    rest = (time.monotonic() - began) / done * (len(cells) - done)
                    left = f", about {duration(rest)} left" if done < len(cells) else ""
                    say(f"{name}: done in {duration(time.monotonic() - worker.started)} by worker {number}{left}")
                elif stopping():
                    waiting.append((worker.cell, worker.attempt))
                elif (why := worker.why(code)) is not None:
                    failed[worker.cell] = f"{name}: {why}"
                    say(f"failed {failed[worker.cell]}")
                else:
                    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else "was stopped"
                    if worker.attempt < ATTEMPTS:
                        waiting.append((worker.cell, worker.attempt + 1))
                        say(f"{name}: worker {number} {how}; another goes on with it")
                    else:
                        failed[worker.cell] = f"{name}: its worker {how}, {ATTEMPTS} times: {worker.last_words()}"
                        say(f"failed {failed[worker.cell]}")
    if stopping() and waiting:
        raise Interrupted(f"stopped with {len(waiting)} of {len(cells)} cells unfinished, their state saved")
    return failed


def start(cell: Cell, attempt: int, environment: dict[str, str], arguments: Sequence[str], out: Path) -> Worker:
    """Start a worker at a cell; what it prints goes to a file in OUT/.launch/."""
    log = out / ".launch" / f"{label(cell).replace('/', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = now()
    with log.open("ab") as file:
        process = subprocess.Popen(
            command(arguments, cell),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which tells its workers
        )
    return Worker(cell, attempt, process, out / cell.folder, log, time.monotonic(), begun)
