"""Training batches: a pure function of (seed, step, index), whatever the number of workers or the step one starts from.

Every method of a suite therefore sees the same crops, orientations and noise in the same order, and an interrupted run
goes on at any step without a data position to save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kitbench.data.cards import Photograph
from kitbench.errors import InputError
from kitbench.seeds import generator
from kitbench.suite import Recipe, Task


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Item `step` is that step's batch: (degraded, clean), float32 [batch, C, crop, crop]; clean lies in [0, 1]."""

    def __init__(self, photographs: Sequence[Photograph], task: Task, recipe: Recipe, seed: int) -> None:
        for photo in photographs:
            height, width = photo.pixels.shape[:2]
            if min(height, width) < recipe.crop:
                raise InputError(
                    f"Training image {photo.name} is {width} x {height} px, smaller than the crop of {recipe.crop}; "
                    f"set a smaller recipe.crop or leave the image out."
                )
        self.photographs, self.task, self.recipe, self.seed = photographs, task, recipe, seed
        # A photograph is drawn by its number of crops, so that every place in the data is equally likely.
        places = np.array([np.prod(np.subtract(p.pixels.shape[:2], recipe.crop) + 1) for p in photographs], float)
        self._cumulative = np.cumsum(places) / places.sum()
        self._cumulative[-1] = 1.0  # rounding must not leave a gap below 1

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        pairs = [self.sample(step, index) for index in range(self.recipe.batch)]
        degraded, clean = (np.stack(images).transpose(0, 3, 1, 2) for images in zip(*pairs, strict=True))
        return torch.from_numpy(np.ascontiguousarray(degraded)), torch.from_numpy(np.ascontiguousarray(clean))

    def __len__(self) -> int:
        return self.recipe.steps

    def sample(self, step: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(degraded, clean) number `index` of a step: float32 [crop, crop, C]."""
        random, crop = generator(self.seed, "batch", step, index), self.recipe.crop
        pixels = self.photographs[int(np.searchsorted(self._cumulative, random.random(), side="right"))].pixels
        top, left = (int(random.integers(size - crop + 1)) for size in pixels.shape[:2])
        clean = pixels[top : top + crop, left : left + crop]
        turns, mirror = (int(random.integers(4)), bool(random.integers(2))) if self.recipe.augment else (0, False)
        clean = np.rot90(clean[:, ::-1] if mirror else clean, turns).astype(np.float32) / 255
        return add_noise(clean, random.uniform(*self.task.sigma_train), random), clean

    def from_step(self, start: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps start, start + 1, ... in order; `workers` processes prepare them ahead."""
        return iter(DataLoader(self, batch_size=None, sampler=range(start, len(self)), num_workers=workers))


def add_noise(clean: np.ndarray, sigma: float, random: np.random.Generator) -> np.ndarray:
    """White Gaussian noise of standard deviation sigma / 255, added in float32 and not clipped."""
    noise = random.standard_normal(clean.shape, dtype=np.float32)
    return clean + noise * np.float32(sigma / 255)
