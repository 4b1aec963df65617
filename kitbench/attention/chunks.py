"""Attention of sorted tokens, related ones side by side: cut into chunks that attend to the chunks around.

The order is closed to a circle, so that every chunk has neighbours.  The attentions that sort tokens by hash code,
nearest centre or category share this.  Source: Reformer (Kitaev et al., ICLR 2020, section 2); the circle instead of
padding is our own.

B images of N tokens.  A table is [B, N, ...]; an order is int64 [B, N], a permutation of the tokens of each image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows_of(order: Tensor) -> Tensor:
    """An order [B, N] as rows int64 [B * N] of tables whose images lie one behind the other."""
    batch, count = order.shape
    return (order + torch.arange(batch, device=order.device)[:, None] * count).flatten()


def inverse(rows: Tensor) -> Tensor:
    """The permutation that undoes `rows`, int64 [B * N]."""
    return torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=rows.device))


def take(table: Tensor, rows: Tensor) -> Tensor:
    """A table [B, N, ...] with its rows in another order, int64 [B * N]."""
    return table.flatten(0, 1).index_select(0, rows).view(table.shape)


def attend(
    tables: tuple[Tensor, Tensor, Tensor],
    chunk: int,
    around: tuple[int, int],
    extra: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of sorted tokens: queries, keys and values [B, N, h, d] -> [B, N, h, d].

    Chunk i holds the tokens of ranks i * chunk to (i + 1) * chunk.  Its tokens attend to those of the chunk itself, of
    the around[0] chunks before it and the around[1] chunks behind it, taken on the circle of all ranks: the last chunk
    is filled from the first.  Where all tokens of an image are no more than that, each attends to all.  No token is
    attended twice.  extra: keys and values [h, d] of one more position, to which every query attends.  scale: of the
    logits; 1 / sqrt(d) if None.
    """
    q, k, v = tables
    batch, count, heads, width = q.shape
    chunks, size, reach = plan(count, chunk, around)
    if chunks > 1:
        q = circle(q, 0, chunks * size).unflatten(1, (chunks, size))
    keys, values = (
        around_chunks(table, None if extra is None else extra[place], (chunks, size, reach), around[0])
        for place, table in enumerate((k, v))
    )
    q = q.reshape(batch * chunks, size, heads, width)
    q, keys, values = (table.transpose(1, 2) for table in (q, keys, values))
    out = F.scaled_dot_product_attention(q, keys, values, scale=scale)
    return out.transpose(1, 2).reshape(batch, chunks * size, heads, width)[:, :count]


def plan(count: int, chunk: int, around: tuple[int, int]) -> tuple[int, int, int]:
    """How `attend` cuts `count` tokens: number of chunks, tokens in each, keys that each of these attends to."""
    reach = chunk * (1 + sum(around))
    return (1, count, count) if count <= reach else (-(-count // chunk), chunk, reach)


def around_chunks(table: Tensor, extra: Tensor | None, cut: tuple[int, int, int], before: int) -> Tensor:
    """The rows of a table [B, N, h, d] that each chunk attends to, and the extra one: [B * chunks, keys, h, d]."""
    chunks, size, reach = cut
    parts = [table[:, None]]
    if chunks > 1:
        stretch = circle(table, before * size, chunks * size + reach - (before + 1) * size)
        starts = range(0, reach, size)
        parts = [stretch[:, start : start + chunks * size].unflatten(1, (chunks, size)) for start in starts]
    if extra is not None:
        parts.append(extra.to(table.dtype).expand(len(table), chunks, 1, -1, -1))
    return torch.cat(parts, 2).flatten(0, 1)


def circle(table: Tensor, before: int, until: int) -> Tensor:
    """Rows -before to `until` of a table [B, N, ...] that goes on where it ends; before <= N, N <= until <= 2 N."""
    count = table.shape[1]
    return torch.cat([table[:, count - before :], table, table[:, : until - count]], 1)
