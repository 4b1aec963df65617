"""Patch attention as one registered operator: `kitbench::patch_attention`, equal to the reference, and fast.

Read reference.py first: it defines what is computed, and the tests hold this file to it.  Registered with
torch.library, so that autograd, torch.compile, fake tensors and both FLOP counters know it under one name.

How: query patches are taken a few dozen at a time.  Their neighbours' keys and values are gathered by whole patch
rows into buffers that stay in the cache, attended, and dropped; the backward pass gathers them again.  Only q, k, v,
the output and one log-sum-exp a query are kept.  On the CPU the forward pass is the fused attention kernel of torch.
The backward pass is written with batched products, because the fused one gives no gradient for a learned bias.  On
CUDA, triton_kernels.py reads the neighbours by index, without gathering, where it can; `gather_reason` says why it
cannot.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

CHUNK_LOGITS = 1 << 20
"""Logits of all heads held at once: 4 MiB of float32, which stay in the processor's cache."""
CUDA_CHUNK_LOGITS = 1 << 25
"""The same on CUDA: 128 MiB of float32, so that a map takes a few launches and not thousands."""
MAX_WIDTH = 128
"""Numbers of a head that one Triton program holds."""


def patch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbours: Tensor | None,
    bias: Tensor,
    query_label: Tensor | None = None,
    key_label: Tensor | None = None,
    weights: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Attention of the T positions of each of M patches over the S positions of each of its n neighbours: [M, T, h, d].

    q: [M, T, h, d]; k, v: [M, S, h, d]; float32, float64 or bfloat16.  neighbours: int64 [M, n], rows of k and v;
    None means each patch itself.  bias [h, T, S], float32 also where the tables are bfloat16; labels, weights: as in
    reference.patch_attention.  order: int64 [M], the patches in an order in which neighbours lie close together, for
    the caches of a GPU; it changes no result.  Every query must be allowed at least one key.  Gradients flow to q, k, v
    and bias.  Raises ValueError for shapes that do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        found = ", ".join(str(list(table.shape)) for table in (q, k, v))
        raise ValueError(f"q must be [M, T, h, d] and k, v [M, S, h, d], but they are {found}")
    if bias.shape != (q.shape[2], q.shape[1], k.shape[1]):
        raise ValueError(f"bias must be {[q.shape[2], q.shape[1], k.shape[1]]}, but is {list(bias.shape)}")
    if (query_label is None) != (key_label is None):
        raise ValueError("query_label and key_label go together, but only one was given")
    if weights is not None and (neighbours is None or weights.shape != neighbours.shape):
        raise ValueError("weights must have the shape of neighbours")
    if order is not None and order.shape != q.shape[:1]:
        raise ValueError(f"order must be {[q.shape[0]]}, but is {list(order.shape)}")
    out: Tensor = _forward(q, k, v, neighbours, bias, query_label, key_label, weights, order)[0]
    return out


def gather_reason(q: Tensor, weights: Tensor | None = None) -> str | None:
    """Why patch_attention gathers neighbours for these queries, or None where Triton kernels read them by index."""
    if q.device.type != "cuda":
        return f"the tables are on {q.device.type}, and the kernels need CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels work in float32, bfloat16 and float16, not in {q.dtype}"
    if weights is not None:
        return "the kernels have one softmax over all neighbours, and weights ask for one each"
    if q.shape[3] > MAX_WIDTH:
        return f"the kernels hold heads of at most {MAX_WIDTH} numbers, not {q.shape[3]}"
    return None


def by_index(q: Tensor, weights: Tensor | None) -> bool:
    """Whether the Triton kernels run; on CUDA, where they do not, the reason is logged once."""
    reason = gather_reason(q, weights)
    if reason is not None and q.device.type == "cuda":
        log_once(reason)
    return reason is None


@cache
def log_once(reason: str) -> None:
    logging.getLogger(__name__).warning("patch attention gathers its neighbours: %s", reason)


def without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run with autocast off: inside the operator the types are chosen by hand."""

    @wraps(implementation)
    def run(q: Tensor, *arguments: Tensor | None) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return implementation(q, *arguments)

    return run


@torch.library.custom_op("kitbench::patch_attention", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbours: Tensor | None,
    bias: Tensor,
    query_label: Tensor | None,
    key_label: Tensor | None,
    weights: Tensor | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [M, T, h, d] and the log-sum-exp [M, g, h, T] of each softmax: g = 1, or n with weights."""
    if by_index(q, weights):
        from kitbench.attention import triton_launch

        return triton_launch.forward(q, k, v, neighbours, bias, query_label, key_label, order)
    pattern = Pattern(neighbours, bias.to(q.dtype), query_label, key_label, weights)
    out = q.new_empty(q.shape)
    lse = q.new_empty((q.shape[0], pattern.groups, q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    for part in pattern.chunks(q.shape[0]):
        queries = pattern.repeat(q[part]).transpose(1, 2)
        keys, values = (pattern.gather(table, part).transpose(1, 2) for table in (k, v))
        attended, log_sum = softmax_attention(queries, keys, values, pattern.mask(part))
        lse[part] = log_sum.unflatten(0, (-1, pattern.groups))
        attended = attended.transpose(1, 2)
        if weights is not None:
            share = pattern.shares(part)[..., None, None]
            attended = (attended.unflatten(0, (-1, pattern.groups)) * share).sum(1)
        out[part] = attended
    return out, lse


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q [b, h, T, d] over k, v [b, h, K, d] with mask [b or 1, h, T, K] added: output and log-sum-exp."""
    if q.device.type == "cpu":
        mask = mask.expand(q.shape[0], -1, -1, -1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False, attn_mask=mask)
        return out, lse
    return softmax_by_products(q, k, v, mask)


def softmax_by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax_attention` where no fused kernel gives the log-sum-exp.

    Logits are float32 for 16-bit tables too, as in the backward pass, whose probabilities would else not sum to 1.
    """
    dtype = accumulator(q.dtype)
    logits = q.to(dtype) @ k.mT.to(dtype) / math.sqrt(q.shape[-1]) + mask
    log_sum = logits.logsumexp(-1)
    return (logits - log_sum[..., None]).exp().to(v.dtype) @ v, log_sum


@torch.library.custom_op("kitbench::patch_attention_backward", mutates_args=())
@without_autocast
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    neighbours: Tensor | None,
    bias: Tensor,
    query_label: Tensor | None,
    key_label: Tensor | None,
    weights: Tensor | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias."""
    if by_index(q, weights):
        from kitbench.attention import triton_launch

        return triton_launch.backward(grad, q, k, v, out, lse, neighbours, bias, query_label, key_label, order)
    pattern = Pattern(neighbours, bias.to(q.dtype), query_label, key_label, weights)
    heads, dtype, scale = q.shape[2], lse.dtype, 1 / math.sqrt(q.shape[-1])
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=dtype, device=k.device) for _ in range(2))
    dmask = torch.zeros(pattern.repeated_bias.shape, dtype=dtype, device=q.device)
    for part in pattern.chunks(q.shape[0]):
        upstream, log_sum = grad[part].to(dtype), lse[part].flatten(0, 1)  # [c, T, h, d], [b, h, T]
        delta = (upstream * out[part]).sum(-1).transpose(1, 2)  # [c, h, T]
        if weights is not None:
            upstream = (upstream[:, None] * pattern.shares(part)[..., None, None]).flatten(0, 1)
        queries = heads_first(pattern.repeat(q[part].to(dtype) * scale))  # [b * h, T, d]
        keys, values = (heads_first(pattern.gather(table, part).to(dtype)) for table in (k, v))  # [b * h, K, d]
        upstream = heads_first(upstream)
        probability = (pattern.mask(part) - log_sum[..., None]).flatten(0, 1)  # [b * h, T, K]
        probability.baddbmm_(queries, keys.mT).exp_()
        if weights is None:
            dlogits = torch.baddbmm(-delta.flatten(0, 1)[..., None], upstream, values.mT).mul_(probability)
        else:
            dlogits = torch.bmm(upstream, values.mT).mul_(probability)
            dlogits.addcmul_(probability, dlogits.sum(-1, keepdim=True), value=-1)
        dmask += dlogits.unflatten(0, (-1, heads)).sum(0)
        pattern.scatter(dv, heads_last(torch.bmm(probability.mT, upstream), heads), part)
        pattern.scatter(dk, heads_last(torch.bmm(dlogits.mT, queries), heads), part)
        dqueries = heads_last(torch.bmm(dlogits, keys), heads)
        dq[part] = dqueries if weights is None else dqueries.unflatten(0, (-1, pattern.groups)).sum(1)
    dbias = dmask.unflatten(-1, (-1, k.shape[1])).sum(-2)
    return dq.mul_(scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype)


def heads_first(rows: Tensor) -> Tensor:
    """[b, L, h, d] -> [b * h, L, d], contiguous: batched products of strided heads take twice the time."""
    return rows.transpose(1, 2).flatten(0, 1).contiguous()


def heads_last(rows: Tensor, heads: int) -> Tensor:
    """[b * h, L, d] -> [b, L, h, d]: the inverse of `heads_first`."""
    by_head: Tensor = rows.unflatten(0, (-1, heads))
    return by_head.transpose(1, 2)


@dataclass(frozen=True)
class Pattern:
    """Who attends to whom, and how the softmaxes are grouped: the arguments of the operator that are not tables.

    A chunk of c query patches takes part in b = c * g softmaxes over K = n / g * S keys: g = 1, or n with weights.
    """

    neighbours: Tensor | None
    bias: Tensor
    query_label: Tensor | None
    key_label: Tensor | None
    weights: Tensor | None

    @property
    def count(self) -> int:
        return 1 if self.neighbours is None else self.neighbours.shape[1]

    @property
    def groups(self) -> int:
        return 1 if self.weights is None else self.count

    @cached_property
    def repeated_bias(self) -> Tensor:
        """The bias of each of the K keys of a softmax, [h, T, K]."""
        return self.bias.repeat(1, 1, self.count // self.groups)

    def chunks(self, patches: int) -> Iterator[slice]:
        """Slices of the query patches, as many at a time as the logits held at once allow."""
        limit = CUDA_CHUNK_LOGITS if self.bias.device.type == "cuda" else CHUNK_LOGITS
        step = max(1, limit // (self.bias.numel() * self.count))
        return (slice(start, min(start + step, patches)) for start in range(0, patches, step))

    def gather(self, table: Tensor, part: slice) -> Tensor:
        """Rows of a table [M, S, ...] that the chunk attends to: [b, K, ...]."""
        if self.neighbours is None:
            return table[part]
        rows = table.index_select(0, self.neighbours[part].flatten())
        return rows.view(-1, self.count // self.groups * table.shape[1], *table.shape[2:])

    def scatter(self, table: Tensor, rows: Tensor, part: slice) -> None:
        """Add rows [b, K, ...] back to where `gather` took them from."""
        if self.neighbours is None:
            table[part] = rows
        else:
            # Two-dimensional: with more dimensions index_add_ takes a path that is several times slower.
            table = table.flatten(1)
            table.index_add_(0, self.neighbours[part].flatten(), rows.reshape(-1, table.shape[1]))

    def repeat(self, rows: Tensor) -> Tensor:
        """Rows [c, ...] once for each softmax that they take part in: [b, ...]."""
        return rows if self.groups == 1 else rows.repeat_interleave(self.groups, dim=0)

    def mask(self, part: slice) -> Tensor:
        """What is added to the logits, [b or 1, h, T, K]: the bias; -inf where labels differ."""
        mask = self.repeated_bias[None]
        allowed = self.allowed(part)
        if allowed is None:
            return mask
        if self.weights is not None:
            # A softmax without a key would be NaN: it attends to everything, and `shares` gives it no weight.
            allowed = allowed | ~(allowed & (mask[:, 0] > -math.inf)).any(-1, keepdim=True)
        return mask.where(allowed[:, None], -math.inf)

    def allowed(self, part: slice) -> Tensor | None:
        """Which pairs the labels allow: bool [b, T, K], or None where all."""
        if self.query_label is None or self.key_label is None:
            return None
        # On CUDA the mask is always made: to ask whether it is needed would wait for the device.
        if self.bias.device.type == "cpu" and bool(self.plain[part].all()):
            return None
        return self.repeat(self.query_label[part])[:, :, None] == self.gather(self.key_label, part)[:, None, :]

    @cached_property
    def plain(self) -> Tensor:
        """The query patches, bool [M], whose positions and keys all have one label: most of them need no mask."""
        assert self.query_label is not None
        assert self.key_label is not None
        one = self.query_label[:, 0]
        own = (self.query_label == one[:, None]).all(1)
        low, high = (self.gather(label[:, None], slice(None)) for label in self.key_label.aminmax(dim=1))
        low, high = (label.reshape(one.shape[0], -1) for label in (low, high))
        return own & (low == one[:, None]).all(1) & (high == one[:, None]).all(1)

    def shares(self, part: slice) -> Tensor:
        """Weights of the neighbours for each query, [c, n, T], of sum 1: none for a neighbour that offers it no key."""
        assert self.weights is not None
        share = self.weights[part][:, :, None].to(accumulator(self.bias.dtype))
        allowed = self.allowed(part)
        if allowed is not None:
            share = share * (allowed & (self.bias[0] > -math.inf)).any(-1).unflatten(0, (-1, self.count))
        return share / share.sum(1, keepdim=True)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and log-sum-exps: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@_forward.register_fake
def _(q, k, v, neighbours, bias, query_label, key_label, weights, order):  # type: ignore[no-untyped-def]
    groups = 1 if weights is None else weights.shape[1]
    lse = q.new_empty((q.shape[0], groups, q.shape[2], q.shape[1]), dtype=accumulator(q.dtype))
    return q.new_empty(q.shape), lse


@_backward.register_fake
def _(grad, q, k, v, out, lse, neighbours, bias, query_label, key_label, weights, order):  # type: ignore[no-untyped-def]
    return tuple(table.new_empty(table.shape) for table in (q, k, v, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *pattern = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *pattern)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dbias = _backward(grad, *ctx.saved_tensors)
    return dq, dk, dv, None, dbias, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


# Two products forward; five backward, because the logits are computed again.  FLOPs are twice the multiply-adds.
@register_flop_formula(torch.ops.kitbench.patch_attention)
def _forward_flops(q: tuple[int, ...], k: tuple[int, ...], v: Any, neighbours: Any, *_: Any, **__: Any) -> int:
    patches, positions, heads, width = q
    keys = k[1] * (1 if neighbours is None else neighbours[1])
    return 2 * 2 * patches * positions * keys * heads * width


@register_flop_formula(torch.ops.kitbench.patch_attention_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, neighbours: Any, *_: Any, **__: Any) -> int:
    return _forward_flops(q, k, v, neighbours) * 5 // 2
