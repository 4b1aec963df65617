"""What a launcher is to run: the cells by their labels, the command of each worker, and the plan that is kept.

What is planned is written to `OUT/.launch/`, where `kitbench status` reads it.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console

from kitbench.errors import InputError
from kitbench.runs.cell import Cell
from kitbench.spec.fields import Frozen, Mode, digest
from kitbench.spec.suite import Suite
from kitbench.store.files import write_atomic


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


class Planned(Frozen):
    """A cell that a launcher is to run."""

    name: str
    mode: Mode
    method: str
    seed: int | None
    work: str
    """Digest of all that decides the numbers of the cell but the device, which may not be known before it runs."""

    @classmethod
    def of(cls, cell: Cell) -> Planned:
        name = cell.folder.rpartition("-")[0]
        return cls(name=name, mode=cell.mode, method=cell.method, seed=cell.seed, work=work_of(cell.identity()))


class Plan(Frozen):
    """OUT/.launch/plan-SUITE-LAUNCHER.json"""

    schema_version: Literal[1] = 1
    launcher: str
    pid: int
    """Of the launcher; that of Slurm has left its cells to the cluster and ended."""
    host: str
    cells: tuple[Planned, ...]

    @property
    def abandoned(self) -> bool:
        """Whether the launcher that was to run the cells is gone."""
        return self.launcher == "local" and self.host == os.uname().nodename and not psutil.pid_exists(self.pid)


def work_of(identity: dict[str, object]) -> str:
    """Digest of a run's identity without its device."""
    return digest({key: value for key, value in identity.items() if key != "device"})


def plan_path(out: Path, suite: str, launcher: str) -> Path:
    return out / ".launch" / f"plan-{suite}-{launcher}.json"
