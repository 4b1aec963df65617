"""The two ways in which kitbench stops: the user's input is at fault (exit code 2), or a run failed (exit code 3)."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class InputError(Exception):
    """Bad input or usage. The message is one sentence: what was found, what was expected, what to do. Exit code 2."""


class RunError(Exception):
    """A run that was rightly asked for did not succeed. Exit code 3."""


class Interrupted(RunError):
    """Ctrl-C or SIGTERM: the state was saved, and the same command goes on. Exit code 3."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses `word`: the nearest known one, and all that are known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) if names else 'none'}."


def describe_error(error: Exception) -> str:
    """One line for a failure that kitbench did not expect: its type and the first line of its message."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the disk; free some, or choose another --out"
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
