"""What is queued, running, done and failed, from the run folders and the plans beside them alone.

A run under way keeps `progress.json` in its folder, renewed every few seconds; a launcher keeps what it is about to run
in `OUT/.launch/` (delete that of a Slurm array that was cancelled). Neither decides a number. Works wherever the folder
can be read: a run of another machine of a cluster counts as running while its progress is fresh.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kitbench.errors import InputError
from kitbench.runs.plan import Plan, work_of
from kitbench.store.folder import TRIALS, RunFolder, find
from kitbench.store.records import Run, host_name, read_record
from kitbench.text import duration

State = Literal["running", "queued", "stopped", "failed", "damaged", "done"]
STATES: tuple[State, ...] = ("running", "queued", "stopped", "failed", "damaged", "done")
FRESH_SECONDS = 300.0
"""A run whose progress is older than this is not running any more, where its lock cannot tell."""


@dataclass(frozen=True)
class Line:
    """One run, or one that is planned."""

    name: str
    state: State
    work: str
    done: int | None
    total: int | None
    """Steps while training, images while scoring."""
    left: float | None
    """Seconds, as the run itself expects."""
    note: str


def survey(paths: Sequence[Path], now: Callable[[], float] = time.time) -> list[Line]:
    """Every run at the paths (folders of runs, or folders that hold them), then what is planned but not begun.

    Trials of searches of learning rates are among them. Raises InputError for a path with nothing of these.
    """
    lines, plans = [], list[Path]()
    folders: dict[Path, RunFolder] = {}
    for path in paths:
        places = [place for place in (path, path / TRIALS) if place == path or place.is_dir()]
        planned = [plan for place in places for plan in sorted(place.glob(".launch/plan-*.json"))]
        folders |= {folder.path.resolve(): folder for folder in _runs_at(places, bool(planned))}
        plans += planned
    rates: dict[str, dict[str, float]] = defaultdict(dict)
    """By a name without the digits of its key, the rate of each run."""
    for folder in folders.values():
        try:
            lines.append(_line(folder, folder.run, now()))
            if folder.run.recipe is not None:
                rates[_keyless(folder.path.name)][folder.path.name] = folder.run.recipe.lr
        except InputError as error:
            lines.append(Line(folder.path.name, "damaged", "", None, None, None, str(error)))
    lines = [replace(line, name=_with_rate(line.name, rates[_keyless(line.name)])) for line in lines]
    begun = {line.work for line in lines}
    for path in plans:
        plan = read_record(Plan, path)
        state: State = "stopped" if plan.abandoned else "queued"
        for cell in plan.cells:
            if cell.work not in begun:
                begun.add(cell.work)
                note = "not begun; the command that was to run it is gone" if plan.abandoned else ""
                lines.append(Line(cell.name, state, cell.work, None, None, None, note))
    return sorted(lines, key=lambda line: STATES.index(line.state))


def _runs_at(places: Sequence[Path], planned: bool) -> list[RunFolder]:
    """The runs in these folders. Raises InputError, about the first, where there are none and nothing is planned."""
    found, refused = list[RunFolder](), list[InputError]()
    for place in places:
        try:
            found += find([place])
        except InputError as error:
            refused.append(error)
    if not found and not planned:
        raise refused[0]
    return found


def _keyless(name: str) -> str:
    """The name of a run's folder without the digits of its key."""
    return name.rpartition("-")[0]


def _with_rate(name: str, rates: Mapping[str, float]) -> str:
    """The name of a run's folder, with its learning rate where another run has another.

    rates: by folder, of the runs of this method and seed.
    """
    return name if name not in rates or len({*rates.values()}) < 2 else f"{name} lr {rates[name]:g}"


def _line(folder: RunFolder, run: Run, now: float) -> Line:
    progress, work = folder.progress, work_of(run.identity)
    steps = run.recipe.steps if run.recipe else None
    failure = folder.failure and _without_name(folder.failure, folder.path.name)
    if progress is not None:
        fresh = now - progress.updated < FRESH_SECONDS
        running = folder.held() if progress.host == host_name() else fresh
        what = f"{progress.phase}; {duration(now - progress.updated)} ago" if not running else progress.phase
        state: State = "running" if running else "failed" if failure else "stopped"
        note = failure if state == "failed" and failure else what
        left = progress.seconds_left if running else None
        done = progress.done if running or progress.phase == "scoring" else folder.saved_steps
        return Line(folder.path.name, state, work, done, progress.total, left, note)
    if failure:
        return Line(
            folder.path.name, "failed", work, steps if folder.trained else folder.saved_steps, steps, None, failure
        )
    if folder.held():
        return Line(folder.path.name, "running", work, None, steps, None, "preparing")
    if not any((folder.path / "eval").glob("*.json")):
        done = steps if folder.trained else folder.saved_steps
        return Line(folder.path.name, "stopped", work, done, steps, None, "not scored")
    _ = folder.evaluations(), folder.training, folder.logged()  # each refuses a damaged record
    return Line(folder.path.name, "done", work, steps, steps, None, "")


def _without_name(failure: str, name: str) -> str:
    """The sentence of a failure without the run's name and learning rate, which stand before it."""
    named, _, why = failure.partition(": ")
    return why if named.partition(" (learning rate ")[0] == name else failure


def status_rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    """The cells of the table that `status` prints, a list a line."""
    for line in lines:
        share = "" if line.total is None else f"{line.done or 0}/{line.total}"
        left = "" if line.left is None else duration(line.left)
        yield [line.state, line.name, share, left, line.note]


def summary(lines: Sequence[Line]) -> str:
    """`3 running, 20 queued, 1 done; the longest has about 5 min left`."""
    counts = {state: sum(line.state == state for line in lines) for state in STATES}
    text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    left = [line.left for line in lines if line.left is not None]
    return f"{text}; the longest that is running has about {duration(max(left))} left" if left else text
