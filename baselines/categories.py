"""ATD, adaptive token dictionary: positions attend to a learned dictionary, then those of their own category.

Paper: "Transcending the Limit of Local Window: Advanced Super-Resolution Transformer with Adaptive Token Dictionary"
    (Zhang et al., CVPR 2024).
Question: does a dictionary learned by gradient give better company than similarity within the image (KiT, NLSN)?
Operator: all positions attend to the entries of a learned dictionary by scaled cosine, in one head.  The entry of
    highest attention is a position's category; the positions are sorted by category and cut into chunks, and a position
    attends to those of its chunk, in heads.  The two results are added.
Cost: 4 H W C^2 for the projections, 2 chunk H W C for the attention in chunks, and E H W (C + r) + H W C r + E C (C +
    r) for the dictionary of E entries with queries of r = C / heads numbers.  Linear in H and W.
Departures: our reading where the paper leaves it open: its third branch, window attention, is left out (baseline
    `window`); the dictionary belongs to one block and is not refined from block to block, because an attention knows
    no other block; the last chunk is filled from the first instead of with mirrored positions; one learned sharpness
    serves all entries (its code: one each), and logits in the chunks are scaled by 1 / sqrt(d) (its code: by a learned
    factor).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitbench.attention import chunks, layout

AROUND = (0, 0)  # chunks attended before and behind the own one


class Attention(nn.Module):
    """Attention to a dictionary and within categories: [B, H, W, C] normalised tokens -> [B, H, W, C].

    entries: size E of the dictionary.  chunk: positions in a chunk.  Raises ValueError for settings out of range.
    """

    def __init__(self, dim: int, heads: int, *, shift: bool = False, entries: int = 64, chunk: int = 128) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        for name, value in (("entries", entries), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}")
        self.dim, self.heads, self.chunk, self.narrow = dim, heads, chunk, dim // heads
        self.dictionary = nn.Parameter(torch.randn(entries, dim))
        self.query = nn.Linear(dim, self.narrow)
        self.key = nn.Linear(dim, self.narrow)
        self.value = nn.Linear(dim, dim)
        self.sharpness = nn.Parameter(torch.tensor(0.5))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        logits = self.logits(tokens)
        rows = chunks.rows_of(logits.argmax(-1).argsort(dim=-1, stable=True))
        tables = layout.project(self.qkv, chunks.take(tokens, rows))
        q, k, v = (table.unflatten(-1, (self.heads, -1)) for table in tables)  # [B, N, h, d], sorted by category
        inside = chunks.take(chunks.attend((q, k, v), self.chunk, AROUND).flatten(-2), chunks.inverse(rows))
        y: Tensor = self.proj(inside) + logits.softmax(-1) @ self.value(self.dictionary)
        return y.view(x.shape)

    def logits(self, tokens: Tensor) -> Tensor:
        """Cosines of tokens [B, N, C] and entries times 1 + s log E, with a learned s held in [0, 1]: [B, N, E]."""
        with torch.autocast(tokens.device.type, enabled=False):  # in bfloat16 the highest would often be a tie
            query, key = self.query(tokens.to(self.dictionary.dtype)), self.key(self.dictionary)
            sharpness = 1 + self.sharpness.clamp(0, 1) * math.log(len(self.dictionary))
            return F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT * sharpness

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        count, entries, dim, narrow = height * width, len(self.dictionary), self.dim, self.narrow
        number, size, keys = chunks.plan(count, self.chunk, AROUND)
        dictionary = (count + entries) * dim * narrow + entries * dim**2 + count * entries * (narrow + dim)
        return 4 * count * dim**2 + 2 * number * size * keys * dim + dictionary
