"""Exit codes, and the exceptions behind them: bad input, a run that failed, an interruption."""

from __future__ import annotations

import difflib
import errno
import sysconfig
import traceback
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What a command of kitbench returns to the shell, besides 0."""

    CHECK_FAILED = 1
    """`check`, `data check` or `reproduce` found a difference."""
    BAD_INPUT = 2
    """Wrong usage or bad input; no run was started."""
    RUN_FAILED = 3
    """A valid command failed or was interrupted; what was stored before is kept."""


METHOD_ERRORS = (Exception, SystemExit)
"""What the code of a method may raise: it may be a stranger's, and call sys.exit."""


class InputError(Exception):
    """Bad input or usage: BAD_INPUT. The message is one sentence: what was found, what was expected, what to do."""


class RunError(Exception):
    """A valid command could not be carried out: RUN_FAILED."""


class Interrupted(RunError):
    """Ctrl-C or SIGTERM: RUN_FAILED. A checkpoint was saved, and the same command continues from it."""


MANY = 30
"""Names that a message lists; of more, the nearest few."""


def nearest(word: str, known: Iterable[str]) -> str:
    """For the end of a message about an unknown name: the most similar known name, if one is, and all known names.

    Of many names only the most similar ones, and the command that lists all.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close and close[0] != word else ""
    if len(names) > MANY:
        similar = difflib.get_close_matches(word, names, n=5, cutoff=0.3)
        listed = f"Similar: {', '.join(similar)}. " if similar else ""
        return f"{hint}{listed}`python -m kitbench list` shows all {len(names)}."
    return f"{hint}Known: {', '.join(names) if names else 'none'}."


def describe_error(error: BaseException) -> str:
    """One line for a failure: the sentence of kitbench's own errors; of others the type, the first line of the message,
    and where in the user's own code it was raised, if it was raised there.
    """
    if isinstance(error, InputError | RunError):
        return str(error)
    if is_disk_full(error):
        return "no space is left where the output goes; free some, or write it elsewhere"
    message = str(error.msg if isinstance(error, SyntaxError) else error)
    place = own_place(error)
    lines = message.splitlines() or ["no message"]
    first = " ".join([lines[0], *(lines[1:2] if lines[0].endswith(":") else [])]).replace("\t", "")
    return f"{type(error).__name__}: {first}" + (f" at {place}" if place else "")


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk, or what stands for one, took no more."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def own_place(error: BaseException) -> str | None:
    """`mine.py:14 in forward`: the innermost line of the user's own code that an exception passed through.

    That is a line of a file which kitbench has called, and which belongs neither to kitbench nor to Python or an
    installed package. None where there is no such line.
    """
    if isinstance(error, SyntaxError) and error.filename is not None and not _installed(error.filename):
        return f"{short_path(error.filename)}:{error.lineno}"
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [_of_kitbench(frame.f_globals.get("__name__", "")) for frame, _ in frames]
    if True not in ours:
        return None
    for number in range(len(frames) - 1, ours.index(True), -1):
        frame, line = frames[number]
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if not ours[number] and not _installed(file):
            return f"{short_path(file)}:{line}" + ("" if function == "<module>" else f" in {function}")
    return None


def short_path(file: str) -> str:
    """A path as seen from the present folder, where it lies inside."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _of_kitbench(module: str) -> bool:
    return module == "kitbench" or module.startswith("kitbench.")


def _installed(file: str) -> bool:
    """Whether a source file belongs to Python or to an installed package, or is none."""
    path = Path(file)
    library = Path(sysconfig.get_path("stdlib"))
    return file.startswith("<") or bool({"site-packages", "dist-packages"} & set(path.parts)) or library in path.parents
