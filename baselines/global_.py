"""Global (non-local) attention: every position attends to every position.

Papers: "Non-local Neural Networks" (Wang et al., CVPR 2018); "An Image Is Worth 16x16 Words" (Dosovitskiy et al., ICLR
    2021); "Pre-Trained Image Processing Transformer" (Chen et al., CVPR 2021).
Operator: multi-head scaled dot-product attention over all H W positions of the image.
Cost: 4 H W C^2 for the projections and 2 (H W)^2 C for the attention.  Memory: with form 'sdpa' a fused kernel keeps it
    linear in H W; 'materialised' is the form of the papers and holds all (H W)^2 logits of every head.
Departures: no position bias, as in non-local networks (a learned one would tie the parameters to one resolution).
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Global attention: [B, H, W, C] tokens -> [B, H, W, C].  Raises ValueError where heads does not divide dim."""

    def __init__(
        self, dim: int, heads: int, *, shift: bool = False, form: Literal["sdpa", "materialised"] = "sdpa"
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        self.dim, self.heads, self.form = dim, heads, form
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        tokens = self.qkv(x.reshape(batch, height * width, channels))
        q, k, v = tokens.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, h, HW, d]
        if self.form == "materialised":
            out = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.proj(out.transpose(1, 2).reshape(batch, height, width, channels))
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        positions = height * width
        return 4 * positions * self.dim**2 + 2 * positions**2 * self.dim
