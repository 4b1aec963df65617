"""The registered operator against its readable reference, closed forms and identities; float64 unless said."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kitbench.attention import operator, reference
from kitbench.attention.operator import patch_attention

Case = dict[str, Tensor | None]


def case(
    patches: int, queries: int, keys: int, heads: int, width: int, n: int, *, labels: bool, weights: bool, holes: bool
) -> Case:
    """Random arguments in which every query has a key; with holes, some pairs are forbidden by the bias."""
    q = torch.randn(patches, queries, heads, width, dtype=torch.float64)
    k, v = torch.randn(2, patches, keys, heads, width, dtype=torch.float64)
    neighbours = torch.stack([torch.randperm(patches)[:n] for _ in range(patches)])
    bias = torch.randn(heads, queries, keys, dtype=torch.float64)
    if holes:
        forbidden = torch.rand(queries, keys) < 0.5
        forbidden[:, 0] = False
        bias = bias.masked_fill(forbidden, -math.inf)
    query_label = key_label = None
    if labels:
        query_label = torch.ones(patches, queries, dtype=torch.long)
        key_label = (torch.rand(patches, keys) < 0.6).long()
        key_label[patches // 2] = 0  # a neighbour that offers no key at all
        key_label[neighbours[:, 0], 0] = 1
    share = torch.rand(patches, n, dtype=torch.float64) if weights else None
    for table in (q, k, v, bias):
        table.requires_grad_()
    return {
        "q": q,
        "k": k,
        "v": v,
        "neighbours": neighbours,
        "bias": bias,
        "query_label": query_label,
        "key_label": key_label,
        "weights": share,
    }


def gradients(out: Tensor, arguments: Case, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [arguments[name] for name in ("q", "k", "v", "bias")], upstream)


@pytest.mark.parametrize(("labels", "weights", "holes"), list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("heads", [1, 2])
def test_output_and_gradients_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, labels: bool, weights: bool, holes: bool, heads: int
) -> None:
    monkeypatch.setattr(operator, "CHUNK_LOGITS", 300)  # two or three patches at a time, and a rest
    torch.manual_seed(0)
    arguments = case(9, 6, 7, heads, 5, 3, labels=labels, weights=weights, holes=holes)
    upstream = torch.randn(9, 6, heads, 5, dtype=torch.float64)
    expected, found = reference.patch_attention(**arguments), patch_attention(**arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        gradients(found, arguments, upstream), gradients(expected, arguments, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    patches=st.integers(1, 7),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    heads=st.integers(1, 3),
    width=st.integers(1, 6),
    n=st.integers(1, 4),
    weights=st.booleans(),
)
def test_any_shape_equals_the_reference(
    patches: int, queries: int, keys: int, heads: int, width: int, n: int, weights: bool
) -> None:
    torch.manual_seed(0)
    n = min(n, patches)
    arguments = case(patches, queries, keys, heads, width, n, labels=False, weights=weights, holes=False)
    expected, found = reference.patch_attention(**arguments), patch_attention(**arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.ones_like(found)
    for ours, theirs in zip(
        gradients(found, arguments, upstream), gradients(expected, arguments, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("weights", [False, True])
def test_gradients_equal_finite_differences(weights: bool) -> None:
    torch.manual_seed(0)
    arguments = case(4, 3, 4, 2, 2, 2, labels=True, weights=weights, holes=True)
    bias = arguments["bias"].detach()
    finite = bias.isfinite()
    free = bias[finite].clone().requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor, free: Tensor) -> Tensor:
        filled = torch.full_like(bias, -math.inf).masked_scatter(finite, free)
        return patch_attention(**{**arguments, "q": q, "k": k, "v": v, "bias": filled})

    assert torch.autograd.gradcheck(attend, (arguments["q"], arguments["k"], arguments["v"], free))


def test_reference_equals_a_loop_over_queries_and_keys() -> None:
    torch.manual_seed(0)
    arguments = case(3, 2, 3, 2, 2, 2, labels=True, weights=False, holes=True)
    q, k, v, neighbours, bias, query_label, key_label = [
        table.detach() for table in arguments.values() if table is not None
    ]
    expected = torch.zeros_like(q)
    for i, p, h in itertools.product(range(3), range(2), range(2)):
        total, summed = 0.0, torch.zeros(2, dtype=torch.float64)
        for j in neighbours[i].tolist():
            for s in range(3):
                if query_label[i, p] == key_label[j, s]:
                    weight = math.exp(float(q[i, p, h] @ k[j, s, h]) / math.sqrt(2) + float(bias[h, p, s]))
                    total, summed = total + weight, summed + weight * v[j, s, h]
        expected[i, p, h] = summed / total
    torch.testing.assert_close(reference.patch_attention(**arguments), expected, rtol=0, atol=1e-12)


def test_one_softmax_is_one_for_each_neighbour_weighted_by_its_log_sum_exp() -> None:
    torch.manual_seed(0)
    arguments = case(6, 4, 5, 1, 3, 3, labels=False, weights=False, holes=False)
    q, k, v, neighbours, bias = (arguments[name] for name in ("q", "k", "v", "neighbours", "bias"))
    logits = torch.einsum("mtd,mnsd->mtns", q[:, :, 0], k[neighbours][:, :, :, 0]) / math.sqrt(3) + bias[0][:, None]
    pairs = torch.einsum("mtns,mnsd->mtnd", logits.softmax(-1), v[neighbours][:, :, :, 0])
    expected = (pairs * logits.logsumexp(-1).softmax(-1)[..., None]).sum(2)
    torch.testing.assert_close(patch_attention(**arguments)[:, :, 0], expected, rtol=0, atol=1e-12)


def test_all_patches_as_neighbours_is_global_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 4, 2, 3, dtype=torch.float64)
    everyone = torch.stack([torch.randperm(5) for _ in range(5)])
    found = patch_attention(q, k, v, everyone, torch.zeros(2, 4, 4, dtype=torch.float64))
    whole = (table.flatten(0, 1).transpose(0, 1) for table in (q, k, v))  # [h, 20, d]
    expected = F.scaled_dot_product_attention(*whole).transpose(0, 1).unflatten(0, (5, 4))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_neighbours_means_each_patch_itself() -> None:
    torch.manual_seed(0)
    arguments = case(7, 4, 5, 2, 3, 1, labels=False, weights=False, holes=False)
    arguments["neighbours"] = torch.arange(7)[:, None]
    upstream = torch.randn(7, 4, 2, 3, dtype=torch.float64)
    expected, found = patch_attention(**arguments), patch_attention(**{**arguments, "neighbours": None})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for ours, theirs in zip(
        gradients(found, arguments, upstream), gradients(expected, arguments, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_narrow_types_stay_within_their_rounding(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    arguments = case(8, 16, 16, 2, 8, 3, labels=True, weights=False, holes=False)
    narrow = {
        name: value.detach().to(dtype).requires_grad_() if value is not None and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    upstream = torch.randn(8, 16, 2, 8, dtype=torch.float64)
    expected, found = reference.patch_attention(**arguments), patch_attention(**narrow)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(
        gradients(found, narrow, upstream.to(dtype)), gradients(expected, arguments, upstream), strict=True
    ):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_the_log_sum_exp_of_narrow_types_is_exact_without_a_fused_kernel_too() -> None:
    """The backward pass subtracts it from float32 logits: products rounded to bfloat16 would be off by up to 0.1."""
    torch.manual_seed(0)
    q, k, v = (8 * torch.randn(2, 2, 5, 16, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.randn(1, 2, 5, 5, dtype=torch.bfloat16)
    out, log_sum = operator.softmax_by_products(q, k, v, mask)
    exact = q.double() @ k.double().mT / 4 + mask.double()
    torch.testing.assert_close(log_sum.double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out.double(), exact.softmax(-1) @ v.double(), rtol=0.01, atol=0.1)


def test_registration_holds_for_autograd_fake_tensors_and_compile() -> None:
    torch.manual_seed(0)
    for weights in (False, True):
        arguments = case(5, 4, 3, 2, 3, 2, labels=True, weights=weights, holes=False)
        torch.library.opcheck(torch.ops.kitbench.patch_attention.default, (*arguments.values(), None))


def test_flop_formula_is_two_products_forward_and_five_backward() -> None:
    arguments = case(5, 4, 3, 2, 3, 2, labels=False, weights=False, holes=False)
    pairs = 5 * 4 * (2 * 3) * 2 * 3  # patches, queries, keys, heads, width
    with FlopCounterMode(display=False) as counter:
        out = patch_attention(**arguments)
        assert counter.get_total_flops() == 2 * 2 * pairs
        out.sum().backward()
    assert counter.get_total_flops() == 2 * (2 + 5) * pairs


def test_nothing_that_grows_with_queries_times_keys_is_kept() -> None:
    arguments = case(64, 16, 16, 2, 4, 4, labels=False, weights=False, holes=False)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        patch_attention(**arguments)
    table = 64 * 16 * 2 * 4
    assert max(kept) <= table
    assert sum(kept) <= 4 * table + 64 * 16 * 2 + 64 * 4 + 2 * 16 * 16  # q, k, v, out; lse; neighbours; bias


def test_shapes_that_do_not_fit_are_refused_in_words() -> None:
    q = torch.zeros(3, 4, 2, 5)
    bias = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match=r"q must be \[M, T, h, d\]"):
        patch_attention(q, q[:, :, :1], q[:, :, :1], None, bias)
    with pytest.raises(ValueError, match="bias must be"):
        patch_attention(q, q, q, None, bias[:1])
    with pytest.raises(ValueError, match="go together"):
        patch_attention(q, q, q, None, bias, query_label=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="shape of neighbours"):
        patch_attention(q, q, q, None, bias, weights=torch.ones(3, 1))
