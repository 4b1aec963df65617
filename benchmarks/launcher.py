"""24 cells over four local workers, one of which is killed: speed-up over one after another, and what it cost.

    python benchmarks/launcher.py [--jobs 4] [--steps 120]

Both runs are the real command line with one thread a cell, so that speed-up is that of the launcher alone: 4 methods
and 6 seeds of a small suite, into an empty folder. Efficiency is speed-up over the lesser of workers and cores. In the
second run the first worker at a checkpoint gets SIGKILL; its cell has to be finished by another, and all weights have
to be bit-identical with those of the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

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


def run(folder: Path, *arguments: str, kill: bool = False) -> tuple[float, str]:
    """Seconds and output of one run of the suite; kill: SIGKILL to the first worker that has saved a checkpoint."""
    command = [sys.executable, "-m", "kitbench", "run", "--suite", "cells.toml", *arguments]
    start = time.perf_counter()
    with (folder / "out.txt").open("w+") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None:
            if kill and any(folder.glob("results/*/checkpoint.safetensors")):
                workers = [p for p in psutil.Process(process.pid).children() if "--only" in p.cmdline()]
                if workers:
                    workers[0].kill()
                    kill = False
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}\n{text}")
    return seconds, text


def weights(folder: Path) -> dict[str, str]:
    """Checksum of every run's weights."""
    records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("results/*/training.json")}
    return {name: record["weights_sha256"] for name, record in records.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in (
            ("one after another", ()),
            ("workers", ("--launcher", "local", "--jobs", str(options.jobs))),
        ):
            place = Path(folder) / name.partition(" ")[0]
            place.mkdir()
            (place / "cells.toml").write_text(SUITE.format(steps=options.steps))
            seconds, text = run(place, *arguments, kill=name == "workers")
            found[name] = (seconds, weights(place), text)
            print(f"{name}: {len(found[name][1])} cells in {seconds:.1f} s", flush=True)
    (alone, first, _), (together, second, text) = found.values()
    speed_up = alone / together
    print(f"speed-up {speed_up:.2f} with {options.jobs} workers on {cores} cores: "
          f"efficiency {speed_up / min(options.jobs, cores):.0%}")  # fmt: skip
    print(f"workers killed: {text.count('was killed')}; weights bit-identical: {first == second and len(first) == 24}")


if __name__ == "__main__":
    main()
