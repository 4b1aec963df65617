"""Validation crops: a fixed sample of images that are neither trained on nor reported, for learning curves.

The middle of each of the first images of the validation sets, degraded once; the same for every method, seed and step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from kitbench.data.photograph import Photograph
from kitbench.scoring.evaluate import degraded
from kitbench.spec.suite import Protocol
from kitbench.spec.tasks import Task

IMAGES = 8
SIDE = 128
"""Pixels of a crop's side, at most."""


def validation_crops(
    sets: Mapping[str, Sequence[Photograph]], task: Task, protocol: Protocol
) -> list[tuple[Tensor, Tensor]]:
    """(degraded, clean) crops, float32 [1, C, side, side], of the first IMAGES images taken from the sets in turn.

    Gaussian noise has the task's middle test level.
    """
    sigma = task.conditions[len(task.conditions) // 2]
    crops = []
    for name, photo in _taken(sets):
        pair = (degraded(photo, name, task, sigma, protocol), photo.pixels.astype(np.float32) / 255)
        (height, width), side = photo.shape[:2], _side(photo)
        top, left = (height - side) // 2, (width - side) // 2
        crops.append(tuple(_tensor(image[top : top + side, left : left + side]) for image in pair))
    return crops  # type: ignore[return-value]


def validation_pixels(sets: Mapping[str, Sequence[Photograph]]) -> int:
    """How many pixels all validation crops have."""
    return sum(_side(photo) ** 2 for _, photo in _taken(sets))


def _taken(sets: Mapping[str, Sequence[Photograph]]) -> list[tuple[str, Photograph]]:
    """The first IMAGES images taken from the sets in turn, with the names of their sets."""
    deepest = max((len(photos) for photos in sets.values()), default=0)
    turns = [(name, photos[place]) for place in range(deepest) for name, photos in sets.items() if place < len(photos)]
    return turns[:IMAGES]


def _side(photo: Photograph) -> int:
    return min(SIDE, *photo.shape[:2])


def _tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))[None]


def validator(
    crops: Sequence[tuple[Tensor, Tensor]], device: torch.device, precision: str
) -> Callable[[nn.Module], float]:
    """A function that scores a network in evaluation mode: the mean over the crops of PSNR in dB.

    Restored crops are clipped to [0, 1] and not rounded.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    placed = [(a.to(device, dtype), b.to(device, dtype)) for a, b in crops]

    def validate(model: nn.Module) -> float:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            errors = [(model(noisy).to(dtype).clamp(0, 1) - clean).square().mean() for noisy, clean in placed]
        return float((-10 * torch.stack(errors).double().clamp(min=1e-12).log10()).mean())

    return validate
