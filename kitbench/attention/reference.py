"""The readable definition of patch attention: what every fast operator must equal, and slow on purpose.

Here the whole map is gathered and every logit is held at once, under plain autograd.  Nothing in the hot path imports
this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbours: Tensor,
    bias: Tensor | None = None,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Attention of the T positions of each of M patches over the S positions of each of its neighbours.

    q: [M, T, h, d]; k, v: [M, S, h, d]; neighbours: int64 [M, n], rows of k and v.
    bias: [h, T, S], added to the logits of every neighbour; -inf forbids a pair.
    query_label: [M, T], key_label: [M, S]: a query attends to the keys of its own label only.
    weights: [M, n], or None.  None: one softmax over all n * S keys, which is the same as one softmax for each
    neighbour, the results weighted by softmax over neighbours of their log-sum-exp.  Given: one softmax for each
    neighbour, the results weighted by `weights`, which are first divided by their sum over the neighbours that offer
    the query at least one key.

    Returns [M, T, h, d].  Every query must be allowed at least one key.
    """
    n = neighbours.shape[1]
    keys, values = k[neighbours], v[neighbours]  # [M, n, S, h, d]
    logits = torch.einsum("mthd,mnshd->mhtns", q, keys) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias[None, :, :, None, :]
    if query_label is not None and key_label is not None:
        forbidden = query_label[:, :, None, None] != key_label[neighbours][:, None]  # [M, T, n, S]
        logits = logits.masked_fill(forbidden[:, None], float("-inf"))
    if weights is None:
        probability = logits.flatten(3).softmax(-1).unflatten(3, (n, -1))
    else:
        empty = (logits == float("-inf")).all(-1)  # [M, h, T, n]
        share = weights[:, None, None, :].masked_fill(empty, 0)
        share = share / share.sum(-1, keepdim=True)
        probability = logits.masked_fill(empty[..., None], 0).softmax(-1) * share[..., None]
    return torch.einsum("mhtns,mnshd->mthd", probability, values)
