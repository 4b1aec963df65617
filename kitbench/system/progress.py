"""Progress of long work: a bar on a terminal, sparse lines elsewhere; both with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kitbench.store.folder import RunFolder
from kitbench.store.records import Progress as Record
from kitbench.store.records import host_name
from kitbench.text import duration

Update = Callable[[int, str], None]
"""Called with (how much is done, what to say of it)."""
LINE_SECONDS = 20.0
BEAT_SECONDS = 5.0
"""Between two renewals of progress.json."""


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Update]:
    """Show work of `total` parts while the block runs; the block calls what it is given."""
    if not console.is_terminal:
        yield lines_of(console, title, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False),  # names of files may have brackets
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


def lines_of(console: Console, title: str, total: int, side_by_side: int = 1) -> Update:
    """Print a line at the first call, at the last, and between them when LINE_SECONDS have gone by.

    side_by_side: how many such works print on the console at the same time; each then prints less often.
    """
    first: tuple[int, float] | None = None
    last = 0.0

    def update(done: int, text: str) -> None:
        nonlocal first, last
        now = time.monotonic()
        if first is None:
            first = (done, now)
        elif done < total and now - last < LINE_SECONDS * side_by_side:
            return
        last = now
        left = ""
        if first[0] < done < total:
            left = f"  {duration((now - first[1]) / (done - first[0]) * (total - done))} left"
        console.print(f"{title}  {done}/{total}  {text}{left}", markup=False, highlight=False)

    return update


def heartbeat(folder: RunFolder, phase: Literal["training", "scoring"], total: int) -> Callable[[int], None]:
    """What keeps progress.json in a run's folder fresh, called with how much is done."""
    first: tuple[int, float] | None = None
    last = 0.0

    def beat(done: int) -> None:
        nonlocal first, last
        now = time.time()
        if first is None:
            first = (done, now)
        if now - last < BEAT_SECONDS:
            return
        last = now
        left = (now - first[1]) / (done - first[0]) * (total - done) if done > first[0] else None
        folder.write(
            "progress.json",
            Record(phase=phase, done=done, total=total, seconds_left=left, updated=now, host=host_name()),
        )

    return beat
