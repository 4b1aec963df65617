"""Exit codes, and the exceptions behind them: bad input, a run that failed, an interruption."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a command of kitbench returns to the shell, besides 0."""

    CHECK_FAILED = 1
    """`check`, `data check` or `reproduce` found a difference."""
    BAD_INPUT = 2
    """Wrong usage or bad input; nothing was written."""
    RUN_FAILED = 3
    """A run failed or was interrupted; what was stored before is kept."""


class InputError(Exception):
    """Bad input or usage: BAD_INPUT. The message is one sentence: what was found, what was expected, what to do."""


class RunError(Exception):
    """A valid command could not be carried out: RUN_FAILED."""


class Interrupted(RunError):
    """Ctrl-C or SIGTERM: RUN_FAILED. A checkpoint was saved, and the same command continues from it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """For the end of a message about an unknown name: the most similar known name, if one is, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) if names else 'none'}."


def describe_error(error: Exception) -> str:
    """One line for a failure that kitbench did not expect: its type and the first line of its message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the disk; free some, or choose another --out"
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
