"""Transposed attention: channels attend to channels, over all positions of the image.

Paper: "Restormer: Efficient Transformer for High-Resolution Image Restoration" (Zamir et al., CVPR 2022), section 3.1,
    multi-Dconv head transposed attention; also one of the two attentions of "A Comparative Study of Image Restoration
    Networks for General Backbone Network Design" (X-Restormer; Chen et al., ECCV 2024).
Question: does restoration need to compare positions, or is it enough to mix channels by their correlation over the
    whole image?
Operator: q, k and v are projected and filtered by a depth-wise 3 x 3 convolution.  In each head every channel of q and
    of k is one vector over all H W positions, of unit length; softmax(t q k^T), with a learned temperature t a head, is
    a C/h x C/h matrix that multiplies the channels of v at every position.
Cost: 4 H W C^2 for the projections, 27 H W C for the convolution, and 2 H W C^2 / h for the attention: linear in H W.
Parameters: beside q, k, v and proj, 30 C of the convolution and h temperatures, which start from 1.
Departures: the projections and the convolution have biases, as the other methods' projections do (Restormer has none).
    shift has no meaning here and is ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention over channels: [B, H, W, C] normalised tokens -> [B, H, W, C].

    depthwise: filter q, k and v by a depth-wise 3 x 3 convolution with zero padding, as the paper does.  Raises
    ValueError where heads does not divide dim.
    """

    def __init__(self, dim: int, heads: int, *, shift: bool = False, depthwise: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        self.dim, self.heads = dim, heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.mix = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim) if depthwise else None
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tables = self.qkv(x).permute(0, 3, 1, 2)  # [B, 3C, H, W]
        if self.mix is not None:
            tables = self.mix(tables)
        q, k, v = tables.flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # each [B, h, d, HW]
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.temperature  # [B, h, d, d]
        out = logits.softmax(-1) @ v
        y: Tensor = self.proj(out.flatten(1, 2).unflatten(-1, x.shape[1:3]).permute(0, 2, 3, 1))
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image; lengths and temperatures are scalings."""
        convolution = 27 * self.dim if self.mix is not None else 0
        attention = 2 * self.dim * (self.dim // self.heads)
        return height * width * (4 * self.dim**2 + convolution + attention)
