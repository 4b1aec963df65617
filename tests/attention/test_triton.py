"""The Triton kernels against the readable reference: in Triton's interpreter where there is no GPU, on the GPU where there
is one.

conftest.py turns the interpreter on where there is no CUDA device. What the kernels need of a real GPU (shared memory,
registers) is tested in test_compiled.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kitbench.attention import reference
from kitbench.attention.operator import gather_reason, patch_attention

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")

# Patches, queries, keys, heads, width, neighbours (0: each patch itself), labels, order.
SHAPES: list[tuple[int, int, int, int, int, int, bool, bool]] = [
    (5, 16, 16, 1, 16, 2, False, False),
    (6, 9, 25, 2, 5, 3, True, True),
    (4, 16, 100, 1, 8, 2, True, False),
    (3, 4, 4, 2, 32, 1, False, True),
    (9, 16, 16, 2, 16, 4, True, True),
    (12, 1, 3, 1, 16, 3, False, False),
    (3, 64, 64, 1, 32, 2, False, True),
    (2, 100, 36, 2, 24, 2, True, False),
    (2, 81, 81, 1, 64, 0, True, False),
    (3, 64, 196, 1, 16, 0, True, False),
    (2, 256, 256, 1, 16, 0, False, False),
    (3, 7, 130, 1, 48, 3, False, True),
    (2, 65, 65, 1, 128, 2, False, False),
]
# At the size of real launches: every number of queries and width that suites and benchmarks use.
LARGE = [(64, queries, queries, 2, width, 4, False, True) for queries in (64, 256) for width in (16, 32, 64, 128)]
TOLERANCE = {"float32": 1e-5, "tf32": 3e-3, "bfloat16": 2e-2}


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter holds bfloat16 as uint16 and multiplies the bits as integers: multiply the numbers instead."""
    if HAS_CUDA:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle: Any) -> np.ndarray:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        return TensorHandle(np.matmul(numbers(a), numbers(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield


def arguments(
    patches: int, queries: int, keys: int, heads: int, width: int, n: int, labels: bool, order: bool
) -> dict[str, Any]:
    """Random arguments of patch_attention in float64, those that take a gradient as leaves."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(patches, queries, heads, width, generator=random, dtype=torch.float64)
    k, v = torch.randn(2, patches, keys, heads, width, generator=random, dtype=torch.float64)
    neighbours = torch.stack([torch.randperm(patches, generator=random)[: n or 1] for _ in range(patches)])
    if n == 0:
        neighbours = torch.arange(patches)[:, None]
    bias = torch.randn(heads, queries, keys, generator=random, dtype=torch.float64)
    bias[:, :, 1::3] = -torch.inf
    built: dict[str, Any] = {"q": q, "k": k, "v": v, "neighbours": neighbours, "bias": bias}
    if labels:
        built["query_label"] = torch.ones(patches, queries, dtype=torch.bool)
        built["key_label"] = torch.rand(patches, keys, generator=random) < 0.6
        built["key_label"][neighbours[:, 0], 0] = True
    if order:
        built["order"] = torch.randperm(patches, generator=random)
    return built


def expected(built: dict[str, Any], upstream: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of q, k, v, bias, by the reference in float64."""
    leaves = {name: built[name].detach().requires_grad_() for name in ("q", "k", "v", "bias")}
    out = reference.patch_attention(**{**{k: v for k, v in built.items() if k != "order"}, **leaves})
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream)


def by_kernels(built: dict[str, Any], upstream: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same by the kernels: through the operator on a GPU, called by hand in the interpreter."""
    moved = {name: table.to(DEVICE) for name, table in built.items()}
    moved |= {name: moved[name].to(dtype) for name in ("q", "k", "v")} | {"bias": moved["bias"].float()}
    upstream = upstream.to(DEVICE, dtype)
    if torch.equal(built["neighbours"][:, 0], torch.arange(len(built["q"]))) and built["neighbours"].shape[1] == 1:
        moved["neighbours"] = None  # each patch itself
    if HAS_CUDA:
        leaves = [moved[name].requires_grad_() for name in ("q", "k", "v", "bias")]
        assert gather_reason(moved["q"]) is None
        out = patch_attention(**moved)
        found = (out.detach(), *torch.autograd.grad(out, leaves, upstream))
    else:
        from kitbench.attention import triton_launch

        given = {"query_label": None, "key_label": None, "order": None} | moved
        out, lse = triton_launch.forward(**given)
        found = (out, *triton_launch.backward(grad=upstream, out=out, lse=lse, **given))
    return tuple(table.double().cpu() for table in found)


def assert_near(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for name, ours, theirs in zip(("out", "dq", "dk", "dv", "dbias"), found, wanted, strict=True):
        error = (ours - theirs).norm() / theirs.norm().clamp(min=1)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"  # NaN fails too


def compare(shape: tuple[int, int, int, int, int, int, bool, bool], kind: str) -> None:
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    built = arguments(*shape)
    # The reference sees the same rounded numbers.
    built |= {name: built[name].to(dtype).double() for name in ("q", "k", "v")} | {
        "bias": built["bias"].float().double()
    }
    upstream = torch.randn(built["q"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = upstream.to(dtype).double()
    assert_near(by_kernels(built, upstream, dtype), expected(built, upstream), TOLERANCE[kind])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_the_reference(shape: tuple[int, int, int, int, int, int, bool, bool], kind: str) -> None:
    compare(shape, kind)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_kernels_equal_the_reference_on_the_gpu(
    shape: tuple[int, int, int, int, int, int, bool, bool], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
    compare(shape, kind)


@pytest.mark.parametrize("popular", [1, 3, 8])
def test_lists_of_popular_patches_are_cut_and_added_up(popular: int) -> None:
    # Lists of 48, 16 and 6 queries and their own: 7 segments, 3 times 3, and 24 that need no cut.
    built = arguments(48, 2, 2, 1, 16, 2, False, False)
    built["neighbours"] = torch.stack([torch.arange(48), (torch.arange(48) + 1) % popular], 1)
    upstream = torch.randn(built["q"].shape, dtype=torch.float64)
    assert_near(by_kernels(built, upstream, torch.float32), expected(built, upstream), TOLERANCE["float32"])


def test_where_the_slots_do_not_suffice_lists_are_added_up_whole() -> None:
    from kitbench.attention.triton_launch import inverse_lists

    built = arguments(36, 2, 2, 1, 16, 4, False, False)  # each of 12 patches is attended by 10: 24 segments, 16 slots
    built["neighbours"] = torch.stack([torch.arange(36), *((torch.arange(36) + j) % 4 + 4 * j for j in range(3))], 1)
    lists = inverse_lists(built["neighbours"])
    assert 0 < (lists.row_slot >= 0).sum() < (lists.first.diff() > 8).sum()
    upstream = torch.randn(built["q"].shape, dtype=torch.float64)
    assert_near(by_kernels(built, upstream, torch.float32), expected(built, upstream), TOLERANCE["float32"])


@pytest.mark.parametrize("popular", [1, 3, 40, 300])
def test_inverse_lists_hold_every_query_once(popular: int) -> None:
    from kitbench.attention.triton_launch import SEGMENT, inverse_lists

    neighbours = torch.stack([torch.arange(300), (torch.arange(300) + 1) % popular], 1)
    lists = inverse_lists(neighbours)
    for row in range(300):
        start, end = lists.first[row : row + 2].tolist()
        assert lists.query[start:end].tolist() == (neighbours == row).nonzero()[:, 0].tolist()
        held = (lists.slot_row == row).nonzero()[:, 0].tolist()
        if lists.row_slot[row] < 0:
            assert not held
        else:
            assert held == list(range(held[0], held[0] + -(-(end - start) // SEGMENT)))
            assert held[0] == lists.row_slot[row]
            assert len(held) > 1
    if popular == 40:
        assert (lists.row_slot >= 0).any()


def test_equal_inputs_give_equal_bits() -> None:
    built = arguments(8, 4, 4, 1, 16, 4, True, True)
    upstream = torch.randn(built["q"].shape, dtype=torch.float64)
    first, second = (by_kernels(built, upstream, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_order_of_the_patches_changes_no_bit_of_what_a_patch_gets() -> None:
    built = arguments(8, 4, 4, 1, 16, 4, True, True)
    upstream = torch.randn(built["q"].shape, dtype=torch.float64)
    ordered = by_kernels(built, upstream, torch.float32)
    plain = by_kernels({k: v for k, v in built.items() if k != "order"}, upstream, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(ordered[:4], plain[:4], strict=True))


@pytest.mark.parametrize("form", ["head-major", "thirds", "transposed"])
def test_tables_are_read_as_they_lie_in_memory(form: str) -> None:
    built = arguments(6, 16, 16, 2, 16, 3, False, False)
    upstream = torch.randn(built["q"].shape, dtype=torch.float64)
    wanted = by_kernels(built, upstream, torch.float32)
    if form == "head-major":  # [h, M, T, d] in memory
        laid = {name: built[name].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for name in "qkv"}
    elif form == "thirds":  # of one projection [M, T, 3, h, d]
        laid = dict(zip("qkv", torch.stack([built[name] for name in "qkv"], 2).unbind(2), strict=True))
    else:  # numbers of a head apart: the one form that is copied first
        laid = {name: built[name].mT.contiguous().mT for name in "qkv"}
    assert not any(table.is_contiguous() for table in laid.values())
    found = by_kernels({**built, **laid}, upstream.mT.contiguous().mT, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_every_element_of_the_results_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        table = real(*size, **options)
        return table.fill_(torch.nan) if table.is_floating_point() else table

    built = arguments(12, 9, 25, 2, 5, 3, True, True)
    built["neighbours"][:, 1] = torch.where(built["neighbours"][:, 0] == 7, 8, 7)  # others are attended by nobody
    built["neighbours"][:, 2] = torch.where(built["neighbours"][:, 0] == 9, 10, 9)
    built["key_label"][:] = True
    upstream = torch.randn(built["q"].shape, dtype=torch.float64)
    wanted = expected(built, upstream)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert_near(by_kernels(built, upstream, torch.float32), wanted, TOLERANCE["float32"])


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("weighted", [False, True])
def test_gather_path_on_cuda_equals_the_reference(weighted: bool) -> None:
    built = arguments(6, 9, 25, 2, 5, 3, True, False)
    built = {name: table.cuda() for name, table in built.items()}
    if weighted:
        built["weights"] = torch.rand(6, 3, device="cuda", dtype=torch.float64)
    assert "float64" in str(gather_reason(built["q"]))
    torch.testing.assert_close(patch_attention(**built), reference.patch_attention(**built), rtol=0, atol=1e-10)


def test_gather_path_says_why_it_is_taken() -> None:
    assert "need CUDA" in str(gather_reason(torch.zeros(2, 4, 1, 8)))
