"""A process that does not leave by itself is ended, whatever goes wrong in saving its state or in saying so."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORK = """
import os, signal, sys, threading, time
from kitbench.system.interrupt import interruptible

def rescue():
    if "fail" in sys.argv:
        raise ValueError("no such state")
    return "saved"

with interruptible(lambda: "Go on.") as stop, stop.saved_by(rescue):
    stop.idle, stop.grace = False, 0.2
    if "pipe" in sys.argv:  # that nobody reads any more
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 2)
    if "closed" in sys.argv:
        sys.stdout = sys.stderr = None  # as Python has them where the descriptors are closed
    os.kill(os.getpid(), signal.SIGTERM)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        time.sleep(0.05)
os._exit(99)
"""


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("fine", "kitbench: saved. Go on.\n"),
        ("fail", "kitbench: stopped, but not saved: ValueError: no such state. Go on.\n"),
        ("pipe", ""),
        ("closed", ""),
    ],
)
def test_work_that_does_not_stop_is_ended(case: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", WORK, case], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (3, said)
