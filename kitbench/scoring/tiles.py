"""Restoring an image in overlapping square tiles, where the whole image does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(model: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, even: bool = False) -> Tensor:
    """Restore float [B, C, H, W] in square tiles that overlap, blended by linear ramps whose weights sum to one.

    model: maps [B, C, h, w] to the same shape. tile, overlap: pixels, 0 <= overlap < tile. Returns float as x.
    even: tiles at equal distances (`even_starts`) instead of every tile - overlap pixels (`starts`).
    """
    place = even_starts if even else starts
    height, width = x.shape[-2:]
    result, weight = torch.zeros_like(x), x.new_zeros(1, 1, height, width)
    for top in place(height, tile, overlap):
        for left in place(width, tile, overlap):
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


def even_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: as few as overlap by at least `overlap` pixels, at distances that differ by at most one pixel.

    So no tile nearly repeats the one before it, as the last of `starts` may: 481 px in tiles of 256 px that overlap by
    32 start at 0, 224 and 225 there, and at 0, 112 and 225 here.
    """
    if size <= tile:
        return [0]
    steps = -(-(size - tile) // (tile - overlap))
    return [(size - tile) * step // steps for step in range(steps + 1)]


def _ramp(start: int, length: int, size: int, overlap: int, like: Tensor) -> Tensor:
    """Weight along one axis of a tile: 1, falling linearly over the overlap on each side inside the image."""
    distance = torch.arange(length, dtype=like.dtype, device=like.device)
    ramp = torch.ones_like(distance)
    if start > 0:
        ramp = torch.minimum(ramp, (distance + 1) / (overlap + 1))
    if start + length < size:
        ramp = torch.minimum(ramp, (length - distance) / (overlap + 1))
    return ramp
