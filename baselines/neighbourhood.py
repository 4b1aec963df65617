"""Neighbourhood attention: every position attends to s x s positions, as many at the border as inside.

Paper: "Neighborhood Attention Transformer" (Hassani et al., CVPR 2023).
Operator: as plain local attention, but a footprint that would leave the image is moved inside it, so that every query
    has s^2 keys.
Cost: 4 H W C^2 for the projections and 2 s^2 H W C for the attention.  Form 'sdpa' executes 8 x 8 query tiles over (s +
    7)^2 keys; form 'natten' calls the natten package, where it is installed.
Departures: no relative position bias, which the package no longer has; on a map smaller than s the footprint is the
    map's side.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitbench.attention import layout

TILE = 8


class Attention(nn.Module):
    """Neighbourhood attention: [B, H, W, C] normalised tokens -> [B, H, W, C].

    size: odd side s of the footprint.  Raises ValueError for settings out of range, or form 'natten' without the
    package.
    """

    def __init__(
        self, dim: int, heads: int, *, shift: bool = False, size: int = 7, form: Literal["sdpa", "natten"] = "sdpa"
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, but is {size}")
        self.dim, self.heads, self.size, self.form = dim, heads, size, form
        if form == "natten":
            try:
                import natten
            except ImportError as error:
                raise ValueError(
                    "form is 'natten', but the natten package is not installed: use form 'sdpa'"
                ) from error
            self.natten = natten.na2d
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (table.unflatten(-1, (self.heads, -1)) for table in layout.project(self.qkv, x))  # [B, H, W, h, d]
        if self.form == "natten":
            y: Tensor = self.proj(self.natten(q, k, v, kernel_size=self.size).flatten(-2))
        else:
            y = self.proj(neighbourhood(q, k, v, self.size))
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds executed in one forward pass of one image: tiles with the keys around them."""
        total = 4 * height * width * self.dim**2
        if self.form == "natten":
            return total + 2 * height * width * self.size**2 * self.dim
        rows, columns = layout.grid(height, width, TILE)
        keys = min(height, TILE + self.size - 1) * min(width, TILE + self.size - 1)
        return total + 2 * rows * columns * TILE**2 * keys * self.dim

    def needed_macs(self, height: int, width: int) -> int:
        """Multiply-adds of one image that the definition needs: size^2 keys a position, fewer on a smaller map."""
        keys = min(self.size, height) * min(self.size, width)
        return height * width * self.dim * (4 * self.dim + 2 * keys)


def neighbourhood(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Attention of each position over its footprint: [B, H, W, h, d] each -> [B, H, W, h * d]."""
    height, width, heads = q.shape[1:4]
    rows, columns = layout.grid(height, width, TILE)
    queries = layout.cut(q.flatten(-2), TILE).unflatten(1, (rows, columns))  # [B, rows, columns, T, C]
    out = torch.empty_like(queries)
    for tile_y, key_y, mask_y in tile_classes(height, size, q.device):
        for tile_x, key_x, mask_x in tile_classes(width, size, q.device):
            chosen = queries[:, tile_y[:, None], tile_x[None, :]]  # [B, r, c, T, C]
            near_k, near_v = (
                table[:, key_y[:, None, :, None], key_x[None, :, None, :]].flatten(3, 4).flatten(0, 2).transpose(1, 2)
                for table in (k, v)
            )  # each [B * r * c, h, keys, d]
            mask = (mask_y[:, None, :, None] & mask_x[None, :, None, :]).flatten(0, 1).flatten(1)  # [T, keys]
            near_q = chosen.flatten(0, 2).unflatten(-1, (heads, -1)).transpose(1, 2)
            attended = F.scaled_dot_product_attention(near_q, near_k, near_v, attn_mask=mask)
            out[:, tile_y[:, None], tile_x[None, :]] = attended.transpose(1, 2).reshape(chosen.shape)
    return layout.join(out.flatten(1, 2), TILE, height, width)


def tile_classes(extent: int, size: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tiles of one axis by the mask they share: (tile numbers [n], their key positions [n, E], mask [TILE, E])."""
    size = min(size, extent)
    edge = min(extent, TILE + size - 1)
    start = torch.arange(0, extent, TILE)
    first_key = (start - size // 2).clamp(0, extent - edge)
    keys = first_key[:, None] + torch.arange(edge)  # [tiles, E]
    query = (start[:, None] + torch.arange(TILE)).clamp(max=extent - 1)  # padding repeats the last query
    footprint = (query - size // 2).clamp(0, extent - size)[:, :, None]
    masks = (keys[:, None] >= footprint) & (keys[:, None] < footprint + size)  # [tiles, TILE, E]
    classes: dict[bytes, list[int]] = {}
    for tile, mask in enumerate(masks):
        classes.setdefault(mask.numpy().tobytes(), []).append(tile)
    return [
        (torch.tensor(tiles, device=device), keys[tiles].to(device), masks[tiles[0]].to(device))
        for tiles in classes.values()
    ]
