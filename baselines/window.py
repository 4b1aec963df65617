"""Window attention, with shifted windows in alternate blocks.

Papers: "Swin Transformer" (Liu et al., ICCV 2021); "SwinIR" (Liang et al., ICCVW 2021); "Uformer" (Wang et al., CVPR
    2022).
Operator: the map is cut into disjoint M x M windows; the positions of a window attend to one another, with a learned
    relative position bias.  In shifted blocks the map is first rolled by M/2, and positions that the roll brought
    together from opposite borders do not attend to one another (Swin's mask).
Cost: 4 H W C^2 for the projections and 2 M^2 H W C for the attention.  Form 'registered' is the operator of KiT with
    each window its own only neighbour, linear in memory; 'sdpa' is torch's own, which holds all logits while it trains
    the bias.
Departures: maps are padded to the next multiple of M, and padded positions are never attended (Swin attends to them).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitbench.attention import layout
from kitbench.attention.operator import patch_attention


class Attention(nn.Module):
    """Window attention: [B, H, W, C] normalised tokens -> [B, H, W, C].

    window: side M of a window.  shift: roll the windows by window // 2.  form: see the card; equal results.  Raises
    ValueError for settings out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shift: bool = False,
        window: int = 8,
        form: Literal["registered", "sdpa"] = "registered",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        if window < 1:
            raise ValueError(f"window must be at least 1, but is {window}")
        self.dim, self.heads, self.window, self.form = dim, heads, window, form
        self.roll = window // 2 if shift else 0
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = layout.PositionBias(layout.relative_index(window), (2 * window - 1) ** 2, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = layout.grid(height, width, self.window)
        # A map of one window in a direction is not rolled in it, as in Swin.
        roll = (self.roll if rows > 1 else 0, self.roll if columns > 1 else 0)
        padded = (rows * self.window, columns * self.window)
        x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        if any(roll):
            x = x.roll((-roll[0], -roll[1]), (1, 2))
        windows = layout.cut(x, self.window).flatten(0, 1)  # [B * N, T, C]
        q, k, v = (
            table.unflatten(-1, (self.heads, -1)) for table in layout.project(self.qkv, windows)
        )  # [B * N, T, h, d]
        label = None
        if any(roll) or padded != (height, width):
            label = regions(height, width, self.window, roll, x.device).repeat(batch, 1)  # [B * N, T]
        if self.form == "registered":
            out = patch_attention(q, k, v, None, self.bias(), label, label)
        else:
            bias = self.bias()[None].to(q.dtype)
            if label is not None:
                bias = bias.masked_fill((label[:, :, None] != label[:, None, :])[:, None], float("-inf"))
            q, k, v = (table.transpose(1, 2) for table in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        y = layout.join(out.reshape(batch, rows * columns, -1, channels), self.window, *padded)
        if any(roll):
            y = y.roll(roll, (1, 2))
        projected: Tensor = self.proj(y[:, :height, :width])
        return projected

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        rows, columns = layout.grid(height, width, self.window)
        padded = rows * columns * self.window**2
        return (3 * padded + height * width) * self.dim**2 + 2 * padded * self.window**2 * self.dim


def regions(height: int, width: int, window: int, roll: tuple[int, int], device: torch.device) -> Tensor:
    """Label of each position of the rolled windows, int64 [N, T]: positions attend only to those of their own label.

    Labels tell apart what the roll brought together from opposite borders, and real positions from padding.
    """
    labels = []
    for extent, step in zip((height, width), roll, strict=True):
        padded = -(-extent // window) * window
        place = (torch.arange(padded, device=device) + step) % padded  # where a rolled position comes from
        wrapped = torch.arange(padded, device=device) >= padded - step
        labels.append(wrapped.long() + 2 * (place >= extent))
    label = labels[0][:, None] * 4 + labels[1][None, :]
    label = torch.where((labels[0][:, None] >= 2) | (labels[1][None, :] >= 2), -1, label)
    return layout.cut(label[None, :, :, None], window)[0, :, :, 0]
