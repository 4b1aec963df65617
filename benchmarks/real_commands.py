"""kitbench's commands in processes of their own: started, awaited, killed; and what their runs must keep.

Every command is the real one, forked from a server that has torch imported already, so that hundreds of them take
minutes. Used by faults.py.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server is started: as many threads everywhere
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

SUITE = """
name = "faults"
title = "as small as a suite can be"
default_preset = "only"
references = ["input"]
protocol = { from = "awgn8", lpips = "none" }
seeds = [0]
task = { kind = "denoise", sigma_train = [10, 55], sigma_test = [15, 25] }
data.embedded = { modes = ["colour"], colour = { train = ["skimage-train"], test = ["skimage-test"] } }
data.folder = { modes = ["colour"], colour = { train = ["skimage-train"], test = ["skimage-test"] } }
backbone = { width = 8, head_dim = 8, blocks = [1, 1], attention_levels = [2] }
[methods.conv]
[presets.only]
recipe = { from = "smoke", steps = 24, batch = 2, crop = 32, checkpoint_every = 1 }
"""
RUN = ("run", "--suite", "faults.toml")
EXIT_CODES = (0, 2, 3)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "kitbench.runs.queue",
        "kitbench.runs.worker",
        "kitbench.launch.slurm",
        "kitbench.apply.reproduce",
        "kitbench.verdict.page.report",
        "kitbench.verdict.claims",
    ]
)


class Fault(AssertionError):
    """Something was lost, or told badly."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int | None
    text: str


def _child(folder: str, output: str, arguments: tuple[str, ...]) -> None:
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["kitbench", *arguments]
    from kitbench.__main__ import main

    main()


class Command:
    """`kitbench ARGUMENTS` in a folder, running."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        descriptor, self.output = tempfile.mkstemp(suffix=".txt")
        os.close(descriptor)
        self.arguments = arguments
        self.process = SERVER.Process(target=_child, args=(str(folder), self.output, arguments))
        self.process.start()

    def wait(self, seconds: float = 300) -> Done:
        """Its end. Raises Fault where it hangs, leaves a traceback, or ends with another code than it may."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise Fault(f"kitbench {' '.join(self.arguments)} hangs")
        done = Done(self.process.exitcode, Path(self.output).read_text(errors="replace"))
        Path(self.output).unlink()
        may = (*EXIT_CODES, 1) if self.arguments[0] in ("reproduce", "check") else EXIT_CODES
        if "Traceback" in done.text or done.code not in may:
            raise Fault(f"kitbench {' '.join(self.arguments)}: exit code {done.code}: {done.text[-2000:]}")
        return done

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        Path(self.output).unlink()


def kitbench(folder: Path, *arguments: str) -> Done:
    return Command(folder, *arguments).wait()


@contextmanager
def folder(text: str = SUITE) -> Iterator[Path]:
    """A folder with the suite in it."""
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        (Path(place) / "faults.toml").write_text(text)
        yield Path(place)


def numbers(out: Path) -> dict[str, object]:
    """All that must be bit-identical between two sets of runs: weights, losses, scores, crops. No times."""
    found: dict[str, object] = {}
    for run in sorted(path.parent for path in out.glob("*/run.json")):
        if (run / "training.json").is_file():
            training = json.loads((run / "training.json").read_text())
            losses = [line.split(",")[:4] for line in (run / "log.csv").read_text().splitlines()]
            found[run.name] = [training["weights_sha256"], training["loss"], losses]
            found[f"{run.name}/weights"] = digest(run / "weights.safetensors")
        for path in sorted((run / "eval").glob("*.json")):
            scores = json.loads(path.read_text())["scores"]
            found[f"{run.name}/{path.name}"] = [[s["image"], s["psnr"], s["ssim"]] for s in scores]
        for path in sorted((run / "crops").glob("*.png")):
            found[f"{run.name}/{path.name}"] = digest(path)
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(out: Path) -> list[str]:
    """Files that no finished run leaves behind."""
    return [
        path.name for path in out.rglob("*") if path.name.endswith(".tmp") or path.name in (".owner", "failed.json")
    ]


def require(condition: object, what: str) -> None:
    if not condition:
        raise Fault(what)


def phase(out: Path) -> str:
    """What the run of the suite's trained method is at, from its files."""
    run = next((path.parent for path in out.glob("*-s0-*/run.json")), None)
    if run is None:
        return "preparing"
    if (run / "training.json").is_file():
        return "evaluation"
    return "checkpointing" if list(run.glob(".checkpoint*.tmp")) else "training"
