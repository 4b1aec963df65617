"""Patch attention on CUDA that reads neighbour patches by index, without gathering them: Triton kernels.

Forward: one program takes a tile of at most 64 queries of one patch and head. The queries stay in registers, the
neighbours' keys and values are read by their row number, two neighbours at a time, with one running softmax in base 2
(Dao, "FlashAttention-2", 2023). The bias tile is read once for all neighbours.
Backward: dq, the bias gradient and delta = sum(grad * out) in one pass by programs that take a fixed share of the
patches each. dk and dv by one program per *key* patch over the list of the queries that attend to it; a list of more
than SEGMENT queries is cut into segments that run in parallel and are added in the order of the list. No atomic
additions: equal inputs give equal bits.

Tables are [M, T, h, d] as in operator.py, with any strides but 1 in d: head-major tables and
thirds of one projection are read as they lie. The kernels also run on the CPU in Triton's interpreter
(TRITON_INTERPRET=1), and are compiled for GPUs that are not there by tests/attention/test_compiled.py.
How they are launched: triton_launch.py.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(pointer, row, positions, inside, head, by_row, by_position, by_head, D: tl.constexpr, BD: tl.constexpr,
          WHOLE: tl.constexpr):  # fmt: skip
    """Positions of one head of a patch: [block, BD], zeros outside. WHOLE: nothing lies outside."""
    d = tl.arange(0, BD)
    address = pointer + row * by_row + head * by_head + positions[:, None] * by_position + d[None, :]
    if WHOLE:
        return tl.load(address)
    return tl.load(address, mask=inside[:, None] & (d[None, :] < D), other=0.0)


@triton.jit
def _store(pointer, value, row, positions, inside, head, heads, L, D: tl.constexpr, BD: tl.constexpr):
    """Write positions of one head of a patch into a contiguous table [M, L, h, d]."""
    d = tl.arange(0, BD)
    address = pointer + ((row * L + positions[:, None]) * heads + head) * D + d[None, :]
    tl.store(address, value.to(pointer.dtype.element_ty), mask=inside[:, None] & (d[None, :] < D))


@triton.jit
def _bias(pointer, head, t, s, T, S):
    """Bias of queries t and keys s in units of log 2: -inf outside. t [a, 1] and s [1, b], or transposed."""
    return tl.load(pointer + head * T * S + t * S + s, mask=(t < T) & (s < S), other=float("-inf")).to(
        tl.float32
    ) * LOG2E  # fmt: skip


@triton.jit
def _patch(order_ptr, place, ORDERED: tl.constexpr):
    """The patch whose turn is `place`, an int64."""
    return tl.load(order_ptr + place).to(tl.int64) if ORDERED else place


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, neighbour_ptr, order_ptr, bias_ptr, query_label_ptr, key_label_ptr, out_ptr, lse_ptr,
    scale, heads, tiles, N, T, S, q_row, q_position, q_head, k_row, k_position, k_head, v_row, v_position, v_head,
    D: tl.constexpr, OWN: tl.constexpr, PAIRS: tl.constexpr, ORDERED: tl.constexpr, LABELS: tl.constexpr,
    WHOLE_T: tl.constexpr, WHOLE_S: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    patch = _patch(order_ptr, (program // tiles).to(tl.int64), ORDERED)
    t = (program % tiles) * BT + tl.arange(0, BT)
    t_in = t < T
    q = _load(q_ptr, patch, t, t_in, head, q_row, q_position, q_head, D, BD, WHOLE_T)
    if LABELS:
        query_label = tl.load(query_label_ptr + patch * T + t, mask=t_in, other=0)
    highest = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    summed = tl.zeros([BT, BD], tl.float32)
    for start in range(0, S, BS):
        s = start + tl.arange(0, BS)
        s_in = s < S
        bias = _bias(bias_ptr, head, t[:, None], s[None, :], T, S)
        for j in range(0, N, 2 if PAIRS else 1):
            row = patch if OWN else tl.load(neighbour_ptr + patch * N + j).to(tl.int64)
            k = _load(k_ptr, row, s, s_in, head, k_row, k_position, k_head, D, BD, WHOLE_S)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
            if LABELS:
                key_label = tl.load(key_label_ptr + row * S + s, mask=s_in, other=0)
                logits = tl.where(query_label[:, None] == key_label[None, :], logits, float("-inf"))
            new = tl.maximum(highest, tl.max(logits, 1))
            if PAIRS:
                # The last neighbour of an odd number is read twice, and its second reading counts for nothing.
                second = tl.load(neighbour_ptr + patch * N + tl.minimum(j + 1, N - 1)).to(tl.int64)
                k = _load(k_ptr, second, s, s_in, head, k_row, k_position, k_head, D, BD, WHOLE_S)
                more = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
                more = tl.where(j + 1 < N, more, float("-inf"))
                if LABELS:
                    key_label = tl.load(key_label_ptr + second * S + s, mask=s_in, other=0)
                    more = tl.where(query_label[:, None] == key_label[None, :], more, float("-inf"))
                new = tl.maximum(new, tl.max(more, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)  # no key so far: 2^(-inf - 0) is 0, not NaN
            decay = tl.exp2(highest - shift)
            weight = tl.exp2(logits - shift[:, None])
            v = _load(v_ptr, row, s, s_in, head, v_row, v_position, v_head, D, BD, WHOLE_S)
            total = total * decay + tl.sum(weight, 1)
            summed = tl.dot(weight.to(v.dtype), v, acc=summed * decay[:, None], input_precision=PRECISION)
            if PAIRS:
                weight = tl.exp2(more - shift[:, None])
                v = _load(v_ptr, second, s, s_in, head, v_row, v_position, v_head, D, BD, WHOLE_S)
                total += tl.sum(weight, 1)
                summed = tl.dot(weight.to(v.dtype), v, acc=summed, input_precision=PRECISION)
            highest = new
    total = tl.where(t_in, total, 1.0)  # rows beyond T have no key
    _store(out_ptr, summed / total[:, None], patch, t, t_in, head, heads, T, D, BD)
    tl.store(lse_ptr + (patch * heads + head) * T + t, (highest + tl.log2(total)) / LOG2E, mask=t_in)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, lse_ptr, delta_ptr, neighbour_ptr, order_ptr, bias_ptr, query_label_ptr,
    key_label_ptr, dq_ptr, partial_ptr,
    scale, natural_scale, heads, tiles, patches, share, N, T, S, q_row, q_position, q_head, k_row, k_position, k_head,
    v_row, v_position, v_head, grad_row, grad_position, grad_head,
    D: tl.constexpr, OWN: tl.constexpr, ORDERED: tl.constexpr, LABELS: tl.constexpr,
    WHOLE_T: tl.constexpr, WHOLE_S: tl.constexpr, ONE_KEY_TILE: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0), tl.program_id(1)
    first = (program // tiles).to(tl.int64) * share
    t = (program % tiles) * BT + tl.arange(0, BT)
    t_in = t < T
    for start in range(0, S, BS):
        s = start + tl.arange(0, BS)
        s_in = s < S
        bias = _bias(bias_ptr, head, t[:, None], s[None, :], T, S)
        dbias = tl.zeros([BT, BS], tl.float32)
        for place in range(first, tl.minimum(first + share, patches)):
            patch = _patch(order_ptr, place, ORDERED)
            q = _load(q_ptr, patch, t, t_in, head, q_row, q_position, q_head, D, BD, WHOLE_T)
            grad = _load(grad_ptr, patch, t, t_in, head, grad_row, grad_position, grad_head, D, BD, WHOLE_T)
            out = _load(out_ptr, patch, t, t_in, head, T * heads * D, heads * D, D, D, BD, WHOLE_T)
            delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
            lse = tl.load(lse_ptr + (patch * heads + head) * T + t, mask=t_in, other=0.0) * LOG2E
            tl.store(delta_ptr + (patch * heads + head) * T + t, delta, mask=t_in)
            if LABELS:
                query_label = tl.load(query_label_ptr + patch * T + t, mask=t_in, other=0)
            dq = tl.zeros([BT, BD], tl.float32)
            if not ONE_KEY_TILE and start > 0:  # goes on from what this program wrote for the keys before
                tl.debug_barrier()
                dq += _load(dq_ptr, patch, t, t_in, head, T * heads * D, heads * D, D, D, BD, WHOLE_T)
            for j in range(N):
                row = patch if OWN else tl.load(neighbour_ptr + patch * N + j).to(tl.int64)
                k = _load(k_ptr, row, s, s_in, head, k_row, k_position, k_head, D, BD, WHOLE_S)
                v = _load(v_ptr, row, s, s_in, head, v_row, v_position, v_head, D, BD, WHOLE_S)
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
                if LABELS:
                    key_label = tl.load(key_label_ptr + row * S + s, mask=s_in, other=0)
                    logits = tl.where(query_label[:, None] == key_label[None, :], logits, float("-inf"))
                probability = tl.exp2(logits - lse[:, None])
                dlogits = probability * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
                dbias += dlogits
                dq = tl.dot((dlogits * natural_scale).to(k.dtype), k, acc=dq, input_precision=PRECISION)
            _store(dq_ptr, dq, patch, t, t_in, head, heads, T, D, BD)
        address = partial_ptr + (((program // tiles) * heads + head) * T + t[:, None]) * S + s[None, :]
        tl.store(address, dbias, mask=t_in[:, None] & s_in[None, :])


@triton.jit
def _segment(program, patches, first_ptr, row_slot_ptr, slot_row_ptr, order_ptr, SEGMENT: tl.constexpr,
             ORDERED: tl.constexpr):  # fmt: skip
    """Key patch, slot, and begin and end of the queries that a program of _dkv_kernel takes.

    Programs 0 to `patches` take the first segment of the list of a key patch, the others a slot each: a further one.
    A list that is not split is one segment, whatever its length. Slot -1: the segment is the whole list, and goes to
    the results; -2: the segment is empty, and nothing is written.
    """
    if program < patches:
        row = _patch(order_ptr, program.to(tl.int64), ORDERED)
        slot = tl.load(row_slot_ptr + row).to(tl.int32)
        begin = tl.load(first_ptr + row).to(tl.int32)
        end = tl.load(first_ptr + row + 1).to(tl.int32)
        end = tl.where(slot >= 0, tl.minimum(end, begin + SEGMENT), end)
    else:
        slot = program - patches
        row = tl.load(slot_row_ptr + slot).to(tl.int64)  # `patches` where the slot is not in use
        used = row < patches
        row = tl.where(used, row, 0)
        nth = slot - tl.load(row_slot_ptr + row).to(tl.int32)
        begin = tl.load(first_ptr + row).to(tl.int32) + nth * SEGMENT
        end = tl.minimum(tl.load(first_ptr + row + 1).to(tl.int32), begin + SEGMENT)
        end = tl.where(used & (nth > 0), end, begin)  # the first segment is done by another program
        slot = tl.where(used & (nth > 0), slot, -2)
    return row, slot, begin, end


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, first_ptr, query_ptr, row_slot_ptr, slot_row_ptr, order_ptr,
    bias_ptr, query_label_ptr, key_label_ptr, dk_ptr, dv_ptr, partial_ptr,
    scale, natural_scale, heads, patches, slots, T, S, q_row, q_position, q_head, k_row, k_position, k_head,
    v_row, v_position, v_head, grad_row, grad_position, grad_head,
    SEGMENT: tl.constexpr, D: tl.constexpr, OWN: tl.constexpr, ORDERED: tl.constexpr, LABELS: tl.constexpr,
    WHOLE_T: tl.constexpr, WHOLE_S: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """One program a segment of the list of a key patch, head and tile of keys; see _segment."""
    program, head = tl.program_id(0), tl.program_id(1)
    s = tl.program_id(2) * BS + tl.arange(0, BS)
    s_in = s < S
    if OWN:
        row = program.to(tl.int64)
        slot, begin, end = -1, 0, 1
    else:
        row, slot, begin, end = _segment(
            program, patches, first_ptr, row_slot_ptr, slot_row_ptr, order_ptr, SEGMENT, ORDERED
        )
    k = _load(k_ptr, row, s, s_in, head, k_row, k_position, k_head, D, BD, WHOLE_S)
    v = _load(v_ptr, row, s, s_in, head, v_row, v_position, v_head, D, BD, WHOLE_S)
    if LABELS:
        key_label = tl.load(key_label_ptr + row * S + s, mask=s_in, other=0)
    dk = tl.zeros([BS, BD], tl.float32)
    dv = tl.zeros([BS, BD], tl.float32)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        t_in = t < T
        bias = _bias(bias_ptr, head, t[None, :], s[:, None], T, S)  # all tiles are transposed here: [keys, queries]
        for place in range(begin, end):
            patch = row if OWN else tl.load(query_ptr + place).to(tl.int64)
            q = _load(q_ptr, patch, t, t_in, head, q_row, q_position, q_head, D, BD, WHOLE_T)
            grad = _load(grad_ptr, patch, t, t_in, head, grad_row, grad_position, grad_head, D, BD, WHOLE_T)
            lse = tl.load(lse_ptr + (patch * heads + head) * T + t, mask=t_in, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + (patch * heads + head) * T + t, mask=t_in, other=0.0)
            logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias
            if LABELS:
                query_label = tl.load(query_label_ptr + patch * T + t, mask=t_in, other=0)
                logits = tl.where(query_label[None, :] == key_label[:, None], logits, float("-inf"))
            probability = tl.exp2(logits - lse[None, :])
            dv = tl.dot(probability.to(grad.dtype), grad, acc=dv, input_precision=PRECISION)
            dlogits = probability * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot((dlogits * natural_scale).to(q.dtype), q, acc=dk, input_precision=PRECISION)
    if slot == -1:
        _store(dk_ptr, dk, row, s, s_in, head, heads, S, D, BD)
        _store(dv_ptr, dv, row, s, s_in, head, heads, S, D, BD)
    if not OWN and slot >= 0:
        _store(partial_ptr, dk, slot.to(tl.int64), s, s_in, head, heads, S, D, BD)  # type: ignore[attr-defined]
        _store(partial_ptr, dv, (slot + slots).to(tl.int64), s, s_in, head, heads, S, D, BD)


@triton.jit
def _combine_kernel(
    first_ptr, row_slot_ptr, slot_row_ptr, partial_ptr, dk_ptr, dv_ptr, patches, slots, size,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the segments of each list that was split, in the order of the list: one program a slot and block of a row."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(slot_row_ptr + slot).to(tl.int64)
    if row < patches:  # noqa: SIM102 - no row_slot is read for a slot that is not in use
        if tl.load(row_slot_ptr + row) == slot:
            offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            inside = offset < size
            degree = (tl.load(first_ptr + row + 1) - tl.load(first_ptr + row)).to(tl.int32)
            dk = tl.zeros([BLOCK], tl.float32)
            dv = tl.zeros([BLOCK], tl.float32)
            for part in range(slot, slot + tl.cdiv(degree, SEGMENT)):
                dk += tl.load(partial_ptr + part * size + offset, mask=inside)
                dv += tl.load(partial_ptr + (part + slots) * size + offset, mask=inside)
            tl.store(dk_ptr + row * size + offset, dk.to(dk_ptr.dtype.element_ty), mask=inside)
            tl.store(dv_ptr + row * size + offset, dv.to(dv_ptr.dtype.element_ty), mask=inside)
