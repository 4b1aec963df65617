"""Patch attention on CUDA that reads neighbour patches by index, without gathering them: Triton kernels.

Forward: one program a query patch and head; the queries stay in registers, the neighbours' keys and values are read by
their row number, with one running softmax (Dao, "FlashAttention-2", 2023).  Backward: dq by the same loop; dk and dv by
one program a *key* patch over the list of the queries that attend it; the bias by programs that each sum a fixed share
of the patches.  No atomic additions: equal inputs give equal bits.  All tables are [M, T, h, d], as in operator.py,
which is the only user.  Runs on the CPU in Triton's interpreter (TRITON_INTERPRET=1), and so is tested without a GPU.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BIAS_PROGRAMS = 64  # partial sums of the bias gradient


@triton.jit
def _logits(
    q, k, bias_ptr, query_label, key_label_ptr, head, row, t, s, t_in, s_in, scale,
    T: tl.constexpr, S: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Masked logits [BT, BS] of a query tile and a key tile."""
    pair = t_in[:, None] & s_in[None, :]
    bias = tl.load(bias_ptr + head * T * S + t[:, None] * S + s[None, :], mask=pair, other=float("-inf"))
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias.to(tl.float32)
    if LABELS:
        key_label = tl.load(key_label_ptr + row * S + s, mask=s_in, other=0)
        logits = tl.where(query_label[:, None] == key_label[None, :], logits, float("-inf"))
    return logits


@triton.jit
def _tile(
    pointer, row, positions, inside, head, HEADS: tl.constexpr, D: tl.constexpr, L: tl.constexpr, BD: tl.constexpr
):
    """Positions of one head of a patch: [block, BD] of a table [M, L, h, d], zeros outside."""
    d = tl.arange(0, BD)
    offset = ((row * L + positions[:, None]) * HEADS + head) * D + d[None, :]
    return tl.load(pointer + offset, mask=inside[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _store(
    pointer,
    value,
    row,
    positions,
    inside,
    head,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
):
    d = tl.arange(0, BD)
    offset = ((row * L + positions[:, None]) * HEADS + head) * D + d[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, neighbour_ptr, bias_ptr, query_label_ptr, key_label_ptr, out_ptr, lse_ptr, scale,
    N: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr, LABELS: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    patch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.arange(0, BT)
    t_in = t < T
    q = _tile(q_ptr, patch, t, t_in, head, HEADS, D, T, BD)
    query_label = tl.load(query_label_ptr + patch * T + t, mask=t_in, other=0) if LABELS else t
    highest = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    summed = tl.zeros([BT, BD], tl.float32)
    for j in range(N):
        row = tl.load(neighbour_ptr + patch * N + j)
        for start in range(0, S, BS):
            s = start + tl.arange(0, BS)
            s_in = s < S
            k = _tile(k_ptr, row, s, s_in, head, HEADS, D, S, BD)
            logits = _logits(
                q, k, bias_ptr, query_label, key_label_ptr, head, row, t, s, t_in, s_in, scale, T, S, LABELS
            )
            new = tl.maximum(highest, tl.max(logits, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)  # no key so far: exp(-inf - 0) is 0, not NaN
            weight = tl.exp(logits - shift[:, None])
            decay = tl.exp(highest - shift)
            v = _tile(v_ptr, row, s, s_in, head, HEADS, D, S, BD)
            total = total * decay + tl.sum(weight, 1)
            summed = summed * decay[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            highest = new
    total = tl.where(t_in, total, 1.0)  # rows beyond T have no key
    _store(out_ptr, summed / total[:, None], patch, t, t_in, head, HEADS, D, T, BD)
    tl.store(lse_ptr + (patch * HEADS + head) * T + t, highest + tl.log(total), mask=t_in)


@triton.jit
def _dlogits(
    q, k, v, grad, lse, delta, bias_ptr, query_label, key_label_ptr, head, row, t, s, t_in, s_in, scale,
    T: tl.constexpr, S: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Probabilities and gradients of the logits of a query tile and a key tile: [BT, BS] each, zeros outside."""
    logits = _logits(q, k, bias_ptr, query_label, key_label_ptr, head, row, t, s, t_in, s_in, scale, T, S, LABELS)
    probability = tl.exp(logits - lse[:, None])
    return probability, probability * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, neighbour_ptr, bias_ptr, query_label_ptr, key_label_ptr, dq_ptr,
    scale, N: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    LABELS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    patch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.arange(0, BT)
    t_in = t < T
    q = _tile(q_ptr, patch, t, t_in, head, HEADS, D, T, BD)
    grad = _tile(grad_ptr, patch, t, t_in, head, HEADS, D, T, BD)
    lse = tl.load(lse_ptr + (patch * HEADS + head) * T + t, mask=t_in, other=0.0)
    delta = tl.load(delta_ptr + (patch * HEADS + head) * T + t, mask=t_in, other=0.0)
    query_label = tl.load(query_label_ptr + patch * T + t, mask=t_in, other=0) if LABELS else t
    dq = tl.zeros([BT, BD], tl.float32)
    for j in range(N):
        row = tl.load(neighbour_ptr + patch * N + j)
        for start in range(0, S, BS):
            s = start + tl.arange(0, BS)
            s_in = s < S
            k = _tile(k_ptr, row, s, s_in, head, HEADS, D, S, BD)
            v = _tile(v_ptr, row, s, s_in, head, HEADS, D, S, BD)
            _, dlogits = _dlogits(
                q, k, v, grad, lse, delta, bias_ptr, query_label, key_label_ptr, head, row, t, s, t_in, s_in, scale,
                T, S, LABELS,
            )  # fmt: skip
            dq += tl.dot(dlogits.to(k.dtype), k, input_precision="ieee")
    _store(dq_ptr, dq * scale, patch, t, t_in, head, HEADS, D, T, BD)


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, query_ptr, bias_ptr, query_label_ptr, key_label_ptr,
    dk_ptr, dv_ptr, scale, HEADS: tl.constexpr, T: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    LABELS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = tl.program_id(2) * BS + tl.arange(0, BS)
    s_in = s < S
    t = tl.arange(0, BT)
    t_in = t < T
    k = _tile(k_ptr, row, s, s_in, head, HEADS, D, S, BD)
    v = _tile(v_ptr, row, s, s_in, head, HEADS, D, S, BD)
    dk = tl.zeros([BS, BD], tl.float32)
    dv = tl.zeros([BS, BD], tl.float32)
    for place in range(tl.load(first_ptr + row), tl.load(first_ptr + row + 1)):
        patch = tl.load(query_ptr + place)
        q = _tile(q_ptr, patch, t, t_in, head, HEADS, D, T, BD)
        grad = _tile(grad_ptr, patch, t, t_in, head, HEADS, D, T, BD)
        lse = tl.load(lse_ptr + (patch * HEADS + head) * T + t, mask=t_in, other=0.0)
        delta = tl.load(delta_ptr + (patch * HEADS + head) * T + t, mask=t_in, other=0.0)
        query_label = tl.load(query_label_ptr + patch * T + t, mask=t_in, other=0) if LABELS else t
        probability, dlogits = _dlogits(
            q, k, v, grad, lse, delta, bias_ptr, query_label, key_label_ptr, head, row, t, s, t_in, s_in, scale,
            T, S, LABELS,
        )  # fmt: skip
        dv += tl.dot(tl.trans(probability).to(grad.dtype), grad, input_precision="ieee")
        dk += tl.dot(tl.trans(dlogits).to(q.dtype), q, input_precision="ieee")
    _store(dk_ptr, dk * scale, row, s, s_in, head, HEADS, D, S, BD)
    _store(dv_ptr, dv, row, s, s_in, head, HEADS, D, S, BD)


@triton.jit
def _dbias_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, neighbour_ptr, bias_ptr, query_label_ptr, key_label_ptr,
    partial_ptr, patches, scale, N: tl.constexpr, HEADS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, LABELS: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    share, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = tl.program_id(2) * BS + tl.arange(0, BS)
    s_in = s < S
    t = tl.arange(0, BT)
    t_in = t < T
    total = tl.zeros([BT, BS], tl.float32)
    for patch in range(share, patches, tl.num_programs(0)):
        q = _tile(q_ptr, patch, t, t_in, head, HEADS, D, T, BD)
        grad = _tile(grad_ptr, patch, t, t_in, head, HEADS, D, T, BD)
        lse = tl.load(lse_ptr + (patch * HEADS + head) * T + t, mask=t_in, other=0.0)
        delta = tl.load(delta_ptr + (patch * HEADS + head) * T + t, mask=t_in, other=0.0)
        query_label = tl.load(query_label_ptr + patch * T + t, mask=t_in, other=0) if LABELS else t
        for j in range(N):
            row = tl.load(neighbour_ptr + patch * N + j)
            k = _tile(k_ptr, row, s, s_in, head, HEADS, D, S, BD)
            v = _tile(v_ptr, row, s, s_in, head, HEADS, D, S, BD)
            _, dlogits = _dlogits(
                q, k, v, grad, lse, delta, bias_ptr, query_label, key_label_ptr, head, row, t, s, t_in, s_in, scale,
                T, S, LABELS,
            )  # fmt: skip
            total += dlogits
    pair = t_in[:, None] & s_in[None, :]
    tl.store(partial_ptr + ((share * HEADS + head) * T + t[:, None]) * S + s[None, :], total, mask=pair)


def blocks(q: Tensor, k: Tensor) -> dict[str, int]:
    """Sizes of the problem and of its tiles, each a power of two of at least 16 as tl.dot wants them."""
    _, positions, heads, width = q.shape
    keys = k.shape[1]
    return {
        "HEADS": heads,
        "T": positions,
        "S": keys,
        "D": width,
        "BT": max(16, triton.next_power_of_2(positions)),
        "BS": min(64, max(16, triton.next_power_of_2(keys))),
        "BD": max(16, triton.next_power_of_2(width)),
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbours: Tensor,
    bias: Tensor,
    query_label: Tensor | None,
    key_label: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [M, T, h, d] and the log-sum-exp [M, 1, h, T] in float32; arguments as in operator.py."""
    q, k, v, neighbours, bias = (table.contiguous() for table in (q, k, v, neighbours, bias))
    labels = () if query_label is None or key_label is None else (query_label.contiguous(), key_label.contiguous())
    patches, positions, heads, width = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(patches, 1, heads, positions, dtype=torch.float32, device=q.device)
    _forward_kernel[(patches, heads)](
        q, k, v, neighbours, bias, *(labels or (q, q)), out, lse, 1 / math.sqrt(width),
        N=neighbours.shape[1], LABELS=bool(labels), **blocks(q, k),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, neighbours: Tensor, bias: Tensor,
    query_label: Tensor | None, key_label: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias; arguments as in operator.py."""
    grad, q, k, v, neighbours, bias = (table.contiguous() for table in (grad, q, k, v, neighbours, bias))
    labels = () if query_label is None or key_label is None else (query_label.contiguous(), key_label.contiguous())
    label_pair = labels or (q, q)
    patches, _, heads, width = q.shape
    scale, n, sizes = 1 / math.sqrt(width), neighbours.shape[1], blocks(q, k)
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()  # [M, h, T]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tables = (q, k, v, grad, lse, delta)
    _dq_kernel[(patches, heads)](*tables, neighbours, bias, *label_pair, dq, scale, N=n, LABELS=bool(labels), **sizes)
    # Who attends a key patch: places in the flattened neighbour lists, sorted by key patch, in a fixed order.
    attended, places = neighbours.flatten().sort(stable=True)
    first = torch.searchsorted(attended, torch.arange(patches + 1, device=q.device))
    key_tiles = triton.cdiv(sizes["S"], sizes["BS"])
    _dkv_kernel[(patches, heads, key_tiles)](
        *tables, first, places // n, bias, *label_pair, dk, dv, scale, LABELS=bool(labels), **sizes
    )
    programs = min(BIAS_PROGRAMS, patches)
    partial = torch.empty(programs, *bias.shape, dtype=torch.float32, device=q.device)
    _dbias_kernel[(programs, heads, key_tiles)](
        *tables, neighbours, bias, *label_pair, partial, patches, scale, N=n, LABELS=bool(labels), **sizes
    )
    return dq, dk, dv, partial.sum(0).to(bias.dtype)
