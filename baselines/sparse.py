"""Dense and sparse attention in turn: windows in one block, positions of a regular stride in the next.

Paper: "Accurate Image Restoration with Attention Retractable Transformer" (ART; Zhang et al., ICLR 2023).
Question: does it suffice to reach far on a fixed grid, without looking where the similar patches are?
Operator: in every first block, window attention without shift (baselines/window.py).  In every second block a position
    attends to those whose row and column differ from its own by multiples of I: the map falls into I x I groups of
    about H W / I^2 positions, each spread over the whole image.
Cost: 4 H W C^2 for the projections; 2 M^2 H W C for the attention of a dense block, and 2 (H W)^2 C / I^2 for that of a
    sparse one, which is quadratic in H W at a fixed I, as in the paper.  Memory is linear.  `kitbench scale` measures a
    first block, in its scopes attention and block: compare first=dense and first=sparse.
Parameters: q, k, v and proj as the others; a position bias in dense blocks only.
Departures: no position bias in sparse blocks (the paper computes one by a small network, (H W / I^2)^2 numbers a head,
    and one for its windows too, which here have the table of the other window methods).  One interval serves all
    levels, where the paper's U-shaped network halves it at each level, so that groups have the same size.  Groups of
    unequal size are attended as they are (the paper pads them, and masks the padding).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch.nn.functional as F
from kitbench.baselines import window as dense
from torch import Tensor, nn

from kitbench.attention import layout


class Attention(nn.Module):
    """Dense or sparse attention, by turns: [B, H, W, C] normalised tokens -> [B, H, W, C].

    window: side M of a window of a dense block.  interval: stride I of the groups of a sparse block, in positions.
    first: the kind of a level's first block; shift, true in every second block, takes the other kind.  Raises
    ValueError for settings out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shift: bool = False,
        window: int = 8,
        interval: int = 4,
        first: Literal["dense", "sparse"] = "dense",
    ) -> None:
        super().__init__()
        if interval < 1:
            raise ValueError(f"interval must be at least 1, but is {interval}")
        strided = shift != (first == "sparse")
        self.attend = Strided(dim, heads, interval) if strided else dense.Attention(dim, heads, window=window)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attend(x)
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        total: int = self.attend.macs(height, width)
        return total


class Strided(nn.Module):
    """Attention within groups of positions of one stride: [B, H, W, C] normalised tokens -> [B, H, W, C].

    Raises ValueError where heads does not divide dim.
    """

    def __init__(self, dim: int, heads: int, interval: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        self.dim, self.heads, self.interval = dim, heads, interval
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        q, k, v = (self.split(table) for table in layout.project(self.qkv, x))  # each [B, G, I, G', I, C]
        out = q.new_zeros(q.shape)
        for row, row_size in classes(height, self.interval):
            for column, column_size in classes(width, self.interval):
                part = (slice(None), slice(row_size), row, slice(column_size), column)
                out[part] = self.attend(q[part], k[part], v[part])
        y: Tensor = self.proj(out.flatten(3, 4).flatten(1, 2)[:, :height, :width])
        return y

    def split(self, table: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, G, I, G', I, C], zero-padded: position (g I + a, g' I + b) lies at [g, a, g', b]."""
        bottom, right = -table.shape[1] % self.interval, -table.shape[2] % self.interval
        padded = F.pad(table, (0, 0, 0, right, 0, bottom))
        groups: Tensor = padded.unflatten(2, (-1, self.interval)).unflatten(1, (-1, self.interval))
        return groups

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of groups of equal size, over axes 1 and 3 of [B, g, a, g', b, C] each; the same shape."""
        batch, rows, high, columns, wide, _ = q.shape
        q, k, v = (
            table.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for table in (q, k, v)
        )  # each [B * a * b, h, g * g', d]
        out: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return out.reshape(batch, high, wide, rows, columns, -1).permute(0, 3, 1, 4, 2, 5)

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        pairs = 1  # of a query and a key: the squares of the sizes of all groups
        for extent in (height, width):
            pairs *= sum((group.stop - group.start) * size**2 for group, size in classes(extent, self.interval))
        return 4 * height * width * self.dim**2 + 2 * pairs * self.dim


def classes(extent: int, interval: int) -> Iterator[tuple[slice, int]]:
    """Groups 0 .. interval - 1 of one axis by their number of positions: (slice of groups, positions in each)."""
    least, more = extent // interval, extent % interval  # not divmod, which tracing does not know
    if more:
        yield slice(0, more), least + 1
    if least:
        yield slice(more, interval), least
