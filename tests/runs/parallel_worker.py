"""What each process of tests/runs/test_parallel.py runs: train in double precision, and keep the weights.

torchrun --standalone --nproc-per-node 2 -m tests.runs.parallel_worker FOLDER [--micro-batch N] [--stop-at N] [--die-at N]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from kitbench.data.batches import Batches
from kitbench.data.cards import card
from kitbench.data.photograph import read_set
from kitbench.errors import Interrupted
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.runs.train import TrainingContext, train
from kitbench.spec import loading
from kitbench.store.folder import RunFolder
from kitbench.system.interrupt import Stop
from kitbench.system.processes import joined

SUITE = loading.load_suite(
    "denoise",
    "smoke",
    ["backbone.width=8", "backbone.head_dim=8", "recipe.steps=20", "recipe.batch=6", "recipe.crop=32", "recipe.warmup=2",
     "recipe.precision=float64", "recipe.checkpoint_every=6"],
)  # fmt: skip


class StopAt(Stop):
    """As if SIGTERM had come to one process after so many steps."""

    def __init__(self, rank: int, stop_at: int | None, die_at: int | None) -> None:
        super().__init__()
        self.calls, self.rank, self.stop_at, self.die_at = 0, rank, stop_at, die_at

    def __call__(self) -> bool:
        self.calls += 1
        if self.calls == self.die_at:
            os._exit(1)  # as SIGKILL: nothing is saved
        return self.calls == self.stop_at and self.rank == 0


def trained(
    folder: Path,
    name: str,
    micro_batch: int | None,
    stop_at: int | None,
    die_at: int | None,
    changes: Mapping[str, object] | None = None,
) -> UNet:
    """Train in `folder` by the recipe, of which `changes` are made; see StopAt."""
    recipe = SUITE.recipe.model_copy(update=changes)
    with joined() as world:
        method = methods.load_method(name)
        model = UNet(3, SUITE.backbone, method, method.resolve(SUITE.methods[name].settings), 0)
        model.lay_out(torch.channels_last if recipe.channels_last else torch.contiguous_format)
        batches = Batches(read_set(card("skimage-train"), None, "colour"), SUITE.task, recipe, 5)
        stop = StopAt(world.rank, stop_at, die_at)
        cpu, run = torch.device("cpu"), RunFolder(folder)
        try:
            train(model, batches, TrainingContext(cpu, run, stop, micro_batch=micro_batch))
        except Interrupted:
            assert stop_at is not None
            return model
        if world.first:
            state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            safetensors.torch.save_file(state, folder / "weights.safetensors")
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="kit")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained(options.folder, options.method, options.micro_batch, options.stop_at, options.die_at)


if __name__ == "__main__":
    main()
