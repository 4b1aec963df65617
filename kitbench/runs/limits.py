"""Whether memory and disk hold what is about to be run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kitbench.cost.memory import free_bytes, predict_peak_bytes
from kitbench.errors import METHOD_ERRORS, InputError, RunError
from kitbench.model.backbone import UNet
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import PreparedSuite
from kitbench.runs.train import loss_of
from kitbench.spec.fields import CHANNELS, Mode
from kitbench.store.records import Cost
from kitbench.text import byte_size, counted

CROPS_BYTES = 1 << 20
"""What one evaluation takes on disk, its crops with it."""


def require_space(prepared: PreparedSuite, cells: Sequence[Cell], costs: Mapping[str, Cost]) -> None:
    """Raises InputError where the disk has no room for what these cells will write."""
    average = 1 if prepared.suite.recipe.ema else 0
    kept, working = 0, 0
    for cell in cells:
        weights = 4 * costs[cell.method].parameters
        kept += weights + len(prepared.units(cell)) * CROPS_BYTES
        # Weights, two moments of the optimiser and the average; this checkpoint, the last, and the one before.
        working = max(working, 3 * (3 + average) * weights)
    out = prepared.options.out.absolute()
    free = shutil.disk_usage(next(place for place in (out, *out.parents) if place.exists())).free
    if kept + working > free:
        raise InputError(
            f"{prepared.options.out} has {byte_size(free)} left, expected {byte_size(kept + working)} for "
            f"{counted(len(cells), 'run')}; free some, or choose another --out."
        )


def tile_shape(prepared: PreparedSuite, mode: Mode) -> tuple[int, int]:
    """Height and width in pixels of the largest image, or tile of one, that is restored at once."""
    sides = [photo.shape[:2] for photos in prepared.sets[mode].test.values() for photo in photos]
    tile = prepared.protocols[mode].tile or max(map(max, sides))
    return max(((min(h, tile), min(w, tile)) for h, w in sides), key=math.prod)


def require_memory(prepared: PreparedSuite, model: UNet, cell: Cell) -> None:
    """Raises RunError where a training step, or the largest test image, will not fit, as predicted without running.

    A method that cannot run on fake tensors is let through: nothing is known of it.
    """
    recipe, channels = prepared.suite.recipe, CHANNELS[cell.mode]
    height, width = tile_shape(prepared, cell.mode)
    free = free_bytes(prepared.device)

    def step(model: nn.Module, x: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            y = model(x)
        loss_of(y.float() - x, recipe).backward()

    def forward(model: nn.Module, x: torch.Tensor) -> None:
        with torch.no_grad():
            model(x)

    moments = 2 * 4 * sum(p.numel() for p in model.parameters())
    batch = (len(prepared.pieces[0]), channels, recipe.crop, recipe.crop)
    for what, call, shape, extra, advice in (
        ("a training step", step, batch, moments, "--micro-batch"),
        (f"a test image of {width} x {height} px", forward, (1, channels, height, width), 0, "protocol.tile"),
    ):
        try:
            needed = predict_peak_bytes(call, model.train(call is step), shape) + extra
        except METHOD_ERRORS:  # it may fail on fake tensors, as state_macs says
            return
        if needed > free:
            raise RunError(
                f"{what} needs about {byte_size(needed)} (predicted) and {byte_size(free)} are free on "
                f"{prepared.device}; "
                f"set a smaller {advice}, or use a machine with more memory"
            )
