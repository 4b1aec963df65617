"""Evaluation of a method by a protocol, image by image; the noise of an image is a pure function of its name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kitbench.data.degrade import degrade
from kitbench.data.photograph import Photograph
from kitbench.errors import RunError
from kitbench.model.methods import Restore
from kitbench.scoring import metrics
from kitbench.scoring.lpips import LPIPS
from kitbench.scoring.tiles import tiled
from kitbench.seeds import generator
from kitbench.spec.suite import Protocol
from kitbench.spec.tasks import Task
from kitbench.store.records import Score


def degraded(photo: Photograph, data_set: str, task: Task, sigma: float | None, protocol: Protocol) -> np.ndarray:
    """The input of a test image, float32 [H, W, C]: the pair's own, or made by the task from the clean image.

    `hash`: seeded by (data set, image, sigma). `numpy0`: as in KAIR's test scripts, np.random.seed(0) before every
    image and Gaussian noise in float64 over [H, W, C].
    """
    if photo.degraded is not None:
        return photo.degraded.astype(np.float32) / 255
    clean = photo.pixels.astype(np.float32) / 255
    if sigma is None:
        return degrade(clean, task, generator(task.kind, data_set, photo.name))
    if protocol.noise_seed == "numpy0":
        legacy = np.random.RandomState(0)  # published code uses NumPy's legacy generator
        return (clean + legacy.normal(0, sigma / 255, clean.shape)).astype(np.float32)
    return degrade(clean, task, generator("noise", data_set, photo.name, f"{sigma:g}"), sigma)


def network(model: nn.Module, device: torch.device, protocol: Protocol, precision: str) -> Restore:
    """A trained network as a function of one image: float32 [H, W, C] to the same, whole or in the protocol's tiles."""

    def restore(image: np.ndarray, sigma: float | None) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            even = protocol.placement == "even"
            y = tiled(model, x, protocol.tile, protocol.overlap, even) if protocol.tile else model(x)
        return y[0].float().permute(1, 2, 0).cpu().numpy()

    return restore


@dataclass(frozen=True)
class Conditions:
    """Under which a set is scored."""

    data_set: str
    task: Task
    sigma: float | None
    protocol: Protocol
    lpips: LPIPS | None


def scores(
    restore: Restore,
    photographs: Iterable[Photograph],
    conditions: Conditions,
    keep: Callable[[Photograph, np.ndarray, np.ndarray], None] | None = None,
) -> Iterator[Score]:
    """Restore and score images of a set, one by one; `keep` is shown each: photograph, input, restored.

    Raises RunError, naming the image, for a restored image that is not finite or has another shape than its target.
    """
    for photo in photographs:
        image = degraded(photo, conditions.data_set, conditions.task, conditions.sigma, conditions.protocol)
        clock = time.perf_counter()
        restored = restore(image, conditions.sigma)
        seconds = time.perf_counter() - clock
        require_valid(restored, photo, conditions.data_set)
        if keep is not None:
            keep(photo, image, restored)
        yield score(restored, photo, conditions.protocol, conditions.lpips, seconds)


def require_valid(restored: np.ndarray, photo: Photograph, data_set: str) -> None:
    """Raises RunError where a restored image cannot be scored."""
    if restored.shape != photo.shape:
        raise RunError(
            f"the method returned shape {list(restored.shape)} for image {photo.name} of {data_set}, "
            f"which has shape {list(photo.shape)}; it must keep the size"
        )
    bad = np.count_nonzero(~np.isfinite(restored))
    if bad:
        raise RunError(
            f"the method returned {bad} of {restored.size} values that are NaN or infinite for image {photo.name} of "
            f"{data_set}; it cannot be scored"
        )


def score(restored: np.ndarray, photo: Photograph, protocol: Protocol, lpips: LPIPS | None, seconds: float) -> Score:
    """Score one restored image, float [H, W, C] nominally in [0, 1], against the photograph."""
    unit = np.clip(restored, 0, 1)
    if protocol.rounding == "none":
        prediction, target = unit.astype(np.float64) * 255, photo.pixels.astype(np.float64)
    else:
        to_level = np.rint if protocol.rounding == "8bit" else np.floor
        prediction, target = to_level(unit * 255).astype(np.uint8), photo.pixels
    inside = slice(protocol.border, -protocol.border or None)
    prediction, target = prediction[inside, inside], target[inside, inside]
    distance = None
    if lpips is not None:
        pair = [torch.from_numpy(i.astype(np.float32).transpose(2, 0, 1)[None] / 255) for i in (prediction, target)]
        distance = float(lpips(*(i.expand(1, 3, -1, -1) for i in pair)))
    if protocol.space != "native" and target.shape[2] == 3:
        if protocol.space == "y-unrounded":
            prediction, target = prediction.astype(np.float64), target.astype(np.float64)
        prediction, target = metrics.luma(prediction), metrics.luma(target)
    if protocol.shift:
        prediction, target = metrics.best_shift(prediction, target, protocol.shift)
    psnr = metrics.psnr(prediction, target)
    ssim = metrics.ssim_volume if protocol.ssim == "matlab-rgb" else metrics.ssim
    return Score(
        image=photo.name,
        psnr=psnr if math.isfinite(psnr) else None,
        ssim=ssim(prediction, target, threads=torch.get_num_threads()),
        lpips=distance,
        seconds=seconds,
    )
