"""`kitbench restore`: apply a trained run to the user's pictures, of any size, depth and number of channels.

Reads PNG, JPEG, TIFF, WebP and BMP of 8 or 16 bits, gray or colour, with or without alpha (kept as it is, like a colour
profile). A run that was trained on colour restores a gray picture as three equal channels and averages them; one that
was trained on gray restores each channel of a colour picture separately. The result is written in the input's format
and depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kitbench.apply.picture import Picture
from kitbench.errors import RunError
from kitbench.model.backbone import UNet
from kitbench.scoring.tiles import starts, tiled

WHOLE = 1024 * 1024
"""Pixels up to which a picture is restored whole, unless a tile size is given."""
TILE, OVERLAP = 512, 64
"""Side and overlap in pixels of the tiles of larger pictures, which are blended by linear ramps."""
GAP = 8
"""Pixels between two pictures side by side."""


def restore_picture(
    model: UNet, picture: Picture, device: torch.device, tile: int | None, tick: Callable[[], None] = lambda: None
) -> Picture:
    """Restore a picture; its alpha channel is kept. tile: side in pixels, 0: no tiles, None: chosen by size.

    tick: called after each of the `calls` of the network. Raises RunError where a value is not finite.
    """
    full = np.float32(np.iinfo(picture.pixels.dtype).max)
    x = torch.from_numpy(picture.pixels.astype(np.float32) / full).permute(2, 0, 1)  # [1 or 3, H, W]
    channels = model.head.in_channels
    # A batch of pictures with as many channels as the network has.
    batch = x.expand(channels, -1, -1)[None] if x.shape[0] == 1 else x[None] if channels == 3 else x[:, None]
    side = _side(x[0].numel(), tile)

    def restored(part: Tensor) -> Tensor:
        result: Tensor = model(part)
        tick()
        return result

    with torch.inference_mode():
        parts = [
            tiled(restored, one.to(device), side, _overlap(side)) if side else restored(one.to(device))
            for one in batch.split(1)
        ]
    y = torch.cat(parts).float().cpu()
    require_finite(y)
    y = y.mean(1) if x.shape[0] == 1 else y.flatten(0, 1)  # [1 or 3, H, W]
    pixels = np.rint(y.permute(1, 2, 0).clamp(0, 1).numpy() * full).astype(picture.pixels.dtype)
    return replace(picture, pixels=pixels)


def require_finite(y: Tensor) -> None:
    """Raises RunError for values that no pixel can have."""
    if bad := int((~torch.isfinite(y)).sum()):
        raise RunError(f"the network returned {bad} of {y.numel()} values that are NaN or infinite")


def _side(pixels: int, tile: int | None) -> int:
    return tile if tile is not None else 0 if pixels <= WHOLE else TILE


def _overlap(side: int) -> int:
    return min(OVERLAP, side // 4)


def calls(model: UNet, shape: tuple[int, int, int], tile: int | None) -> int:
    """How often `restore_picture` calls the network for [H, W, C]: once for each tile of each picture of its batch."""
    height, width, channels = shape
    side = _side(height * width, tile)
    split = channels if model.head.in_channels == 1 and channels >= 3 else 1
    tiles = math.prod(len(starts(size, side, _overlap(side))) for size in (height, width)) if side else 1
    return min(split, 3) * tiles


def side_by_side(left: Picture, right: Picture) -> Picture:
    """Two pictures of one size, depth and number of channels beside each other, a white gap of GAP pixels between."""

    def joined(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        gap = np.full((a.shape[0], GAP, a.shape[2]), np.iinfo(a.dtype).max, a.dtype)
        return np.concatenate([a, gap, b], axis=1)

    both = left.alpha is not None and right.alpha is not None
    return Picture(
        joined(left.pixels, right.pixels),
        joined(left.alpha, right.alpha) if both else None,  # type: ignore[arg-type]
        right.profile,
    )
