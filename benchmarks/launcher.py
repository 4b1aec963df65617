"""24 cells over four local workers, one of which is killed: speed-up over one after another, and what it cost.

    python benchmarks/launcher.py [--jobs 4] [--steps 200]   # measures: launcher.json
    python benchmarks/launcher.py --markdown                 # the table of the stored JSON

Every run is the real command line with one thread a cell, so that speed-up is that of the launcher alone: 4 methods
and 6 seeds of a small suite, into an empty folder. Efficiency is speed-up over the lesser of workers and cores. Cores
share memory and caches, so that two of them seldom do twice the work: "by hand" is the same cells cut by seeds into one
plain command for each core, all at once, which is what this machine can do without a launcher. In the last run the
first worker at a checkpoint gets SIGKILL; its cell has to be finished by another, and all weights have to be
bit-identical with those of the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from tabulate import tabulate

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


def run(folder: Path, steps: int, *arguments: str, kill: bool = False) -> str:
    """What one run of the suite printed; kill: SIGKILL to the first worker that has saved a checkpoint."""
    folder.mkdir()
    (folder / "cells.toml").write_text(SUITE.format(steps=steps))
    command = [sys.executable, "-m", "kitbench", "run", "--suite", "cells.toml", *arguments]
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
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}\n{text}")
    return text


def weights(folder: Path) -> dict[str, str]:
    """Checksum of every run's weights."""
    records = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("training.json")}
    return {name: record["weights_sha256"] for name, record in records.items()}


def markdown(stored: dict[str, Any]) -> str:
    alone, cores = stored["seconds"]["one after another"], stored["cores"]
    rows = [
        (name, f"{seconds:.0f}", f"{alone / seconds:.2f}", "" if seconds == alone else f"{alone / seconds / cores:.0%}")
        for name, seconds in stored["seconds"].items()
    ]
    note = (
        f"{stored['cells']} cells of {stored['steps']} steps, {stored['jobs']} workers, {cores} cores; workers killed: "
        f"{stored['killed']}; weights bit-identical: {'yes' if stored['identical'] else 'no'}."
    )
    return tabulate(rows, ("", "seconds", "speed-up", "efficiency"), "github", disable_numparse=True) + f"\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the stored JSON and measure nothing"
    )
    parser.add_argument("--json", type=Path, default=HERE / "launcher.json", help="where the figures are kept")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())))
        return
    cores = min(options.jobs, len(os.sched_getaffinity(0)))
    seeds = [",".join(map(str, range(6)[core::cores])) for core in range(cores)]
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place, started = Path(folder), time.perf_counter()

        def done(name: str) -> None:
            seconds[name] = time.perf_counter() - started - sum(seconds.values())
            print(f"{name}: {seconds[name]:.1f} s", flush=True)

        run(place / "alone", options.steps)
        done("one after another")
        (place / "by hand").mkdir()
        with ThreadPoolExecutor(cores) as pool:
            commands = [
                pool.submit(run, place / "by hand" / str(core), options.steps, "--seeds", seeds[core])
                for core in range(cores)
            ]
        for command in commands:
            command.result()
        done("by hand")
        text = run(place / "workers", options.steps, "--launcher", "local", "--jobs", str(options.jobs), kill=True)
        done("workers, one killed")
        first, *others = (weights(place / name) for name in ("alone", "by hand", "workers"))
    stored = {"cells": len(first), "steps": options.steps, "jobs": options.jobs, "cores": cores, "seconds": seconds,
              "killed": text.count("was killed"), "identical": all(first == other for other in others)}  # fmt: skip
    options.json.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"\n{markdown(stored)}")


if __name__ == "__main__":
    main()
