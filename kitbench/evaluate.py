"""Evaluation: a protocol in, scores out. One image at a time, the noise of each a pure function of what it is."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from kitbench import metrics
from kitbench.data.cards import Photograph
from kitbench.data.degrade import degrade
from kitbench.methods import Restore
from kitbench.seeds import generator
from kitbench.store import Score
from kitbench.suite import Protocol, Task

if TYPE_CHECKING:
    from kitbench.lpips import LPIPS

CROP = 128
"""Side in pixels of the crops that are kept as pictures."""


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
        legacy = np.random.RandomState(0)  # the point of this protocol is the legacy stream
        return (clean + legacy.normal(0, sigma / 255, clean.shape)).astype(np.float32)
    return degrade(clean, task, generator("noise", data_set, photo.name, f"{sigma:g}"), sigma)


def network(model: nn.Module, device: torch.device, protocol: Protocol, precision: str) -> Restore:
    """A trained network as a function of one image: float32 [H, W, C] to the same, whole or in the protocol's tiles."""

    def restore(image: np.ndarray, sigma: float | None) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            y = tiled(model, x, protocol.tile, protocol.overlap) if protocol.tile else model(x)
        return y[0].float().permute(1, 2, 0).cpu().numpy()

    return restore


def tiled(model: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int) -> Tensor:
    """Restore [B, C, H, W] in square tiles that overlap, blended by linear ramps whose weights sum to one."""
    height, width = x.shape[-2:]
    result, weight = torch.zeros_like(x), x.new_zeros(1, 1, height, width)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            part = x[..., top : top + tile, left : left + tile]
            h, w = part.shape[-2:]
            ramp = _ramp(top, h, height, overlap, x)[:, None] * _ramp(left, w, width, overlap, x)
            result[..., top : top + h, left : left + w] += model(part) * ramp
            weight[..., top : top + h, left : left + w] += ramp
    return result / weight


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: every tile - overlap pixels, the last one moved back to end at the border."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramp(start: int, length: int, size: int, overlap: int, like: Tensor) -> Tensor:
    """Weight along one axis of a tile: 1, falling linearly over the overlap on each side inside the image."""
    distance = torch.arange(length, dtype=like.dtype, device=like.device)
    ramp = torch.ones_like(distance)
    if start > 0:
        ramp = torch.minimum(ramp, (distance + 1) / (overlap + 1))
    if start + length < size:
        ramp = torch.minimum(ramp, (length - distance) / (overlap + 1))
    return ramp


def scores(
    restore: Restore,
    photographs: list[Photograph],
    data_set: str,
    task: Task,
    sigma: float | None,
    protocol: Protocol,
    lpips: LPIPS | None,
    keep: Callable[[Photograph, np.ndarray, np.ndarray], None] | None = None,
) -> Iterator[Score]:
    """Restore and score the images of a set, one by one; `keep` is shown each: photograph, input, restored."""
    for photo in photographs:
        image = degraded(photo, data_set, task, sigma, protocol)
        clock = time.perf_counter()
        restored = restore(image, sigma)
        seconds = time.perf_counter() - clock
        if keep is not None:
            keep(photo, image, restored)
        yield score(restored, photo, protocol, lpips, seconds)


def score(restored: np.ndarray, photo: Photograph, protocol: Protocol, lpips: LPIPS | None, seconds: float) -> Score:
    """Score one restored image, float [H, W, C] nominally in [0, 1], against the photograph."""
    unit = np.clip(restored, 0, 1)
    prediction = np.rint(unit * 255).astype(np.uint8) if protocol.rounding == "8bit" else unit.astype(np.float64) * 255
    target = photo.pixels if protocol.rounding == "8bit" else photo.pixels.astype(np.float64)
    inside = slice(protocol.border, -protocol.border or None)
    prediction, target = prediction[inside, inside], target[inside, inside]
    distance = None
    if lpips is not None:
        pair = [torch.from_numpy(i.astype(np.float32).transpose(2, 0, 1)[None] / 255) for i in (prediction, target)]
        distance = float(lpips(*(i.expand(1, 3, -1, -1) for i in pair)))
    if protocol.space == "y" and target.shape[2] == 3:
        prediction, target = metrics.luma(prediction), metrics.luma(target)
    if protocol.shift:
        prediction, target = metrics.best_shift(prediction, target, protocol.shift)
    psnr = metrics.psnr(prediction, target)
    ssim = metrics.ssim_volume if protocol.ssim == "matlab-rgb" else metrics.ssim
    return Score(
        image=photo.name,
        psnr=psnr if math.isfinite(psnr) else None,
        ssim=ssim(prediction, target),
        lpips=distance,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Place:
    """A square crop of an image: its top left corner and its side, in pixels."""

    top: int
    left: int
    side: int


def crop_place(photo: Photograph, data_set: str) -> Place:
    """Where an image is shown: of 16 places drawn from (data set, image), the one with the strongest edges."""
    height, width = photo.pixels.shape[:2]
    side = min(CROP, height, width)
    grey = photo.pixels.mean(2)
    edges = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    random = generator("crop", data_set, photo.name)
    tops, lefts = (random.integers(size - side + 1, size=16).tolist() for size in (height, width))
    places = [Place(top, left, side) for top, left in zip(tops, lefts, strict=True)]
    return max(places, key=lambda at: edges[at.top : at.top + side, at.left : at.left + side].sum())


def crop_strip(photo: Photograph, data_set: str, degraded: np.ndarray, restored: np.ndarray) -> bytes:
    """A PNG of four squares side by side: the whole image made small, then degraded, restored and clean crop, 8 bits.

    The text `place` tells where the crop lies: top, left, side, height and width of the image, in pixels.
    """
    at = crop_place(photo, data_set)
    height, width = photo.pixels.shape[:2]
    squares = [np.zeros((at.side, at.side, photo.pixels.shape[2]), np.uint8)]
    scale = at.side / max(height, width)
    small = cv2.resize(
        photo.pixels, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )
    squares[0][: small.shape[0], : small.shape[1]] = small.reshape(*small.shape[:2], -1)
    for image in (degraded, restored, photo.pixels / 255):
        crop = image[at.top : at.top + at.side, at.left : at.left + at.side]
        squares.append(np.rint(np.clip(crop, 0, 1) * 255).astype(np.uint8))
    strip = np.concatenate(squares, axis=1)
    text = PngInfo()
    text.add_text("place", json.dumps([at.top, at.left, at.side, height, width]))
    file = io.BytesIO()
    Image.fromarray(strip if strip.shape[2] == 3 else strip[..., 0]).save(file, "PNG", pnginfo=text, optimize=True)
    return file.getvalue()
