"""Overlapping windows: the queries of a window attend to a larger window around it.

Papers: "Activating More Pixels in Image Super-Resolution Transformer" (HAT; Chen et al., CVPR 2023), its
    overlapping cross-attention; "A Comparative Study of Image Restoration Networks for General Backbone Network Design"
    (X-Restormer; Chen et al., ECCV 2024), in every second block.
Question: is what windows lack the sight beyond their border, rather than patches far away?
Operator: the map is cut into disjoint M x M windows of queries; each attends to the keys of the window of side
    (1 + overlap) M with the same centre, with a learned relative position bias.
Cost: 4 H W C^2 for the projections and 2 (1 + overlap)^2 M^2 H W C for the attention: linear in H W.
Parameters: q, k, v and proj as the others; a bias of ((2 + overlap) M - 1)^2 entries a head, where a window has
    (2 M - 1)^2.
Departures: positions outside the image are not attended (the papers pad keys and values with zeros, which then take
    part in the softmax); every block is of this kind (HAT: the last of a group of window blocks; X-Restormer: every
    second, after one over channels); the position bias is HAT's table (X-Restormer: products of the query and learned
    vectors).  The windows overlap in every block, so that shift has no purpose and is ignored, as in the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kitbench.attention import layout
from kitbench.attention.operator import patch_attention


class Attention(nn.Module):
    """Attention over overlapping windows: [B, H, W, C] normalised tokens -> [B, H, W, C].

    window: side M of a window of queries.  overlap: (side of the window of keys) / M - 1, at least 0; the margin on
    each side, overlap * M / 2 positions, must be whole.  Raises ValueError for settings out of range.
    """

    def __init__(self, dim: int, heads: int, *, shift: bool = False, window: int = 8, overlap: float = 0.5) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        if window < 1:
            raise ValueError(f"window must be at least 1, but is {window}")
        margin = overlap * window / 2
        if margin < 0 or not margin.is_integer():
            raise ValueError(
                f"overlap * window / 2, the margin around a window, must be a whole number of positions from 0 on, but "
                f"overlap is {overlap} and window is {window}"
            )
        self.dim, self.heads, self.window, self.margin = dim, heads, window, int(margin)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = layout.PositionBias(
            overlap_index(window, self.margin), (2 * window + 2 * self.margin - 1) ** 2, heads
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        q, k, v = layout.project(self.qkv, x)
        q = layout.cut(q, self.window)
        k, v = (layout.cut_halo(table, self.window, self.margin) for table in (k, v))
        q, k, v = (table.flatten(0, 1).unflatten(-1, (self.heads, -1)) for table in (q, k, v))  # [B * N, ., h, d]
        query_label, key_label = layout.padding_labels(batch, height, width, self.window, self.margin, x.device)
        out = patch_attention(q, k, v, None, self.bias(), query_label, key_label)
        windows = out.reshape(batch, -1, self.window**2, channels)
        y: Tensor = self.proj(layout.join(windows, self.window, height, width))
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds executed in one forward pass of one image: whole windows, padding included."""
        rows, columns = layout.grid(height, width, self.window)
        keys = (self.window + 2 * self.margin) ** 2
        return 4 * height * width * self.dim**2 + 2 * rows * columns * self.window**2 * keys * self.dim


def overlap_index(window: int, margin: int) -> Tensor:
    """Row of a (2M + 2 margin - 1)^2 bias table for query p of a window and key q of the larger one: int64 [T, E * E].

    E = M + 2 margin.  The row is that of the offset q - p, row-major.
    """
    edge, span = window + 2 * margin, 2 * window + 2 * margin - 1
    offset = torch.arange(edge)[None, :] - torch.arange(window)[:, None] + window - 1  # [M, E], 0 .. span - 1
    index = offset[:, None, :, None] * span + offset[None, :, None, :]
    return index.reshape(window * window, edge * edge)
