"""Which cells are about to be run: a suite restricted to one of them, and the plan that is kept for `status`.

What is planned is written to `OUT/.launch/`, where `kitbench status` reads it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from kitbench.errors import InputError
from kitbench.runs.cell import Cell, axes
from kitbench.spec.fields import Frozen, Mode, digest
from kitbench.spec.suite import Suite
from kitbench.store.files import write_atomic
from kitbench.store.records import host_name, read_record
from kitbench.system.processes import current


def restrict(suite: Suite, wanted: str) -> Suite:
    """The suite with one of its cells alone, by its label. Raises InputError for a label that names none."""
    data = suite.data
    for cell in axes(suite, dict.fromkeys((*data.embedded.modes, *data.folder.modes))):
        if cell.label != wanted:
            continue
        changes: dict[str, Any] = {"references": (cell.method,), "methods": {}}
        if cell.seed is not None:
            methods = {cell.method: suite.methods[cell.method]}
            changes = {"references": (), "methods": methods, "seeds": (cell.seed,)}
        # Where one of the sources has no such mode, the other stands for both: never is another mode run instead.
        having = [source for source in (data.embedded, data.folder) if cell.mode in source.modes]
        embedded, folder = (source.model_copy(update={"modes": (cell.mode,)}) for source in (having[0], having[-1]))
        sources = {"embedded": embedded, "folder": folder}
        return suite.model_copy(update={**changes, "data": data.model_copy(update=sources)})
    raise InputError(f"Suite {suite.name!r} has no cell {wanted!r}; give MODE/METHOD/SEED, for example colour/kit/0.")


def write_plan(suite: Suite, out: Path, launcher: str, cells: Sequence[Cell], stopped: bool = False) -> Path:
    """Keep what is about to be run, or with `stopped` what was, for `status`."""
    plan = Plan(
        launcher=launcher, pid=os.getpid(), host=host_name(), cells=tuple(Planned.of(cell) for cell in cells),
        stopped=stopped,
    )  # fmt: skip
    path = plan_path(out, suite.name, plan)
    write_atomic(path, (plan.model_dump_json(indent=1) + "\n").encode())
    return path


@contextmanager
def planned(suite: Suite, out: Path, cells: Sequence[Cell]) -> Iterator[None]:
    """Keep what is about to be run here, for `status`, while the block runs; if it is stopped, until the suite is run
    again.
    """
    if len(cells) < 2 or not current().first:  # a single run says by itself what it is at
        yield
        return
    for left in out.glob(f".launch/plan-{glob.escape(suite.name)}-local*.json"):
        with suppress(InputError):  # its command has ended meanwhile, and deleted it
            if read_record(Plan, left).abandoned:
                left.unlink(missing_ok=True)
    path = write_plan(suite, out, "local", cells)
    try:
        yield
    except BaseException:
        write_plan(suite, out, "local", cells, stopped=True)
        raise
    path.unlink(missing_ok=True)


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
        name = cell.folder.rpartition("-")[0] + (f" lr {cell.lr:g}" if cell.lr is not None else "")
        return cls(name=name, mode=cell.mode, method=cell.method, seed=cell.seed, work=work_of(cell.identity()))


class Plan(Frozen):
    """OUT/.launch/plan-SUITE-LAUNCHER-CELLS.json"""

    schema_version: Literal[1] = 1
    launcher: str
    pid: int
    """Of the launcher; that of Slurm has left its cells to the cluster and ended."""
    host: str
    cells: tuple[Planned, ...]
    stopped: bool = False
    """Whether the launcher was stopped before it had run all of them."""

    @property
    def abandoned(self) -> bool:
        """Whether the launcher that was to run the cells is gone."""
        if self.stopped:
            return True
        return self.launcher == "local" and self.host == host_name() and not psutil.pid_exists(self.pid)


def work_of(identity: dict[str, object]) -> str:
    """Digest of a run's identity without its device."""
    return digest({key: value for key, value in identity.items() if key != "device"})


def plan_path(out: Path, suite: str, plan: Plan) -> Path:
    """Named by its cells: commands that run others of the same suite keep plans of their own."""
    cells = digest([cell.work for cell in plan.cells])[:8]
    return out / ".launch" / f"plan-{suite}-{plan.launcher}-{cells}.json"
