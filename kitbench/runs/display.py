"""Progress of the cells that are under way: bars on a terminal, sparse lines elsewhere; both with the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kitbench.runs.announce import Expected
from kitbench.runs.cell import Cell
from kitbench.runs.work import Phase
from kitbench.system.progress import Update, lines_of
from kitbench.text import duration

WIDE = 120
"""Columns of a terminal from which on bars and the time gone by are shown beside the numbers."""
BAR = 24


def leading(text: str, room: int) -> str:
    """As many of the text's parts, separated by commas, as have room; at least the first."""
    while len(text) > room and ", " in text:
        text = text.rpartition(", ")[0]
    return text


class Display:
    """What is said of the cells while they are worked on, `slots` of them at a time."""

    def __init__(self, console: Console, cells: Mapping[Cell, Expected], slots: int) -> None:
        """`cells`: those to be worked on in order, with the time that each is expected to take."""
        self.console, self.slots = console, slots
        self._expected = cells
        self._done = dict.fromkeys(cells, 0.0)
        """Of each cell's expected seconds, those whose work is done."""
        self._titles = {
            cell: f"[{number}/{len(cells)}] {cell.mode} {cell.method}{f' seed {cell.seed}' if cell.trained else ''}"
            f"{f' lr {cell.lr:g}' if cell.lr is not None else ''}"
            for number, cell in enumerate(cells, 1)
        }
        self._bars: Progress | None = None
        self._tasks: dict[tuple[Cell, Phase], TaskID] = {}
        self._lines: dict[tuple[Cell, Phase], Update] = {}
        self._began = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show bars on a terminal while the block runs."""
        self._began = time.monotonic()
        if not self.console.is_terminal:
            yield
            return
        wide = self.console.width >= WIDE
        columns = (
            TextColumn("{task.description}"),
            *([BarColumn(bar_width=BAR)] if wide else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            *([TimeElapsedColumn()] if wide else []),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.console) as self._bars:
            yield
        self._bars = None

    def say(self, cell: Cell, text: str) -> None:
        self.console.print(f"{escape(self._titles[cell])}  {escape(text)}", highlight=False)

    def advance(self, cell: Cell, phase: Phase, done: int, total: int, text: str) -> None:
        """So much of a phase of a cell is done."""
        expected = self._expected[cell]
        before = expected.saved_steps if phase == "training" else 0
        share = max(0, done - before) / max(1, total - before)
        self._done[cell] = (
            share * expected.training if phase == "training" else expected.training + share * expected.scoring
        )
        title = self._titles[cell] + (" scoring" if phase == "scoring" else "")
        if self._bars is None:
            if (cell, phase) not in self._lines:
                self._lines[cell, phase] = lines_of(self.console, title, total, self.slots)
            self._lines[cell, phase](done, text)
            return
        left = f"{found} left in all" if (found := self.time_left()) else ""
        if (cell, phase) not in self._tasks:
            self._tasks[cell, phase] = self._bars.add_task(escape(title), total=total, text="", left="")
        task = self._tasks[cell, phase]
        fixed = [title, f"{total}/{total}", left, *(["#" * BAR, "0:00:00"] if self.console.width >= WIDE else [])]
        room = self.console.width - sum(len(part) + 1 for part in fixed)
        self._bars.update(task, completed=done, text=escape(leading(text, room)), left=left)
        if done >= total:
            self._bars.remove_task(task)
            del self._tasks[cell, phase]

    def finished(self, cell: Cell, seconds: float) -> None:
        """A cell is complete; `seconds`: since its work began."""
        self._done[cell] = self._expected[cell].seconds
        for key in [key for key in self._tasks if key[0] is cell]:
            if self._bars is not None:
                self._bars.remove_task(self._tasks.pop(key))
        left = self.time_left()
        self.say(cell, f"done in {duration(seconds)}" + (f"; about {left} left in all" if left else ""))

    def failed(self, cell: Cell, sentence: str) -> None:
        self._done[cell] = self._expected[cell].seconds
        self.console.print(f"[red]failed[/red] {escape(sentence)}", highlight=False, soft_wrap=True)

    def time_left(self) -> str:
        """How long all cells take from here, by the speed so far; nothing where that is not known, or all is done."""
        whole = sum(expected.seconds for expected in self._expected.values())
        done = sum(self._done.values())
        if not 0.01 * whole < done < whole:
            return ""
        return duration((time.monotonic() - self._began) / done * (whole - done))


@dataclass(frozen=True)
class CellReporter:
    """The reporter of one cell that is worked on in this process."""

    display: Display
    cell: Cell

    def say(self, text: str) -> None:
        self.display.say(self.cell, text)

    def advance(self, phase: Phase, done: int, total: int, text: str) -> None:
        self.display.advance(self.cell, phase, done, total, text)
