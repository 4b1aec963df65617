"""`python -m kitbench` in processes forked from one that has imported its modules: tests start hundreds of commands.

A child has a folder, an environment, files for its output and an exit code of its own, and runs the module as Python
does. Nothing has run in the process that it is forked from.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kitbench.__main__ import ENVIRONMENT

MODULES = (
    "torch._dynamo", "kitbench.cli.main", "kitbench.runs.queue", "kitbench.runs.tune", "kitbench.launch.slurm",
    "kitbench.verdict.render", "kitbench.verdict.claims", "kitbench.verdict.page.report", "kitbench.apply.evaluate_run",
)  # fmt: skip
"""What most commands import."""


def command(
    folder: Path, arguments: Sequence[str | Path], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` would return of the command. Raises subprocess.TimeoutExpired, as it does."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as written:
        paths = [Path(written) / "stdout", Path(written) / "stderr"]
        request = {
            "folder": str(folder), "arguments": [str(argument) for argument in arguments], "timeout": timeout,
            "environment": dict(environment), "output": [str(path) for path in paths],
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server has ended with exit code {server.wait()}"
        code = json.loads(answer)
        out, error = (path.read_text() for path in paths)
    if code is None:
        raise subprocess.TimeoutExpired(arguments, timeout, out, error)
    return subprocess.CompletedProcess(arguments, code, out, error)


@cache
def _server() -> subprocess.Popen[str]:
    """Ends when its standard input is closed, which is when this process ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.forked"], cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT | os.environ,
    )  # fmt: skip


def serve() -> None:
    """Run the commands that standard input asks for, a line of JSON each; print the exit code of each."""
    for module in MODULES:
        importlib.import_module(module)
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)
            del sys.modules["kitbench.__main__"]  # of which this module has taken what is set before any import
            try:
                runpy.run_module("kitbench", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                _leave(int(end.code or 0))
            return
        print(json.dumps(_code(child, request["timeout"])), flush=True)


def _become(request: dict[str, Any]) -> None:
    """Make this process the one that the command is to run in."""
    os.setsid()
    for number, path in enumerate([os.devnull, *request["output"]]):
        file = os.open(path, os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["kitbench", *request["arguments"]]


def _leave(code: int) -> None:
    """End as Python does, but for its taking apart of modules and objects: that takes three seconds after torch."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _code(child: int, timeout: float) -> int | None:
    """Exit code of the child, None where it ran too long and was killed."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


if __name__ == "__main__":
    serve()
