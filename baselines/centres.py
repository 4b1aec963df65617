"""CATANet, content-aware token aggregation: positions grouped by their nearest learned centre.

Paper: "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution" (Liu et al., CVPR
    2025).
Question: does a grouping that is learned over the training images replace the search that KiT makes in each image?
Operator: each position belongs to the centre of highest cosine; the positions are sorted by centre and cut into groups;
    a position attends to its own group and the next one.  Besides, it attends to all centres, with keys and values of
    their own; the two results are added.  In training the centres are refined on the batch by a few steps of k-means
    on the sphere, and a moving average of the refined ones is kept; evaluation takes it as it is.
Cost: 4 H W C^2 + 2 m C^2 for the projections, 4 group H W C + 2 m H W C for the attention and m H W C for the grouping
    with m centres; in training another 2 iterations m H W C.  Linear in H and W.
Departures: our reading where the paper leaves it open: the keys of the centres and the grouping come from the moving
    average in training too (the paper: the refined centres), so that both modes compute the same; no gradient flows
    through the centres, which start from random directions (its code: from means of the first batch); decay is .99, for
    recipes of some hundred steps (its code: .999); the last group is filled from the first instead of mirrored, and its
    next one is the first; no convolution behind the attention, and no local attention after it (the paper: one in each
    block; here the baseline `window`).
Note: the centres move once a forward pass in training, by the images of that pass.  So a batch that is split over
    passes or processes gives other results, and not by rounding alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitbench.attention import chunks, layout

AROUND = (0, 1)  # groups attended before and behind the own one


class Attention(nn.Module):
    """Attention in groups by nearest centre: [B, H, W, C] normalised tokens -> [B, H, W, C].

    centres: their number m.  group: positions in a group.  iterations: of k-means, a forward pass in training.
    decay: of the moving average of the centres, in [0, 1).  Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shift: bool = False,
        centres: int = 32,
        group: int = 128,
        iterations: int = 3,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        for name, value in (("centres", centres), ("group", group), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), but is {decay}")
        self.dim, self.heads, self.group, self.iterations, self.decay = dim, heads, group, iterations, decay
        self.qkv = nn.Linear(dim, 3 * dim)
        self.centre_kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.centres: Tensor
        self.updates: Tensor
        self.register_buffer("centres", F.normalize(torch.randn(centres, dim), dim=-1))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        if self.training:
            self.update(tokens)
        centres = self.centres.clone() if self.training else self.centres  # the next pass changes them in place
        rows = chunks.rows_of(self.order(tokens))
        tables = layout.project(self.qkv, chunks.take(tokens, rows))
        q, k, v = (table.unflatten(-1, (self.heads, -1)) for table in tables)  # [B, N, h, d], sorted by centre
        inside = chunks.attend((q, k, v), self.group, AROUND)
        centre_k, centre_v = (
            table.unflatten(-1, (self.heads, -1)).transpose(0, 1).expand(len(x), -1, -1, -1)
            for table in self.centre_kv(centres).chunk(2, -1)
        )  # each [B, h, m, d]
        across = F.scaled_dot_product_attention(q.transpose(1, 2), centre_k, centre_v).transpose(1, 2)
        y: Tensor = self.proj(chunks.take((inside + across).flatten(-2), chunks.inverse(rows)))
        return y.view(x.shape)

    @torch.no_grad()
    def order(self, tokens: Tensor) -> Tensor:
        """The positions [B, N, C] of each image by their nearest centre, then as they lie: int64 [B, N]."""
        with torch.autocast(tokens.device.type, enabled=False):
            return nearest(tokens.to(self.centres.dtype), self.centres).argsort(dim=-1, stable=True)

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Refine the centres on tokens [B, N, C], and move the kept ones towards them; the first time, all the way.

        A centre that no position belongs to stays where it is.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            unit = F.normalize(tokens.flatten(0, 1).to(self.centres.dtype), dim=-1)
            refined = self.centres
            for _ in range(self.iterations):
                numbers = torch.arange(len(refined), device=unit.device)
                members = (nearest(unit, refined)[:, None] == numbers).to(unit.dtype)  # [B * N, m]
                means = F.normalize(members.mT @ unit, dim=-1)
                refined = torch.where(members.any(0)[:, None], means, refined)
            step = torch.where(self.updates == 0, refined.new_ones(()), 1 - self.decay)
            self.centres.lerp_(refined, step)
            self.updates += 1

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image in evaluation."""
        count, centres = height * width, len(self.centres)
        number, size, keys = chunks.plan(count, self.group, AROUND)
        projected = (4 * count + 2 * centres) * self.dim**2
        return projected + (2 * number * size * keys + 3 * count * centres) * self.dim


def nearest(tokens: Tensor, centres: Tensor) -> Tensor:
    """Number of the centre of highest cosine: tokens [..., C], centres [m, C] -> int64 [...]."""
    return (tokens @ F.normalize(centres, dim=-1).mT).argmax(-1)
