"""What each method costs on this machine, measured before training; refused where disk or memory will not do."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from kitbench.cost.agreement import state_macs
from kitbench.cost.memory import free_bytes, peak_bytes, predict_peak_bytes
from kitbench.errors import InputError, RunError
from kitbench.model.backbone import UNet
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import Job
from kitbench.runs.train import loss_of
from kitbench.spec.fields import CHANNELS
from kitbench.store.records import Cost
from kitbench.text import gib

RESOLUTION = 256
"""Side in pixels of the image that GMACs are stated for."""
CROPS_BYTES = 1 << 20
"""What one evaluation takes on disk, its crops with it."""


@dataclass(frozen=True)
class Probe:
    """What one method costs here, measured before training."""

    cost: Cost
    step_seconds: float
    image_seconds: float
    """One forward of a training batch, a pixel."""


def require_space(job: Job, cells: list[Cell], probes: dict[str, Probe]) -> None:
    """Raises InputError where the disk has no room for what these cells will write."""
    average = 1 if job.suite.recipe.ema else 0
    kept, working = 0, 0
    for cell in cells:
        weights = 4 * probes[cell.method].cost.parameters
        kept += weights + len(job.units(cell)) * CROPS_BYTES
        # Weights, two moments of the optimiser and the average; this checkpoint, the last, and the one before.
        working = max(working, 3 * (3 + average) * weights)
    out = job.options.out.absolute()
    free = shutil.disk_usage(next(place for place in (out, *out.parents) if place.exists())).free
    if kept + working > free:
        raise InputError(
            f"{job.options.out} has {gib(free)} left, and these {len(cells)} runs need about "
            f"{gib(kept + working)}; free some, or choose another --out."
        )


def require_memory(job: Job, model: UNet, cell: Cell) -> None:
    """Raises RunError where a training step, or the largest test image, will not fit, as predicted without running.

    A method that cannot run on fake tensors is let through: nothing is known of it.
    """
    recipe, channels, protocol = job.suite.recipe, CHANNELS[cell.mode], job.protocols[cell.mode]
    sides = [photo.shape[:2] for photos in job.sets[cell.mode].test.values() for photo in photos]
    tile = protocol.tile or max(map(max, sides))
    height, width = max(((min(h, tile), min(w, tile)) for h, w in sides), key=math.prod)
    free = free_bytes(job.device)

    def step(model: nn.Module, x: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
            y = model(x)
        loss_of(y.float() - x, recipe).backward()

    def forward(model: nn.Module, x: torch.Tensor) -> None:
        with torch.no_grad():
            model(x)

    moments = 2 * 4 * sum(p.numel() for p in model.parameters())
    batch = (len(job.pieces[0]), channels, recipe.crop, recipe.crop)
    for what, call, shape, extra, advice in (
        ("a training step", step, batch, moments, "--micro-batch"),
        (f"a test image of {width} x {height} px", forward, (1, channels, height, width), 0, "protocol.tile"),
    ):
        try:
            needed = predict_peak_bytes(call, model.train(call is step), shape) + extra
        except Exception:  # noqa: BLE001 - a stranger's method may fail on fake tensors, as state_macs says
            return
        if needed > free:
            raise RunError(
                f"{what} needs about {gib(needed)} (predicted) and {gib(free)} are free on {job.device}; "
                f"set a smaller {advice}, or use a machine with more memory"
            )


def probe_method(job: Job, cell: Cell) -> Probe:
    """Cost of a method: counted on fake tensors; memory and time from a few steps on the device."""
    recipe, channels = job.suite.recipe, CHANNELS[cell.mode]
    model = job.build(cell)
    require_memory(job, model, cell)
    macs = state_macs(model.eval(), channels, RESOLUTION, model.macs(RESOLUTION, RESOLUTION))
    model.to(job.device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    x = torch.rand(len(job.pieces[0]), channels, recipe.crop, recipe.crop, device=job.device)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            y = model(x)
        loss_of(y.float() - x, recipe).backward()
        optimiser.step()

    def forward() -> None:
        with torch.inference_mode():
            model(x)

    step()
    peak = peak_bytes(step, job.device)
    step_seconds, forward_seconds = (_seconds(fn, job.device) for fn in (step, forward))
    calibration_seconds = _seconds(calibration(job.device), job.device, runs=5)
    return Probe(
        Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            attention_parameters=sum(p.numel() for _, a in model.attentions() for p in a.parameters()),
            resolution=RESOLUTION,
            macs=macs.closed,
            macs_counted=macs.counted,
            macs_note=macs.note,
            train_peak_bytes=peak,
            memory_note=None,
            calibration_seconds=calibration_seconds,
        ),
        step_seconds * len(job.pieces),
        forward_seconds / x[:, 0].numel(),
    )


def _seconds(fn: Callable[[], None], device: torch.device, runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        clock = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - clock)
    return statistics.median(times)


def calibration(device: torch.device) -> Callable[[], None]:
    """A fixed piece of work, of the kind that training does: a convolution, a product, a sum, forward and backward."""
    kernel = torch.full((32, 32, 3, 3), 0.01, device=device, requires_grad=True)
    images, tokens = torch.ones(2, 32, 96, 96, device=device), torch.ones(2048, 128, device=device)

    def work() -> None:
        ((images.mul(0.5) @ images.mT).mean() + nn.functional.conv2d(images, kernel).exp().mean()).backward()
        (tokens @ tokens.mT).softmax(-1).sum()

    return work


def probe(job: Job, todo: list[Cell], console: Console) -> tuple[dict[str, Probe], dict[str, Exception]]:
    """What each trained method costs, or why it cannot be trained here, by name."""
    probes: dict[str, Probe] = {}
    unfit: dict[str, Exception] = {}
    with console.status("measuring what each method costs"):
        for cell in {cell.method: cell for cell in todo if cell.trained}.values():
            try:
                probes[cell.method] = probe_method(job, cell)
            except Exception as error:  # noqa: BLE001 - a method may be a stranger's code, and raise anything
                unfit[cell.method] = error
    return probes, unfit
