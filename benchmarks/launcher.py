"""Cells side by side: the main job's time, the speed-up of workers, what a killed one costs, and equal bits throughout.

    python benchmarks/launcher.py [--steps 400] [--skip-quick]   # on a quiet machine: launcher.json
    python benchmarks/launcher.py --markdown                      # the tables of the stored JSON

Every run is the real command line into an empty folder. First `run --suite denoise`, the main job, with the time that
it announces before it trains. Then 24 cells (4 methods, 6 seeds of a small suite) with one, two and four workers, the
last with SIGKILL to the first worker that has saved a checkpoint. All weights must be bit-identical with those made one
after another. Overhead is what a cell takes beyond its own training and scoring: worker time (wall time of the command
times workers at work) less what the records say that training and scoring took, over the cells; the start of the
command, the reading of images and the measuring of costs are part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate

from kitbench.system.environment import environment

HERE = Path(__file__).parent

SUITE = """
name = "cells"
title = "24 small cells"
default_preset = "only"
references = []
protocol = {{ from = "awgn8-tile", lpips = "none" }}
seeds = [0, 1, 2, 3, 4, 5]
[task]
kind = "denoise"
sigma_train = [10, 55]
sigma_test = [25]
[data.embedded]
modes = ["colour"]
colour = {{ train = ["skimage-train"], test = ["skimage-test"] }}
[data.folder]
modes = ["colour"]
colour = {{ train = ["skimage-train"], test = ["skimage-test"] }}
[backbone]
width = 8
head_dim = 8
blocks = [1, 1]
attention_levels = [2]
[methods.kit]
patch = 4
[methods.window]
[methods.local]
[methods.conv]
[presets.only]
recipe = {{ from = "smoke", steps = {steps}, batch = 4, crop = 48, checkpoint_every = 10 }}
"""


@dataclass(frozen=True)
class Done:
    """A finished command."""

    seconds: float
    text: str
    folder: Path

    @property
    def weights(self) -> dict[str, str]:
        """Checksum of every run's weights."""
        return {path.parent.name: record["weights_sha256"] for path, record in self.records("training.json")}

    def records(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        return [(path, json.loads(path.read_text())) for path in sorted(self.folder.rglob(name))]

    @property
    def worked(self) -> float:
        """Seconds of training and of restoring images, by the records."""
        training = sum(float(record["seconds"]) for _, record in self.records("training.json"))
        evaluations = [record for _, record in self.records("eval/*.json")]
        return training + sum(float(score["seconds"]) for record in evaluations for score in record["scores"])

    @property
    def announced(self) -> float:
        """Seconds that the command expected before it trained."""
        [found] = re.findall(r"^expected +about (?:(\d+) h )?(?:(\d+) min )?(?:(\d+) s )?for", self.text, re.MULTILINE)
        hours, minutes, seconds = (int(part or 0) for part in found)
        return float(3600 * hours + 60 * minutes + seconds)


def run(folder: Path, *arguments: str, kill: bool = False) -> Done:
    """Run the command in `folder`; kill: SIGKILL to the first worker that has saved a checkpoint."""
    command = [sys.executable, "-m", "kitbench", "run", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("KITBENCH_DATA", "KITBENCH_JOBS")}
    started = time.perf_counter()
    with (folder / "out.txt").open("w+") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env=environment)
        while process.poll() is None:
            if kill and (worker := at_a_checkpoint(folder, process.pid)):
                worker.kill()
                kill = False
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}\n{text}")
    return Done(seconds, text, folder)


def at_a_checkpoint(folder: Path, parent: int) -> psutil.Process | None:
    """A worker whose run has a checkpoint: the process that the run's lock names."""
    for checkpoint in folder.glob("results/*/checkpoint.safetensors"):
        owner = checkpoint.parent / ".owner"
        found = re.search(r'"pid": (\d+)', owner.read_text("utf-8", "replace") if owner.is_file() else "")
        if found and int(found[1]) != parent:
            return psutil.Process(int(found[1]))
    return None


def markdown(stored: dict[str, Any]) -> str:
    cells, quick = stored["cells"], stored["quick"]
    alone = cells["runs"]["1"]["seconds"]
    rows = [
        (jobs, f"{one['seconds']:.0f}", f"{alone / one['seconds']:.2f}", f"{one['overhead']:.2f}", one["killed"])
        for jobs, one in cells["runs"].items()
    ]
    head = ("workers", "seconds", "speed-up", "overhead of a cell, s", "workers killed")
    same = "bit-identical" if cells["identical"] else "NOT identical"
    lines = [
        tabulate(rows, head, "github", disable_numparse=True), "",
        f"{cells['count']} cells of {cells['steps']} steps; weights {same} throughout. On {stored['host']}.",
    ]  # fmt: skip
    if quick:
        lines += [
            "",
            f"The main job, `run --suite denoise`, takes {quick['seconds']:.0f} s, scoring and table included; before "
            f"training it announces {quick['announced']:.0f} s from there.",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="of each of the 24 cells")
    parser.add_argument("--skip-quick", action="store_true", help="keep the stored figures of the main job")
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables of the stored JSON and measure nothing"
    )
    parser.add_argument("--json", type=Path, default=HERE / "launcher.json", help="where the figures are kept")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())))
        return
    stored: dict[str, Any] = {
        "host": environment(torch.device("cpu")).host,
        "cores": len(os.sched_getaffinity(0)),
        "quick": None,
    }
    if options.skip_quick and options.json.is_file():
        stored["quick"] = json.loads(options.json.read_text()).get("quick")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if not options.skip_quick:
            (place / "quick").mkdir()
            done = run(place / "quick", "--suite", "denoise")
            stored["quick"] = {"seconds": done.seconds, "announced": done.announced}
            print(f"main job: {done.seconds:.0f} s, announced {done.announced:.0f} s", flush=True)
        runs, weights = {}, []
        for jobs in (1, 2, 4):
            own = place / str(jobs)
            own.mkdir()
            (own / "cells.toml").write_text(SUITE.format(steps=options.steps))
            done = run(own, "--suite", "cells.toml", "--jobs", str(jobs), kill=jobs == 4)
            weights.append(done.weights)
            busy = min(jobs, stored["cores"])
            runs[str(jobs)] = {
                "seconds": done.seconds, "announced": done.announced, "killed": done.text.count("was killed (SIGKILL)"),
                "overhead": (done.seconds * busy - done.worked / max(1, jobs // busy)) / len(done.weights),
            }  # fmt: skip
            print(f"{jobs} workers: {done.seconds:.1f} s", flush=True)
    stored["cells"] = {
        "count": len(weights[0]), "steps": options.steps, "runs": runs,
        "identical": all(weights[0] == other for other in weights[1:]),
    }  # fmt: skip
    options.json.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"\n{markdown(stored)}")


if __name__ == "__main__":
    main()
