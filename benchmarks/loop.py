"""Throughput of the training loop, against a bare loop of forward, backward and step on the same model and batches.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/loop.py                       # the quick preset, on the CPU: loop.json
    python benchmarks/loop.py --preset full --device cuda --json gpu.json   # where there is a GPU
    python benchmarks/loop.py --markdown                                    # the table of the stored JSON, and the aims

The bare loop is what one would write by hand: batches that lie ready in memory, no seeding, no log, no clipping, no
checkpoint. The training loop is `kitbench.runs.train.train`, with all of them. They train a model each, in one process
and by turns, a stretch of ten steps at a time, so that both meet the same state of the machine. The figure is the
median over the loop's stretches of (mean seconds of the bare stretches before and behind it) / (its own seconds), the
quartiles in brackets; the first is not counted, nor are those in which other work held the processors. Where it held
them in most of them, and with --processor-time, the ratio is that of processor time, of all threads together: the
making of the loop's batches, in a thread of its own, counts in it too. Processes that prepare batches (--workers) go on
while the bare loop runs; a stretch is then longer, ten times what they keep ready. On CUDA the bare loop's batches lie
in pinned memory. Waiting for data is the share of the loop's time in which it waits for its next batch; a GPU may have
work left meanwhile. Exit codes: 0; 2, bad options.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from tabulate import tabulate

from kitbench.cost.timing import waited_seconds
from kitbench.data.batches import Batches
from kitbench.data.cards import card
from kitbench.data.photograph import read_set
from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.runs.train import LOG_EVERY, TrainingContext, decay_groups, loss_of, train
from kitbench.spec import loading
from kitbench.spec.suite import Recipe, Suite
from kitbench.store.folder import RunFolder
from kitbench.store.log import LogLine
from kitbench.system.environment import choose_device, device_name, environment, gpu_state, make_repeatable
from kitbench.system.interrupt import Stop

HERE = Path(__file__).parent
AIMED_SHARE, AIMED_STEPS = 0.95, 10.0  # of the bare loop; a second, on CUDA


class Spent(NamedTuple):
    """Seconds: of the clock, of the processors in all threads, and spent by threads that were ready but did not run."""

    clock: float
    processor: float
    waited: float


def now(device: torch.device) -> Spent:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Spent(time.perf_counter(), time.process_time(), waited_seconds())


def since(start: Spent, device: torch.device) -> Spent:
    return Spent(*(b - a for a, b in zip(start, now(device), strict=True)))


def network(chosen: Suite, name: str) -> UNet:
    loaded = methods.load_method(chosen.methods[name].attention, name)
    model = UNet(3, chosen.backbone, loaded, loaded.resolve(chosen.methods[name].settings), 0)
    model.lay_out(torch.channels_last if chosen.recipe.channels_last else torch.contiguous_format)
    return model


def bare(
    model: UNet, ready: list[tuple[torch.Tensor, torch.Tensor]], recipe: Recipe, device: torch.device
) -> Iterator[Spent]:
    """A loop written by hand, a stretch of as many steps as batches are ready at a time: what each took."""
    model.to(device).train()
    optimiser = torch.optim.AdamW(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, fused=recipe.fused
    )
    while True:
        start = now(device)
        for images in ready:
            degraded, clean = (image.to(device, non_blocking=True) for image in images)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                restored = model(degraded)
            loss = loss_of(restored.float() - clean, recipe)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        yield since(start, device)


class Stretches(NamedTuple):
    """Of the loop, of the bare loop, seconds in which the loop waited for data; the state of the GPU at work.

    Bare stretch i lies between the loop's stretches i and i + 1.
    """

    ours: list[Spent]
    theirs: list[Spent]
    waited: list[float]
    gpu_state: dict[str, float | str | None] | None


def measured(
    chosen: Suite, name: str, batches: Batches, ready: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device,
    workers: int,
) -> Stretches:  # fmt: skip
    """Train with the loop and by hand, by turns."""
    by_hand = bare(network(chosen, name), ready, chosen.recipe, device)
    ours, theirs, start = [], [], now(device)

    def turn(line: LogLine) -> None:
        nonlocal start
        if line.step % len(ready):
            return
        ours.append(since(start, device))
        theirs.append(next(by_hand))
        start = now(device)

    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        log = train(network(chosen, name), batches, TrainingContext(device, run, Stop(), workers, report=turn))
    # A line of the log is the mean of LOG_EVERY steps; its last entry is what each of them waited.
    lines = len(ready) // LOG_EVERY
    waited = [LOG_EVERY * sum(line.seconds_data for line in log[at : at + lines]) for at in range(0, len(log), lines)]
    state = gpu_state(device, lambda: next(by_hand)) if device.type == "cuda" else None
    return Stretches(ours, theirs, waited, state)


def ratios(ours: list[Spent], theirs: list[Spent], of: Callable[[Spent], float], quiet: bool) -> list[float]:
    found = []
    for place in range(1, len(ours)):
        group = (theirs[place - 1], ours[place], theirs[place])
        if not quiet or all(spent.waited < 0.05 * spent.clock for spent in group):
            found.append((of(group[0]) + of(group[2])) / 2 / of(group[1]))
    return found


def markdown(stored: dict[str, Any]) -> str:
    """The table, where it was made, and on CUDA whether the aims are reached: of stored figures alone."""
    told = any("waiting" in found for found in stored["methods"].values())
    rows = [
        (name, f"{found['share']:.1%}", " to ".join(f"{x:.1%}" for x in found["quartiles"]), found["of"],
         f"{1e3 * found['seconds']:.1f}", *([f"{found['waiting']:.1%}"] if told else []), len(found["stretches"]))
        for name, found in stored["methods"].items()
    ]  # fmt: skip
    head = ("method", "of the bare loop", "quartiles", "in", "ms per step", *(["waiting for data"] if told else []),
            f"stretches of {stored['stretch']} steps")  # fmt: skip
    settings = "".join(f", {setting}" for setting in stored.get("set", []))
    place = (
        f"{stored['device']}, {stored['threads']} threads, torch {stored['torch']}, preset {stored['preset']}{settings}"
    )
    lines = [tabulate(rows, head, "github", disable_numparse=True), "", f"On {place}."]
    if stored["device"] != "cpu":
        lines += ["", f"Aim: at least {AIMED_SHARE:.0%} of the bare loop, and {AIMED_STEPS:g} steps per second.", ""]
        for name, found in stored["methods"].items():
            share = "reached" if found["share"] >= AIMED_SHARE else "not reached"
            if found["of"] != "time":
                share = f"but in {found['of']}, which says nothing of a GPU's"
            steps = "reached" if 1 / found["seconds"] >= AIMED_STEPS else "not reached"
            rate = f"{1 / found['seconds']:.1f} steps per second, {steps}"
            lines.append(f"- {name}: {found['share']:.1%}, {share}; {rate}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick", help="of the suite denoise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="kit,window,conv")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the suite, as "
                        "for kitbench run: recipe.channels_last=false times the other memory format")  # fmt: skip
    parser.add_argument("--stretches", type=int, default=40, help="of each loop and method")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare the loop's batches")
    parser.add_argument("--processor-time", action="store_true", help="the ratio of processor time, on a busy machine")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the stored JSON and measure nothing"
    )
    parser.add_argument("--json", type=Path, default=HERE / "loop.json", help="where the figures are kept")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())))
        return
    if options.stretches < 2:
        parser.error(f"--stretches {options.stretches} leaves none to count, the first being left out; give 2 or more")
    stretch = LOG_EVERY * max(1, 2 * options.workers)
    steps = stretch * options.stretches
    try:
        device = choose_device(options.device)
        overrides = [f"recipe.steps={steps}", "recipe.warmup=0", *options.set]
        chosen = loading.load_suite("denoise", options.preset, overrides)
    except InputError as error:
        parser.error(str(error))
    recipe = chosen.recipe
    make_repeatable(recipe)
    batches = Batches(read_set(card("skimage-train"), None, "colour"), chosen.task, recipe, 0)
    ready = [batches[step] for step in range(stretch)]
    if device.type == "cuda":
        ready = [(degraded.pin_memory(), clean.pin_memory()) for degraded, clean in ready]
    found: dict[str, Any] = {}
    stored = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
              "preset": options.preset, "set": options.set, "stretch": stretch, "methods": found}  # fmt: skip
    if device.type == "cuda":
        stored["driver"] = environment(device).driver
    for name in options.methods.split(","):
        ours, theirs, waited, state = measured(chosen, name, batches, ready, device, options.workers)
        shares, of = ratios(ours, theirs, lambda s: s.clock, quiet=True), "time"
        if options.processor_time or len(ours) - 1 > 2 * len(shares):
            shares, of = ratios(ours, theirs, lambda s: s.processor, quiet=False), "processor time"
        low, share, high = np.percentile(shares, (25, 50, 75)).tolist()
        found[name] = {
            "share": share,
            "quartiles": [low, high],
            "of": of,
            "seconds": statistics.median(spent.clock for spent in ours[1:]) / stretch,
            "waiting": statistics.median(
                seconds / spent.clock for seconds, spent in zip(waited[1:], ours[1:], strict=True)
            ),
            "gpu_state": state,
            "stretches": shares,
        }
        print(f"{name}: {share:.1%} of the bare loop", flush=True)
        options.json.write_text(json.dumps(stored, indent=1) + "\n")  # a call that is cut off keeps what it measured
    print(f"\n{markdown(stored)}")


if __name__ == "__main__":
    main()
