"""Many runs on a cluster: the cells of a suite as one Slurm job array, by submitit."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from kitbench.errors import InputError, RunError
from kitbench.launch.commands import ClusterOptions, command, show
from kitbench.launch.status import survey
from kitbench.runs.plan import Planned, write_plan
from kitbench.runs.prepare import Options, prepare
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder
from kitbench.system.environment import named_device

GRACE_SECONDS = 120
"""How long before its time limit Slurm tells a job to save its state."""
TIMEOUTS = 1000
"""How often a Slurm job may reach its time limit and go on from its checkpoint."""


class SlurmWorker:
    """What submitit pickles and runs as a Slurm job: a worker that saves its state when the job is to end.

    Slurm ends a job in three ways: at its time limit (submitit's signal comes GRACE_SECONDS before, and it calls
    `checkpoint`), on preemption (SIGTERM first), and with its node (the job is requeued, and goes on from the last
    checkpoint). In each the same command goes on where the run stands.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command, self.environment = list(command), environment

    def __call__(self) -> None:
        self.process = subprocess.Popen(self.command, env=os.environ | self.environment)
        stopping = False

        def tell(number: int, frame: FrameType | None) -> None:
            nonlocal stopping
            stopping = True
            self.process.terminate()

        signal.signal(signal.SIGTERM, tell)
        # Not wait(): a signal handler that waits too would find its lock taken.
        while (code := self.process.poll()) is None:
            time.sleep(0.2)
        if code and stopping:
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


def stored_runs(out: Path, kind: str | None) -> dict[str, list[RunFolder]]:
    """The trained and scored runs in a folder, by the digest of their work, which leaves out the device.

    kind: `cpu` or `cuda`, and only runs that were trained there; None: wherever they were.
    """
    paths = [path.parent for path in out.glob("*/run.json")]
    found: dict[str, list[RunFolder]] = {}
    for line in survey(paths) if paths else ():
        folder = RunFolder(out / line.name)
        if line.state != "done":
            continue
        if kind is None or folder.run.recipe is None or (folder.run.identity["device"] == "cpu") == (kind == "cpu"):
            found.setdefault(line.work, []).append(folder)
    return found


def slurm(
    suite: Suite, options: Options, spread: ClusterOptions, arguments: Sequence[str], dry_run: bool, console: Console
) -> list[str]:
    """Submit the cells that are not stored yet as a job array, and return the jobs' numbers.

    Cells are known by the names of their axes, and checked on the CPU: this machine need not have the devices that the
    nodes have. Raises InputError, before anything is written, where Slurm or submitit is missing or what is asked for
    is refused.
    """
    count = 0 if spread.gpus is None else int(spread.gpus) if re.fullmatch(r"\d+", spread.gpus) else None
    if count is None:
        raise InputError(f"--gpus takes how many GPUs a run gets with --launcher slurm; found {spread.gpus!r}.")
    if count > suite.recipe.batch:
        raise InputError(f"--gpus {count}: a batch of {suite.recipe.batch} cannot be shared by so many; give fewer.")
    kind = None if options.device == "auto" else named_device(options.device).type
    prepared = prepare(suite, replace(options, device="cpu"))
    stored = stored_runs(options.out, kind)
    todo = [
        cell
        for cell in prepared.cells
        if not any(not prepared.missing(cell, run) for run in stored.get(Planned.of(cell).work, ()))
    ]
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
        f"{len(todo)} of {len(prepared.cells)} cells go to Slurm as one job array: "
        + ", ".join(f"{key} {value}" for key, value in where.items()),
        highlight=False,
        soft_wrap=True,
    )
    if dry_run or not todo:
        show([cell.label for cell in todo], arguments, console, count)
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
            jobs = [executor.submit(SlurmWorker(command(arguments, cell.label, count), environment)) for cell in todo]
    except (RuntimeError, ValueError, OSError) as error:
        plan.unlink()
        raise InputError(f"Slurm took no jobs: {' '.join(str(error).split())}.") from error
    return [str(job.job_id) for job in jobs]
