"""Launching the kernels of triton_kernels.py: sizes of tiles, lists of who attends whom, memory for the results.

operator.py is the only user. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kitbench.attention.triton_kernels import (
    LOG2E,
    _combine_kernel,
    _dkv_kernel,
    _dq_kernel,
    _forward_kernel,
)

SEGMENT = 8  # queries of a segment of the list of a key patch
PROGRAMS = 2048  # of the pass over dq, about: each leaves a partial sum of the bias gradient


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel. Tests put a function in its place that compiles for another GPU instead."""
    kernel[grid](*arguments, **constants)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 tables are computed: in TF32 on tensor cores where torch's flag allows it, or exactly."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@dataclass(frozen=True)
class Problem:
    """What all kernels of one call share."""

    q: Tensor
    k: Tensor
    v: Tensor
    neighbours: Tensor | None
    bias: Tensor
    labels: tuple[Tensor, Tensor] | None
    order: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Patches, queries of a patch, keys of a neighbour, heads, width."""
        patches, queries, heads, width = self.q.shape
        return patches, queries, self.k.shape[1], heads, width

    @property
    def count(self) -> int:
        """Neighbours of a patch."""
        return 1 if self.neighbours is None else self.neighbours.shape[1]

    def strides(self, *tables: Tensor) -> tuple[int, ...]:
        return tuple(step for table in tables for step in table.stride()[:3])

    def label_pair(self) -> tuple[Tensor, Tensor]:
        return self.labels or (self.q, self.q)

    def constants(self, stage: str) -> dict[str, Any]:
        """Compile-time constants: the tiles, powers of two of at least 16 as tl.dot wants them, and what is absent."""
        _, queries, keys, _, width = self.shape
        block = max(16, triton.next_power_of_2(width))
        kind = precision(self.q.dtype) if self.q.dtype == torch.float32 else "half"
        crowded = self.neighbours is not None and (self.labels is not None or keys > Schedule.keys)
        chosen = schedule(stage, kind, block, crowded)
        tile_t = min(chosen.queries, max(16, triton.next_power_of_2(queries)))
        tile_s = min(chosen.keys, max(16, triton.next_power_of_2(keys)))
        flat = block == width
        return {
            "D": width,
            "OWN": self.neighbours is None,
            "ORDERED": self.order is not None,
            "LABELS": self.labels is not None,
            "WHOLE_T": flat and queries % tile_t == 0,
            "WHOLE_S": flat and keys % tile_s == 0,
            "PRECISION": precision(self.q.dtype),
            "BT": tile_t,
            "BS": tile_s,
            "BD": block,
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }


@dataclass(frozen=True)
class Schedule:
    """Queries and keys of a tile at most, warps of a program, and stages of its loop's pipeline."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 3
    """With 3 the indices of the neighbours are fetched ahead of their tiles, and these ahead of the products."""


def schedule(stage: str, kind: str, block: int, crowded: bool) -> Schedule:
    """What a kernel's registers and shared memory hold: `kind` is 'half' (16 bits), 'tf32' or 'ieee' (float32).

    crowded: neighbours with labels, or with keys of more than one tile. Read off the compiled code of sm_80 and sm_90
    (benchmarks/kernels.py), with room to spare: the order in which Triton carries variables through a loop differs from
    process to process, and with it the registers.
    """
    if kind == "half":
        if stage == "dq":  # holds bias and its gradient besides the logits
            return Schedule(queries=32, keys=32 if crowded else 64, warps=8 if block == 128 else 4, stages=2)
        if stage == "dkv":
            return Schedule(queries=64 if block <= 32 else 32, warps=4 if block <= 32 else 8, stages=2)
        if block == 128:
            return Schedule(queries=32, keys=32, stages=2)
        return Schedule(warps=8 if block == 64 else 4, stages=2)
    if kind == "tf32" and block <= 32:
        return Schedule(queries=32 if stage == "dq" else 64, warps=8, stages=1)
    # Products without tensor cores are unrolled over the width: larger tiles spill.
    queries, keys = (32, 64) if block <= 32 else (32, 32) if block == 64 else (16, 16)
    return Schedule(queries, keys, warps=8, stages=1)


def problem(
    q: Tensor, k: Tensor, v: Tensor, neighbours: Tensor | None, bias: Tensor, query_label: Tensor | None,
    key_label: Tensor | None, order: Tensor | None,
) -> Problem:  # fmt: skip
    """The arguments as the kernels read them: numbers of a head beside each other, small tables contiguous."""
    labels = None
    if query_label is not None and key_label is not None:
        labels = (query_label.contiguous(), key_label.contiguous())
    return Problem(  # type: ignore[call-arg]
        *(  # type: ignore[arg-type]
            table if table.stride(-1) == 1 else table.contiguous() for table in (q, k, v)
        ),
        None if neighbours is None else neighbours.contiguous(),
        bias.contiguous(),
        labels,
        None if neighbours is None or order is None else order.contiguous(),
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, neighbours: Tensor | None, bias: Tensor, query_label: Tensor | None,
    key_label: Tensor | None, order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [M, T, h, d] and the log-sum-exp [M, 1, h, T] in float32; arguments as in operator.py."""
    given = problem(q, k, v, neighbours, bias, query_label, key_label, order)
    patches, queries, keys, heads, width = given.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(patches, 1, heads, queries, dtype=torch.float32, device=q.device)
    constants = given.constants("forward")
    tiles = triton.cdiv(queries, constants["BT"])
    launch(
        _forward_kernel, (patches * tiles, heads),
        given.q, given.k, given.v, _or(given.neighbours, q), _or(given.order, q), given.bias, *given.label_pair(),
        out, lse, LOG2E.value / math.sqrt(width), heads, tiles, given.count, queries, keys,
        *given.strides(given.q, given.k, given.v),
        PAIRS=given.count > 1 and given.labels is None, **constants,  # with labels two do not fit the registers
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, neighbours: Tensor | None, bias: Tensor,
    query_label: Tensor | None, key_label: Tensor | None, order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and bias; arguments as in operator.py."""
    given = problem(q, k, v, neighbours, bias, query_label, key_label, order)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = torch.empty_like(lse)
    dq, dbias = _backward_of_queries(given, grad, out.contiguous(), lse, delta)
    dk, dv = _backward_of_keys(given, grad, lse, delta)
    return dq, dk, dv, dbias


def _backward_of_queries(
    given: Problem, grad: Tensor, out: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """dq and dbias; fills delta [M, 1, h, T]."""
    patches, queries, keys, heads, width = given.shape
    constants = given.constants("dq")
    tiles, one_key_tile = triton.cdiv(queries, constants["BT"]), keys <= constants["BS"]
    share = triton.cdiv(patches * tiles * heads, PROGRAMS)
    shares = triton.cdiv(patches, share)
    # Where the keys take several tiles, dq is added up in memory, and in float32.
    dtype = given.q.dtype if one_key_tile else torch.float32
    dq = torch.empty(given.q.shape, dtype=dtype, device=given.q.device)
    partial = torch.empty(shares, *given.bias.shape, dtype=torch.float32, device=given.q.device)
    launch(
        _dq_kernel, (shares * tiles, heads),
        given.q, given.k, given.v, grad, out, lse, delta, _or(given.neighbours, dq), _or(given.order, dq), given.bias,
        *given.label_pair(), dq, partial, LOG2E.value / math.sqrt(width), 1 / math.sqrt(width), heads, tiles,
        patches, share, given.count, queries, keys, *given.strides(given.q, given.k, given.v, grad),
        ONE_KEY_TILE=one_key_tile, **constants,
    )  # fmt: skip
    return dq.to(given.q.dtype), partial.sum(0).to(given.bias.dtype)


def _backward_of_keys(given: Problem, grad: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    patches, queries, keys, heads, width = given.shape
    dk, dv = (torch.empty(given.k.shape, dtype=given.k.dtype, device=given.k.device) for _ in range(2))
    constants = given.constants("dkv")
    lists = None if given.neighbours is None else inverse_lists(given.neighbours)
    slots = 0 if lists is None else len(lists.slot_row)
    partial = torch.empty(2, slots, keys, heads, width, dtype=torch.float32, device=dk.device)
    tables = (dk,) * 4 if lists is None else (lists.first, lists.query, lists.row_slot, lists.slot_row)
    launch(
        _dkv_kernel, (patches + slots, heads, triton.cdiv(keys, constants["BS"])),
        given.q, given.k, given.v, grad, lse, delta, *tables, _or(given.order, dk), given.bias, *given.label_pair(),
        dk, dv, partial, LOG2E.value / math.sqrt(width), 1 / math.sqrt(width), heads, patches, slots, queries, keys,
        *given.strides(given.q, given.k, given.v, grad), SEGMENT=SEGMENT, **constants,
    )  # fmt: skip
    if lists is not None:
        size = keys * heads * width
        block = min(1024, triton.next_power_of_2(size))
        launch(
            _combine_kernel, (slots, triton.cdiv(size, block)), lists.first, lists.row_slot, lists.slot_row, partial,
            dk, dv, patches, slots, size, SEGMENT=SEGMENT, BLOCK=block,
        )  # fmt: skip
    return dk, dv


@dataclass(frozen=True)
class InverseLists:
    """Who attends to each key patch, and how long lists are split. All int64, made without waiting for the device."""

    first: Tensor
    """[M + 1]: where the list of a key patch starts in `query`."""
    query: Tensor
    """[M * n]: query patches, by key patch, ascending."""
    row_slot: Tensor
    """[M]: slot of the first segment of a list that is split, -1 for one that is not."""
    slot_row: Tensor
    """[slots]: the key patch whose segment a slot holds, M where it is not in use."""


def inverse_lists(neighbours: Tensor) -> InverseLists:
    """Lists of neighbours [M, n] the other way round.

    There is one slot for every 16 patches, so that the memory of partial sums is bounded before anything is counted: on
    photographs about 1 % of the patches have more than SEGMENT queries. Where the slots do not suffice, the lists of
    the last patches are not split.
    """
    patches, count = neighbours.shape
    attended, places = neighbours.flatten().sort(stable=True)
    first = torch.searchsorted(attended, torch.arange(patches + 1, device=neighbours.device))
    segments = (first.diff() + (SEGMENT - 1)) // SEGMENT
    segments = segments.where(segments > 1, 0)
    slots = max(16, patches // 16)
    end = segments.cumsum(0)
    split = (segments > 0) & (end <= slots)
    row_slot = (end - segments).where(split, -1)
    # The lists that are split come first: once the slots are used up, every later end lies beyond them.
    slot = torch.arange(slots, device=neighbours.device)
    slot_row = torch.searchsorted(end, slot, right=True)
    used = slot < (segments * split).sum()
    return InverseLists(first, places // count, row_slot, slot_row.where(used, patches))


def _or(table: Tensor | None, other: Tensor) -> Tensor:
    """A table, or where there is none any other: the kernel is compiled not to read it."""
    return other if table is None else table
