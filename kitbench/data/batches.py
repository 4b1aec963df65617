"""Training batches: a pure function of (seed, step, index), independent of the number of workers and the first step.

Every method of a suite therefore gets the same crops, orientations and degradations in the same order, and an
interrupted run can continue at any step without a stored data position.
"""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kitbench.data.degrade import degrade, margin
from kitbench.data.photograph import Photograph
from kitbench.errors import InputError
from kitbench.seeds import generator
from kitbench.spec.suite import Recipe
from kitbench.spec.tasks import Task

AHEAD = 5
"""Batches, or pieces of them, that the thread makes at a time. Made one by one, after each training step, they take
half as long again, because the step has replaced the contents of the processor's caches."""


WORKERS_START = "fork" if sys.platform == "linux" else None
"""How worker processes are started; None: as the system's Python does. A fork shares the photographs, and torch ends
forked workers with their parent. Workers of a fork server outlive a parent that is killed: theirs is the server."""


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Item `step` is that step's batch: (degraded, clean), float32 [batch, C, crop, crop]; clean lies in [0, 1]."""

    def __init__(self, photographs: Sequence[Photograph], task: Task, recipe: Recipe, seed: int) -> None:
        for photo in photographs:
            height, width = photo.shape[:2]
            if min(height, width) < recipe.crop:
                raise InputError(
                    f"Training image {photo.name} is {width} x {height} px, smaller than the crop of {recipe.crop}; "
                    f"set a smaller recipe.crop or leave the image out."
                )
        self.photographs, self.task, self.recipe, self.seed = photographs, task, recipe, seed
        # A photograph is drawn with a probability proportional to its number of crops: every crop is equally likely.
        places = np.array([np.prod(np.subtract(p.shape[:2], recipe.crop) + 1) for p in photographs], float)
        self._cumulative = np.cumsum(places) / places.sum()
        self._cumulative[-1] = 1.0  # rounding must not leave it below 1

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.part(step, range(self.recipe.batch))

    def part(self, step: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Those of a step's samples that have these numbers."""
        shape = (len(indices), self.photographs[0].shape[2], self.recipe.crop, self.recipe.crop)
        degraded, clean = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for place, index in enumerate(indices):
            images = self.sample(step, index)
            degraded[place], clean[place] = (image.transpose(2, 0, 1) for image in images)
        return torch.from_numpy(degraded), torch.from_numpy(clean)

    def __len__(self) -> int:
        return self.recipe.steps

    def sample(self, step: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(degraded, clean) number `index` of a step: float32 [crop, crop, C]."""
        random, crop = generator(self.seed, "batch", step, index), self.recipe.crop
        photo, top, left = self._place(random)
        turns, mirror = (int(random.integers(4)), bool(random.integers(2))) if self.recipe.augment else (0, False)

        def view(pixels: np.ndarray, around: int) -> np.ndarray:
            cut = _cut(pixels, top, left, crop, around)
            # Rotated and copied while it is 8 bits: a rotated view of floats would make every later pass slow.
            turned = np.ascontiguousarray(np.rot90(cut[:, ::-1] if mirror else cut, turns))
            scaled: np.ndarray = np.divide(turned, 255, dtype=np.float32)
            return scaled

        if photo.degraded is not None:
            return view(photo.degraded, 0), view(photo.pixels, 0)
        around = margin(self.task)
        clean = view(photo.pixels, around)
        degraded = degrade(clean, self.task, random)
        inside = slice(around, around + crop)
        return degraded[inside, inside], clean[inside, inside]

    def _place(self, random: np.random.Generator) -> tuple[Photograph, int, int]:
        """The photograph that a crop is cut from, and its top and left edge in pixels."""
        photo = self.photographs[int(np.searchsorted(self._cumulative, random.random(), side="right"))]
        top, left = (int(random.integers(size - self.recipe.crop + 1)) for size in photo.shape[:2])
        return photo, top, left

    def places(self, step: int) -> list[str]:
        """The origin of each crop of a step's batch, for messages: image, column and row of its upper left corner."""
        drawn = (self._place(generator(self.seed, "batch", step, index)) for index in range(self.recipe.batch))
        return [f"{photo.name} at {left},{top}" for photo, top, left in drawn]

    def from_step(
        self, start: int, workers: int, pieces: Sequence[Sequence[int]] | None = None, pinned: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps start, start + 1, ... in order, prepared ahead by `workers` processes, or by one thread.

        pieces: indices of the samples of each piece of a batch; by default one piece, the whole batch.
        pinned: in page-locked memory, from which CUDA copies asynchronously; locked ahead of the step too.
        """
        cut = _Pieces(self, pieces or [range(self.recipe.batch)])
        wanted = range(start * len(cut.pieces), len(cut))
        if workers:
            yield from DataLoader(
                cut, batch_size=None, sampler=wanted, num_workers=workers, pin_memory=pinned,
                multiprocessing_context=WORKERS_START, worker_init_fn=_leave_signals_to_parent,
            )  # fmt: skip
            return

        def make(number: int) -> tuple[Tensor, Tensor]:
            degraded, clean = cut[number]
            return (degraded.pin_memory(), clean.pin_memory()) if pinned else (degraded, clean)

        with ThreadPoolExecutor(1, "batches") as thread:
            ahead, wanted = deque([thread.submit(make, wanted[0])]), wanted[1:]
            while ahead:
                batch = ahead.popleft().result()
                if not ahead:
                    ahead.extend(thread.submit(make, number) for number in wanted[:AHEAD])
                    wanted = wanted[AHEAD:]
                yield batch


def _leave_signals_to_parent(worker: int) -> None:
    """In a worker process: outlive Ctrl-C and SIGTERM, which reach all processes of a terminal or job, until the parent
    has saved its state and ends it. A worker that died first would make torch raise an error in the midst of saving."""
    signal.set_wakeup_fd(-1)  # the parent's, which forking has passed on
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Pieces(Dataset[tuple[Tensor, Tensor]]):
    """The pieces of all batches, one after another."""

    batches: Batches
    pieces: Sequence[Sequence[int]]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        step, which = divmod(number, len(self.pieces))
        return self.batches.part(step, self.pieces[which])

    def __len__(self) -> int:
        return len(self.batches) * len(self.pieces)


def _cut(pixels: np.ndarray, top: int, left: int, crop: int, around: int) -> np.ndarray:
    """A square crop with `around` more pixels on each side, mirrored where the image ends."""
    rows, columns = (
        slice(max(0, start - around), min(size, start + crop + around))
        for start, size in zip((top, left), pixels.shape[:2], strict=True)
    )
    cut = pixels[rows, columns]
    missing = [
        (around - (start - where.start), around - (where.stop - start - crop))
        for start, where in ((top, rows), (left, columns))
    ]
    return np.pad(cut, (*missing, (0, 0)), "reflect") if any(map(any, missing)) else cut
