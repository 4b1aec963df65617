"""Cutting channels-last maps into square patches and putting them back; padding; relative positions.

A map is [B, H, W, C].  Patches are [B, N, T, C]: N = ceil(H/P) * ceil(W/P) patches in row-major order, T = P * P
positions in row-major order.  Maps are padded with zeros at the bottom and at the right to the next multiple of P only;
`real_positions` says which positions are not padding, and whoever attends must mask the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Number of patch rows and patch columns that cover a map of height x width."""
    return -(-height // patch), -(-width // patch)


def cut(x: Tensor, patch: int) -> Tensor:
    """Cut [B, H, W, C] into patches [B, N, T, C], zero-padded to the next multiple of `patch`."""
    batch, height, width, channels = x.shape
    rows, columns = grid(height, width, patch)
    if (rows * patch, columns * patch) != (height, width):
        x = F.pad(x, (0, 0, 0, columns * patch - width, 0, rows * patch - height))
    x = x.reshape(batch, rows, patch, columns, patch, channels).transpose(2, 3)
    return x.reshape(batch, rows * columns, patch * patch, channels)


def join(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Put patches [B, N, T, C] back into a map [B, height, width, C]; padding is cropped.  The inverse of `cut`."""
    batch, _, _, channels = patches.shape
    rows, columns = grid(height, width, patch)
    x = patches.reshape(batch, rows, columns, patch, patch, channels).transpose(2, 3)
    return x.reshape(batch, rows * patch, columns * patch, channels)[:, :height, :width]


def cut_halo(x: Tensor, patch: int, margin: int) -> Tensor:
    """Cut [B, H, W, C] into squares [B, N, E * E, C] of side E = P + 2 * margin, the patches of `cut` with a halo.

    Positions outside the map are zeros.
    """
    batch, height, width, channels = x.shape
    rows, columns = grid(height, width, patch)
    edge = patch + 2 * margin
    x = F.pad(x, (0, 0, margin, columns * patch - width + margin, margin, rows * patch - height + margin))
    squares = x.unfold(1, edge, patch).unfold(2, edge, patch)  # [B, rows, columns, C, E, E], a view
    return squares.permute(0, 1, 2, 4, 5, 3).reshape(batch, rows * columns, edge * edge, channels)


def real_positions(height: int, width: int, patch: int, margin: int, device: torch.device) -> Tensor | None:
    """Which positions of `cut` (margin 0) or `cut_halo` lie inside the map: bool [N, E * E], or None where all do."""
    rows, columns = grid(height, width, patch)
    if margin == 0 and (rows * patch, columns * patch) == (height, width):
        return None
    edge = patch + 2 * margin
    span = torch.arange(edge, device=device) - margin
    y = torch.arange(rows, device=device)[:, None] * patch + span  # [rows, E]
    x = torch.arange(columns, device=device)[:, None] * patch + span
    inside_y, inside_x = (y >= 0) & (y < height), (x >= 0) & (x < width)
    inside = inside_y[:, None, :, None] & inside_x[None, :, None, :]
    return inside.reshape(rows * columns, edge * edge)


def padding_labels(
    batch: int, height: int, width: int, patch: int, margin: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Labels for patch_attention that keep padding unattended: bool [B * N, T] and [B * N, E * E], or None, None.

    Positions are labelled by whether they are real.  A query that is padding attends to padding, and its result is
    cropped.
    """
    keys = real_positions(height, width, patch, margin, device)
    if keys is None:
        return None, None
    queries = real_positions(height, width, patch, 0, device)
    if queries is None:
        queries = torch.ones(len(keys), patch**2, dtype=torch.bool, device=device)
    return queries.repeat(batch, 1), keys.repeat(batch, 1)


def relative_index(patch: int) -> Tensor:
    """Row of a (2P-1)^2 bias table for query p and key q of a patch: int64 [T, T], that of the offset p - q."""
    side = torch.arange(patch)
    offset = side[:, None] - side[None, :] + patch - 1  # [P, P], 0 .. 2P-2
    index = offset[:, None, :, None] * (2 * patch - 1) + offset[None, :, None, :]
    return index.reshape(patch * patch, patch * patch)


def footprint_index(patch: int, size: int) -> Tensor:
    """Row of a size^2 bias table for query p and halo position q: int64 [T, E * E], -1 outside p's footprint.

    E = P + size - 1 (margin size // 2).  The row is that of the offset q - p, row-major over the footprint.
    """
    edge = patch + size - 1
    offset = torch.arange(edge)[None, :] - torch.arange(patch)[:, None]  # [P, E], inside where 0 <= offset < size
    inside = (offset >= 0) & (offset < size)
    index = offset[:, None, :, None] * size + offset[None, :, None, :]
    index = index.masked_fill(~(inside[:, None, :, None] & inside[None, :, None, :]), -1)
    return index.reshape(patch * patch, edge * edge)


def project(qkv: torch.nn.Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three thirds of a linear map [..., C] -> [..., 3C], each contiguous: neighbours are read by whole rows."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once: autocast would cast it for each third
    weights, biases = qkv.weight.chunk(3), qkv.bias.chunk(3)
    q, k, v = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return q, k, v


class PositionBias(torch.nn.Module):
    """Learned relative position bias: `forward()` gives [heads, T, S], -inf where a query does not attend to a key.

    index: int64 [T, S], rows of the table; -1 marks pairs that are never attended.  The table starts from N(0, 0.02).
    """

    def __init__(self, index: Tensor, entries: int, heads: int) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.nn.init.trunc_normal_(torch.empty(entries, heads), std=0.02))
        self.index: Tensor
        self.outside: Tensor | None
        self.register_buffer("index", index.clamp(min=0), persistent=False)
        self.register_buffer("outside", index < 0 if (index < 0).any() else None, persistent=False)

    def forward(self) -> Tensor:
        # An embedding: its backward pass adds in a fixed order, which that of plain indexing does not on many threads.
        bias = F.embedding(self.index, self.table).permute(2, 0, 1)
        return bias if self.outside is None else bias.masked_fill(self.outside, float("-inf"))
