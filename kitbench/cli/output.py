"""Output that several commands share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kitbench.cli.options import CHECK, TRACEBACK
from kitbench.errors import ExitCode, InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_tables(complete: list[Any], stamps: list[str], out: Path, console: Console) -> None:
    """Print the table of each protocol that these runs were scored under, and the command that prints it again."""
    from kitbench.verdict.render import render

    scored = {evaluation.stamp for folder in complete for evaluation in folder.evaluations()}
    shown = [stamp for stamp in stamps if stamp in scored]
    for stamp in shown:
        click.echo()
        click.echo(render(complete, "terminal", stamp), color=console.is_terminal or None)
    for folder in complete:
        click.echo(f"wrote {folder.path}")
    for stamp in shown:
        again = shlex.join(["python", "-m", "kitbench", "table", str(out), "--protocol", stamp])
        click.echo(f"To print this table again: {again}")


def check_failed() -> None:
    """Decide the exit code before the failure is printed: it is that of a failed check in a closed pipe too."""
    click.get_current_context().meta[CHECK] = ExitCode.CHECK_FAILED


def wants_traceback() -> bool:
    """Whether the command was called with --traceback."""
    return bool(click.get_current_context().meta.get(TRACEBACK))


def show_tracebacks(out: Path, sentences: Sequence[str]) -> None:
    """Print the stored tracebacks of the failures that these sentences tell of, equal ones once."""
    from kitbench.runs.failure import stored_tracebacks

    for text in dict.fromkeys(stored_tracebacks(out, sentences)):
        click.echo(text, err=True)


def one_run(found: list[Any], name: str = "--run") -> list[Any]:
    """The runs that were found, which must be one. name: of what names it."""
    if len(found) > 1:
        raise InputError(f"{name} names a folder with {len(found)} runs; give one run, for example {found[0].path}.")
    return found


def give(text: str, out: Path | None) -> None:
    """Print a text, or write it to a file, without colours."""
    from kitbench.store.files import writable_file, write_atomic

    if out is None:
        click.echo(text, nl=False)
    else:
        writable_file(out)
        write_atomic(out, click.unstyle(text).encode())
        click.echo(f"wrote {out}")


def show_grid(grid: Table, markup: bool = True) -> None:
    """Print a table of the terminal's width; without blanks at the ends of lines where the output is no terminal."""
    console = make_console()
    with nullcontext() if console.is_terminal else console.capture() as caught:
        console.print(grid, highlight=False, markup=markup)
    if caught is not None:
        click.echo("\n".join(line.rstrip() for line in caught.get().splitlines()))


def make_console() -> Console:
    """A console of the terminal's width, or 140 columns where the output is no terminal. A closed pipe is an error."""
    from rich.console import Console

    class Strict(Console):
        def on_broken_pipe(self) -> None:
            raise  # where rich has caught the error, and would exit with 1

    console = Strict()
    return console if console.is_terminal else Strict(width=140)
