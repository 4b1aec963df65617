"""Many runs: the cells of a suite over worker processes of this machine, or over the nodes of a Slurm cluster.

A worker is an ordinary `python -m kitbench run` that is restricted to one cell (`--only`), so its lock, checkpoints,
resume and refusals are those of any run. The launchers only start workers, watch how they end, and start them again
where they were killed. What is planned is written to `OUT/.launch/`, where `kitbench status` reads it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from kitbench.cell import Cell
from kitbench.errors import InputError, Interrupted, RunError
from kitbench.job import Job, Options
from kitbench.progress import duration
from kitbench.run import unfinished
from kitbench.status import Plan, Planned, plan_path, survey
from kitbench.store import RunFolder, now, write_atomic
from kitbench.suite import Suite

FAILED = 3
"""Exit code of a run that failed or was stopped, as the command line gives it."""
ATTEMPTS = 3
"""How often a cell is started before it counts as failed, where its worker was killed each time."""
GRACE_SECONDS = 120
"""How long before its time limit Slurm tells a job to save its state."""
TIMEOUTS = 1000
"""How often a Slurm job may reach its time limit and go on from its checkpoint."""


@dataclass(frozen=True)
class Spread:
    """What the command line says of where the cells run."""

    jobs: int | None
    """Cells at a time."""
    gpus: str | None
    """Local: which GPUs, by their numbers. Slurm: how many a cell."""
    cpus: int | None
    """CPU cores a cell."""
    partition: str | None
    minutes: int | None
    dry_run: bool


def label(cell: Cell) -> str:
    """A cell by the names of its axes, which are the same on every machine: `colour/kit/0`, `colour/nlm`."""
    return f"{cell.mode}/{cell.method}" + (f"/{cell.seed}" if cell.trained else "")


def restrict(suite: Suite, wanted: str) -> Suite:
    """The suite with one of its cells alone, by its label. Raises InputError for a label that names none."""
    data = suite.data
    for mode in dict.fromkeys((*data.embedded.modes, *data.folder.modes)):
        changes: dict[str, dict[str, Any]] = {
            f"{mode}/{name}": {"references": (name,), "methods": {}} for name in suite.references
        }
        changes |= {
            f"{mode}/{name}/{seed}": {"references": (), "methods": {name: method}, "seeds": (seed,)}
            for name, method in suite.methods.items()
            for seed in suite.seeds
        }
        if wanted in changes:
            sources = {
                name: source.model_copy(update={"modes": (mode,)})
                for name, source in (("embedded", data.embedded), ("folder", data.folder))
                if mode in source.modes
            }
            return suite.model_copy(update={**changes[wanted], "data": data.model_copy(update=sources)})
    raise InputError(f"Suite {suite.name!r} has no cell {wanted!r}; give MODE/METHOD/SEED, for example colour/kit/0.")


def command(arguments: Sequence[str], cell: Cell, processes: int = 1) -> list[str]:
    """What a worker runs: `run` with these arguments, which are without the launcher's, in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    shared = torchrun if processes > 1 else []
    return [sys.executable, *shared, "-m", "kitbench", "run", *arguments, "--only", label(cell)]


# On this machine


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


# On a cluster


class SlurmWorker:
    """What submitit pickles and runs as a Slurm job: a worker, told to save its state when the job is to end.

    Slurm ends a job in three ways: at its time limit (submitit's signal comes GRACE_SECONDS before, and it calls
    `checkpoint`), on preemption (SIGTERM first), and with its node (the job is requeued, and goes on from the last
    checkpoint). In each the same command goes on where the run stands.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command, self.environment = list(command), environment

    def __call__(self) -> None:
        self.process = subprocess.Popen(self.command, env=os.environ | self.environment)
        told = False

        def tell(number: int, frame: FrameType | None) -> None:
            nonlocal told
            told = True
            self.process.terminate()

        signal.signal(signal.SIGTERM, tell)
        # Not wait(): a signal handler that waits too would find its lock taken.
        while (code := self.process.poll()) is None:
            time.sleep(0.2)
        if code and told:
            import submitit

            # Refused where Slurm has requeued the job already; where it has not, a job that leaves within the grace
            # of a preemption would count as ended.
            subprocess.run(["scontrol", "requeue", submitit.JobEnvironment().job_id], check=False)
            sys.exit(code)
        if code:
            raise RunError(f"exit code {code} of {shlex.join(self.command)}")

    def checkpoint(self) -> Any:
        """Called by submitit before it requeues the job."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        with suppress(ChildProcessError):  # reaped already by the loop above
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(SlurmWorker(self.command, self.environment))


def slurm(suite: Suite, options: Options, spread: Spread, arguments: Sequence[str], console: Console) -> list[str]:
    """Submit the cells that are not stored yet as a job array, and return the jobs' numbers.

    Cells are known by the names of their axes: this machine need not have the devices that the nodes have. Raises
    InputError, before anything is written, where Slurm or submitit is missing or what is asked for is refused.
    """
    count = 0 if spread.gpus is None else int(spread.gpus) if re.fullmatch(r"\d+", spread.gpus) else None
    if count is None:
        raise InputError(f"--gpus takes how many GPUs a run gets with --launcher slurm; found {spread.gpus!r}.")
    if count > suite.recipe.batch:
        raise InputError(f"--gpus {count}: a batch of {suite.recipe.batch} cannot be shared by so many; give fewer.")
    job = Job(suite, options)
    runs = [path.parent for path in options.out.glob("*/run.json")]
    stored = {line.work for line in survey(runs) if line.state == "done"} if runs else set()
    todo = [cell for cell in job.cells if Planned.of(cell).work not in stored]
    cpus, minutes = spread.cpus or 4, spread.minutes or 24 * 60
    where = {
        "name": f"kitbench-{suite.name}",
        "timeout_min": minutes,
        "cpus_per_task": cpus,
        **({"gpus_per_node": count} if count else {}),
        **({"slurm_partition": spread.partition} if spread.partition else {}),
        "slurm_array_parallelism": spread.jobs or 256,
        "slurm_signal_delay_s": GRACE_SECONDS,
        "slurm_additional_parameters": {"requeue": True},
    }
    console.print(
        f"{len(todo)} of {len(job.cells)} cells go to Slurm as one job array: "
        + ", ".join(f"{key} {value}" for key, value in where.items()),
        highlight=False,
        soft_wrap=True,
    )
    if spread.dry_run or not todo:
        show(todo, arguments, console, count)
        return []
    try:
        import submitit
    except ImportError as error:
        raise InputError(f"--launcher slurm needs submitit ({error}); pip install 'kitbench[slurm]'.") from error
    environment = {"OMP_NUM_THREADS": str(cpus)}
    plan = write_plan(suite, options.out, "slurm", todo)
    try:
        executor = submitit.AutoExecutor(options.out / ".launch" / "slurm", "slurm", slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**where)
        with executor.batch():
            jobs = [executor.submit(SlurmWorker(command(arguments, cell, count), environment)) for cell in todo]
    except (RuntimeError, ValueError, OSError) as error:
        plan.unlink()
        raise InputError(f"Slurm took no jobs: {' '.join(str(error).split())}.") from error
    return [str(job.job_id) for job in jobs]


def show(cells: Sequence[Cell], arguments: Sequence[str], console: Console, processes: int = 1) -> None:
    """What would be run: each cell, and the command of its worker."""
    for cell in cells:
        words = ["python", *command(arguments, cell, processes)[1:]]
        console.print(f"{label(cell):<28}{shlex.join(words)}", highlight=False, soft_wrap=True, markup=False)


def write_plan(suite: Suite, out: Path, launcher: str, cells: Sequence[Cell]) -> Path:
    """Keep what is about to be run, for `status`."""
    plan = Plan(
        launcher=launcher, pid=os.getpid(), host=os.uname().nodename, cells=tuple(Planned.of(cell) for cell in cells)
    )
    path = plan_path(out, suite.name, launcher)
    write_atomic(path, (plan.model_dump_json(indent=1) + "\n").encode())
    return path
