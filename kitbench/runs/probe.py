"""What each trained method costs here, measured before training: parameters, multiply-adds, memory, time of a step.

Times are measured method by turn, with no other run of this command under way. On the CPU they are times of the
processor, which other processes hardly disturb; on CUDA, from call to result.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from kitbench.cost.agreement import state_macs
from kitbench.cost.memory import peak_bytes
from kitbench.cost.timing import Sample, compare_times
from kitbench.errors import METHOD_ERRORS
from kitbench.runs.cell import Cell
from kitbench.runs.limits import require_memory, tile_shape
from kitbench.runs.prepare import PreparedSuite
from kitbench.runs.train import loss_of
from kitbench.spec.fields import CHANNELS
from kitbench.store.records import Cost

RESOLUTION = 256
"""Side in pixels of the image that GMACs are stated for."""
ROUNDS = 5
LARGEST = 256
"""Pixels of the longest side of the image whose restoration is timed; larger ones are counted on from there."""
SECONDS = 60.0
"""Longest time that the rounds take together, beyond the first."""


@dataclass(frozen=True)
class Probe:
    """What one method costs here."""

    cost: Cost
    step_seconds: float
    pixel_seconds: float
    """Of restoring an image, a pixel, in the tiles that the protocol cuts it into."""


@dataclass(frozen=True)
class _Subject:
    """A method that is being measured."""

    cost: Cost
    step: Callable[[], None]
    restore: Callable[[], None]
    pixels: float
    """Of a test image, that are restored in the time of one call of `restore`."""


def probe(
    prepared: PreparedSuite, cells: Sequence[Cell], console: Console
) -> tuple[dict[str, Probe], dict[str, BaseException]]:
    """What each trained method among the cells costs, or why it cannot be trained here, by name."""
    subjects: dict[str, _Subject] = {}
    unfit: dict[str, BaseException] = {}
    with console.status("measuring what each method costs") as status:
        for cell in {cell.method: cell for cell in cells if cell.trained}.values():
            status.update(f"measuring what {cell.method} costs")
            try:
                subjects[cell.method] = _subject(prepared, cell)
            except METHOD_ERRORS as error:
                unfit[cell.method] = error
        status.update("measuring how long a step of each method takes")
        return _timed(prepared, subjects), unfit


def _subject(prepared: PreparedSuite, cell: Cell) -> _Subject:
    """A method's network, its costs but for time, and a training step and a restoration of it, called once each."""
    recipe, channels, device = prepared.suite.recipe, CHANNELS[cell.mode], prepared.device
    model = prepared.build(cell)
    require_memory(prepared, model, cell)
    macs = state_macs(model.eval(), channels, RESOLUTION, model.macs(RESOLUTION, RESOLUTION))
    model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    x = torch.rand(len(prepared.pieces[0]), channels, recipe.crop, recipe.crop, device=device)
    shape = tile_shape(prepared, cell.mode)
    small = tuple(min(side, LARGEST) for side in shape)
    grown = [model.macs(*shape), model.macs(*small)]
    image = torch.rand(1, channels, *small, device=device)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            y = model(x)
        loss_of(y.float() - x, recipe).backward()
        optimiser.step()

    def restore() -> None:
        model.eval()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            model(image)
        model.train()

    step()
    restore()
    cost = Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        attention_parameters=sum(p.numel() for _, a in model.attentions() for p in a.parameters()),
        resolution=RESOLUTION,
        macs=macs.closed,
        macs_counted=macs.counted,
        macs_needed=model.needed_macs(RESOLUTION, RESOLUTION),
        macs_note=macs.note,
        train_peak_bytes=peak_bytes(step, device),
        memory_note=None,
    )
    # As many pixels as would be restored in the time of this image, if multiply-adds grow as the closed form says.
    pixels = math.prod(shape) * (grown[1] / grown[0] if grown[0] and grown[1] else math.prod(small) / math.prod(shape))
    return _Subject(cost, step, restore, pixels)


def _timed(prepared: PreparedSuite, subjects: dict[str, _Subject]) -> dict[str, Probe]:
    device, pieces = prepared.device, len(prepared.pieces)
    steps = {name: _sampler(subject.step, device) for name, subject in subjects.items()}
    timings = compare_times(steps, ROUNDS, SECONDS) if steps else {}
    calibrated = statistics.median(_sampler(calibration(device), device)().seconds for _ in range(5))
    probes = {}
    for name, subject in subjects.items():
        seconds = timings[name].median * pieces
        cost = subject.cost.model_copy(update={"calibration_seconds": calibrated, "step_seconds": seconds})
        probes[name] = Probe(cost, seconds, _sampler(subject.restore, device)().seconds / subject.pixels)
    return probes


def _sampler(fn: Callable[[], None], device: torch.device) -> Callable[[], Sample]:
    """A function that takes the seconds of one call."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def sample() -> Sample:
        start = clock()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return Sample(clock() - start)

    return sample


def calibration(device: torch.device) -> Callable[[], None]:
    """A fixed piece of work, of the kind that training does: a convolution, a product, a sum, forward and backward."""
    kernel = torch.full((32, 32, 3, 3), 0.01, device=device, requires_grad=True)
    images, tokens = torch.ones(2, 32, 96, 96, device=device), torch.ones(2048, 128, device=device)

    def work() -> None:
        ((images.mul(0.5) @ images.mT).mean() + nn.functional.conv2d(images, kernel).exp().mean()).backward()
        (tokens @ tokens.mT).softmax(-1).sum()

    return work
