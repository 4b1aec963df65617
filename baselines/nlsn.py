"""NLSN, non-local sparse attention: positions hashed, sorted by their code and attended in chunks.

Paper: "Image Super-Resolution with Non-Local Sparse Attention" (Mei, Fan, Zhou, CVPR 2021).
Question: KiT without patches: do single positions, retrieved anywhere in the image, do better than whole patches?
Operator: spherical locality sensitive hashing gives each position a code; the positions are sorted by it and cut into
    chunks; a position attends to its own chunk and both adjacent ones.  Query and key are one embedding, the key of
    unit length, and the logits are not scaled.  Several rounds with other hashes are weighted by their log-sum-exp.
Cost: 3 H W C^2 for the projections; for each round 3 chunk H W (2 C + 2 heads) for the attention and (nb / 2) H W C for
    the hashing into nb <= 128 buckets.  Linear in H and W.
Departures: our reading where the paper leaves it open: linear maps instead of its 3 x 3 and 1 x 1 convolutions, and an
    output projection; an embedding of C instead of C / 4 numbers, in heads, with one hashing for all of them; an even
    number of buckets, rounded down; the chunks lie on a circle instead of being padded with repeated positions; on a
    map of at most 3 chunk positions each attends to all, once.  Evaluation takes stored hashes, training draws new
    ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitbench.attention import chunks, retrieval

AROUND = (1, 1)  # chunks attended before and behind the own one


class Attention(nn.Module):
    """Non-local sparse attention: [B, H, W, C] normalised tokens -> [B, H, W, C].

    rounds: number of hashings.  chunk: positions in a chunk.  Raises ValueError for settings out of range.
    """

    def __init__(self, dim: int, heads: int, *, shift: bool = False, rounds: int = 4, chunk: int = 144) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        for name, value in (("rounds", rounds), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but is {value}")
        self.dim, self.heads, self.rounds, self.chunk = dim, heads, rounds, chunk
        self.match = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.rotations: Tensor
        self.register_buffer("rotations", torch.randn(rounds, dim, retrieval.MAX_BUCKETS // 2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        match, value = self.match(tokens), self.value(tokens)
        match_by_head, value_by_head = (table.unflatten(-1, (self.heads, -1)) for table in (match, value))
        tables, sink = with_sink(match_by_head, value_by_head, self.spare(x.device))
        weighted, mass = [], []
        for rows in self.orders(match):
            q, k, v = (tables if rows is None else chunks.take(tables, rows)).unbind(2)
            out = chunks.attend((q, k, v), self.chunk, AROUND, (sink, sink), scale=1.0)
            out = out if rows is None else chunks.take(out, chunks.inverse(rows))
            # Let w = exp(logit - norm). The sink has w = 1: its share is s = 1 / (1 + sum w), and the rest of the
            # output is s * sum(w v). So the rounds add up to one softmax over the keys of all of them.
            result, share = out[..., : self.dim // self.heads], out[..., -1:]
            weighted.append(result / share)
            mass.append(1 / share - 1)
        y: Tensor = self.proj((torch.stack(weighted).sum(0) / torch.stack(mass).sum(0)).flatten(-2))
        return y.view(x.shape)

    @torch.no_grad()
    def orders(self, match: Tensor) -> list[Tensor | None]:
        """For each round the rows [B * N] that sort embeddings [B, N, C] by code; [None] where all attend to all."""
        count = match.shape[1]
        if chunks.plan(count, self.chunk, AROUND)[0] == 1:
            return [None]
        rotations = torch.randn_like(self.rotations) if self.training else self.rotations
        with torch.autocast(match.device.type, enabled=False):
            match = match.to(self.rotations.dtype)
            return [chunks.rows_of(retrieval.hash_order(match, rotation, self.chunk)) for rotation in rotations]

    def spare(self, device: torch.device) -> int:
        """Numbers that the sink adds to a head: 1, and on a GPU up to a multiple of 8, as its fused kernels ask for."""
        return 1 if device.type == "cpu" else 8 - self.dim // self.heads % 8

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        count = height * width
        number, size, keys = chunks.plan(count, self.chunk, AROUND)
        rounds = self.rounds if number > 1 else 1
        hashing = rounds * count * self.dim * (retrieval.buckets(count, self.chunk) // 2) if number > 1 else 0
        numbers = self.dim + self.heads * self.spare(self.match.weight.device)
        attended = 2 * rounds * number * size * (keys + 1) * numbers
        return 3 * count * self.dim**2 + hashing + attended


def with_sink(match: Tensor, value: Tensor, spare: int) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of embeddings [B, N, h, d], and one more position, the sink, as its own key and value.

    They come stacked, [B, N, 3, h, d + spare], and the sink is [h, d + spare]; spare >= 1.  The last number of an
    output is the sink's share of the softmax, which tells the sum over the others.  The logit of the sink is the norm
    of the query, which no logit of a unit key exceeds and the query's own key reaches.
    """
    norm = torch.linalg.vector_norm(match, dim=-1, keepdim=True).detach()  # it cancels, and so does its gradient
    query = torch.cat([F.pad(match, (0, spare - 1)), norm], -1)
    key, value = (F.pad(table, (0, spare)) for table in (F.normalize(match, dim=-1), value))
    sink = torch.zeros_like(query[0, 0])
    sink[:, -1] = 1
    return torch.stack([query, key, value], 2), sink
