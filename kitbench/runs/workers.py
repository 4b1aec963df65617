"""How many cells are worked on at a time, and on which devices."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

import psutil
import torch

from kitbench.cost.memory import free_bytes
from kitbench.errors import InputError
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import PreparedSuite
from kitbench.runs.probe import Probe

IMAGES_OF_A_WORKER = 16
"""Images to be scored that are worth a worker of their own."""


def worker_devices(prepared: PreparedSuite, cells: Sequence[Cell], probes: Mapping[str, Probe]) -> list[str]:
    """The device of each worker; one worker means that this process does the work itself.

    On the CPU as many as there are cores for the recipe's threads, and as memory holds: each takes as much as this
    process holds now, and the peak of a training step. On CUDA one worker a GPU. Never more than there is to do.
    Raises InputError for GPUs that are not there.
    """
    options, device = prepared.options, prepared.device
    if device.type != "cuda" and options.gpus:
        raise InputError(f"--gpus {options.gpus} was asked for, but the device is the CPU; leave it out.")
    if prepared.world.size > 1:
        return [str(device)]
    most = max(1, work_for(prepared, cells))
    if device.type != "cuda":
        threads = prepared.suite.recipe.threads or torch.get_num_threads()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        fitting = max(1, cores // threads)
        peaks = [probe.cost.train_peak_bytes or 0 for probe in probes.values()]
        each = psutil.Process().memory_info().rss + max(peaks, default=0)
        fitting = max(1, min(fitting, free_bytes(device) // each))
        return ["cpu"] * min(options.jobs or fitting, most)
    every = options.device in ("auto", "cuda")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    chosen = choose_gpus(options.gpus, names, None if every else device.index)
    return [f"cuda:{chosen[number % len(chosen)]}" for number in range(min(options.jobs or len(chosen), most))]


def work_for(prepared: PreparedSuite, cells: Sequence[Cell]) -> int:
    """How many workers have something to do at a time."""
    training = sum(cell.trained and not prepared.folder(cell).trained for cell in cells)
    images = sum(len(prepared.sets[cell.mode].test[name]) for cell in cells for name, _ in prepared.missing_units(cell))
    return max(training, images // IMAGES_OF_A_WORKER)


def choose_gpus(wanted: str | None, names: Sequence[str], only: int | None) -> list[int]:
    """Numbers of the GPUs to use: those wanted, else `only`, else all of the first one's model.

    names: of this machine's GPUs, in order. Runs of two models do not compare. Raises InputError.
    """
    if wanted is None:
        return [only] if only is not None else [number for number, name in enumerate(names) if name == names[0]]
    if not re.fullmatch(r"\d+(,\d+)*", wanted):
        raise InputError(f"--gpus takes the numbers of GPUs like 0,1 without a launcher; found {wanted!r}.")
    chosen = list(dict.fromkeys(int(part) for part in wanted.split(",")))
    absent = [number for number in chosen if number >= len(names)]
    if absent:
        raise InputError(f"--gpus names GPU {absent[0]}, but this machine has {len(names)}, numbered from 0.")
    models = {names[number] for number in chosen}
    if len(models) > 1:
        raise InputError(f"--gpus names {' and '.join(sorted(models))}, whose runs do not compare; give those of one.")
    return chosen
