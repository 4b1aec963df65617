"""Restoring an image in overlapping square tiles, where the whole image does not fit in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
