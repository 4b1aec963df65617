"""Throughput of the training loop, against a bare loop of forward, backward and step on the same model and batches.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/loop.py                       # the quick preset, on the CPU
    python benchmarks/loop.py --preset full --device cuda                   # where there is a GPU

The bare loop is what one would write by hand: batches that lie ready in memory, no seeding, no log, no clipping, no
checkpoint. The training loop is `kitbench.train.train`, with all of them. Both run STEPS steps by turns; the first
STEPS / 3 of each are not counted. The figure is the median over the rounds of (bare seconds) / (loop seconds), without
the rounds in which other work held the processors. Where it held them in every round, and with --processor-time, the
ratio is that of processor time, of all threads together: the making of the loop's batches, in a thread of its own,
counts in it too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from kitbench import methods, suite
from kitbench.backbone import UNet
from kitbench.cost.timing import waited_seconds
from kitbench.data.batches import Batches
from kitbench.data.cards import card, read
from kitbench.environment import choose_device, device_name, make_repeatable
from kitbench.stop import Stop
from kitbench.store import RunFolder
from kitbench.suite import Recipe, Suite
from kitbench.train import LOG_EVERY, decay_groups, loss_of, train

STEPS = 3 * LOG_EVERY


def network(chosen: Suite, name: str) -> UNet:
    loaded = methods.load(chosen.methods[name].attention, name)
    return UNet(3, chosen.backbone, loaded, loaded.resolve(chosen.methods[name].settings), 0)


def looped(model: UNet, batches: Batches, recipe: Recipe, device: torch.device, workers: int) -> tuple[float, float]:
    """Seconds a step of kitbench's own loop, and processor seconds of all threads."""
    clocks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        log = train(
            model, batches, recipe, device, RunFolder(Path(folder)), workers,
            lambda *_: clocks.append(time.process_time()), Stop(),
        )  # fmt: skip
    return statistics.mean(line[4] for line in log[1:]), (clocks[-1] - clocks[0]) / (STEPS - LOG_EVERY)


def bare(
    model: UNet, ready: list[tuple[torch.Tensor, torch.Tensor]], recipe: Recipe, device: torch.device
) -> tuple[float, float]:
    """Seconds a step of a loop written by hand, and processor seconds of all threads."""
    model.to(device).train()
    optimiser = torch.optim.AdamW(
        decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, fused=True
    )
    clock = processor = 0.0
    for step in range(STEPS):
        if step == LOG_EVERY:
            _wait(device)
            clock, processor = time.perf_counter(), time.process_time()
        degraded, clean = (images.to(device, non_blocking=True) for images in ready[step])
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            restored = model(degraded)
        loss = loss_of(restored.float() - clean, recipe)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    _wait(device)
    seconds = time.perf_counter() - clock, time.process_time() - processor
    return seconds[0] / (STEPS - LOG_EVERY), seconds[1] / (STEPS - LOG_EVERY)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quick", help="of the suite denoise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="kit,window,conv")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare the loop's batches")
    parser.add_argument("--processor-time", action="store_true", help="the ratio of processor time, on a busy machine")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    options = parser.parse_args()
    chosen = suite.load("denoise", options.preset, [f"recipe.steps={STEPS}", "recipe.warmup=0"])
    recipe, device = chosen.recipe, choose_device(options.device)
    make_repeatable(recipe)
    batches = Batches(read(card("skimage-train"), None, "colour"), chosen.task, recipe, 0)
    ready = [batches[step] for step in range(STEPS)]
    print(
        f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, preset {options.preset}"
    )
    found = {}
    for name in options.methods.split(","):
        wall, processor, seconds, dropped = [], [], [], 0
        while len(wall) < options.rounds and len(wall) + dropped < 2 * options.rounds:
            waited, start = waited_seconds(), time.perf_counter()
            first, second = network(chosen, name), network(chosen, name)
            ours = looped(first, batches, recipe, device, options.workers)
            theirs = bare(second, ready, recipe, device)
            processor.append(theirs[1] / ours[1])
            seconds.append(ours[0])
            if waited_seconds() - waited > 0.05 * (time.perf_counter() - start):
                dropped += 1  # other processes held the processors
            else:
                wall.append(theirs[0] / ours[0])
        of = "processor time" if options.processor_time or not wall else "time"
        ratios = processor if of == "processor time" else wall
        share, low, high = statistics.median(ratios), min(ratios), max(ratios)
        found[name] = {"share": share, "of": of, "rounds": ratios, "seconds": statistics.median(seconds)}
        print(f"{name:12s} {share:6.1%} of the bare loop ({of}) [{low:.1%}, {high:.1%}], "
              f"{1e3 * statistics.median(seconds):.1f} ms a step, {dropped} rounds disturbed", flush=True)  # fmt: skip
    if options.json:
        record = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
                  "preset": options.preset, "steps": STEPS, "methods": found}  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
