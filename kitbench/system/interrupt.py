"""Ctrl-C and SIGTERM: the work saves its state and leaves by itself, or is made to leave, within ten seconds.

Python runs a signal's handler between two bytecodes only, and a single operator of torch may take minutes. So a thread
gets the signal through a pipe (`signal.set_wakeup_fd`). The work asks `stop()` after every step and image; where it has
not left GRACE seconds later, the thread saves what `rescue` can save and ends the process. Every file is written aside
and renamed, so that ending at any moment leaves nothing half-written.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from kitbench.errors import Interrupted, describe_error

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 6.0
"""Seconds."""
LOCK_SECONDS = 2.0
"""Longest wait for a state that can be saved."""
EXIT_CODE = 3
END = b"\0"
"""Ends the watcher; 0 is no signal's number."""


class Stop:
    """Whether to stop; `stop()` is true once Ctrl-C or SIGTERM has come."""

    def __init__(self) -> None:
        self.asked = False
        self.state = threading.RLock()
        """Hold it while what `rescue` saves is being changed."""
        self.rescue: Callable[[], str] | None = None
        """Saves the state, in another thread than the work's, and returns what to say of it."""
        self.idle = True
        """Nothing is lost by leaving at once, wherever the signal finds the work."""
        self.grace = GRACE
        """Seconds that the work has to leave by itself."""

    def __call__(self) -> bool:
        return self.asked

    @contextmanager
    def saved_by(self, rescue: Callable[[], str]) -> Iterator[None]:
        """While the block runs, `rescue` can save its state."""
        self.rescue = rescue
        try:
            yield
        finally:
            with self.state:
                self.rescue = None


@contextmanager
def interruptible(how_to_go_on: Callable[[], str], signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask for a stop while the block runs; a second Ctrl-C ends the process at once, unsaved.

    signals: those that ask for a stop. Only for the main thread.
    how_to_go_on: makes the end of the line that is printed where the process is ended from here.
    """
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        if stop.idle:
            raise KeyboardInterrupt  # which passes through whatever guards against a stranger's code

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, ask) for number in signals}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(stop, reading, signals, how_to_go_on), daemon=True)
    watcher.start()
    try:
        yield stop
    except KeyboardInterrupt as error:
        raise Interrupted("stopped before anything was begun") from error
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writing, END)  # to close it would not do: processes that were forked meanwhile hold it open
        watcher.join()
        os.close(writing)
        os.close(reading)


def _watch(stop: Stop, reading: int, signals: Sequence[signal.Signals], how_to_go_on: Callable[[], str]) -> None:
    asked: float | None = None
    while True:
        left = None if asked is None else max(0.0, asked + stop.grace - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            _leave(stop, how_to_go_on)
        numbers = os.read(reading, 64)  # one byte a signal, SIGCHLD of the data workers among them
        if END in numbers:
            return
        if not any(number in numbers for number in signals):
            continue
        if asked is None:
            asked, stop.asked = time.monotonic(), True
        elif signal.SIGINT in numbers and time.monotonic() - asked > 1:  # workers pass the first one on at once
            _end("stopped at once; what came after the last checkpoint is lost", how_to_go_on)


def _leave(stop: Stop, how_to_go_on: Callable[[], str]) -> None:
    said = "stopped in the middle of a long operation; what was stored before is kept"
    if stop.state.acquire(timeout=LOCK_SECONDS) and stop.rescue is not None:
        try:
            said = stop.rescue()
        except Exception as error:  # noqa: BLE001 - whatever it is, the process has to end
            said = f"stopped, but not saved: {describe_error(error)}"
    _end(said, how_to_go_on)


def _end(said: str, how_to_go_on: Callable[[], str]) -> None:
    try:
        cursor = "\x1b[?25h\n" if sys.stdout is not None and sys.stdout.isatty() else ""  # a progress bar has hidden it
        os.write(sys.stderr.fileno(), f"{cursor}kitbench: {said}. {how_to_go_on()}\n".encode())
    finally:  # where nobody can be told, too: stderr is closed, or a pipe that nobody reads any more
        os._exit(EXIT_CODE)
