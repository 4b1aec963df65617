"""KiT as a module: identities with window and global attention, padding, shift, randomness, cost."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kitbench.baselines import global_, kit_random, window
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kitbench.attention import kit, layout, retrieval


def build(dim: int = 4, heads: int = 2, **options: object) -> kit.Attention:
    torch.manual_seed(0)
    module = kit.Attention(dim, heads, **options).double().eval()
    torch.nn.init.normal_(module.bias.table)
    return module


def tokens(batch: int, height: int, width: int, dim: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, height, width, dim, dtype=torch.float64)


def naive(module: kit.Attention, x: Tensor, offset: Callable[[int, int, int, int], int | None]) -> Tensor:
    """KiT of one image [H, W, C] by loops over pixels; `offset` gives the row of the bias table of a query and a key."""
    height, width, dim = x.shape
    patch, heads = module.patch, module.heads
    patches = layout.cut(x[None], patch)
    real = layout.real_positions(height, width, patch, 0, x.device)
    found, weights, _ = module.neighbours(patches, real)
    columns = layout.grid(height, width, patch)[1]
    q, k, v = (table.unflatten(-1, (heads, -1)) for table in module.qkv(x).chunk(3, -1))
    out = torch.zeros_like(q)
    for y, z, head in itertools.product(range(height), range(width), range(heads)):
        mine = y // patch * columns + z // patch
        pairs = []
        for neighbour in found[0, mine].tolist():
            top, left = neighbour // columns * patch, neighbour % columns * patch
            scores, values = [], []
            for r, c in itertools.product(range(height), range(width)):
                row = offset(y % patch, z % patch, r - top, c - left)
                if row is not None:
                    scores.append(q[y, z, head] @ k[r, c, head] / math.sqrt(dim / heads) + module.bias.table[row, head])
                    values.append(v[r, c, head])
            pairs.append((torch.stack(scores), torch.stack(values)) if scores else None)
        offered = [n for n, pair in enumerate(pairs) if pair is not None]
        if weights is None:
            share = torch.stack([pairs[n][0].logsumexp(0) for n in offered]).softmax(0)
        else:
            share = weights[mine, offered] / weights[mine, offered].sum()
        for part, n in zip(share, offered, strict=True):
            out[y, z, head] += part * (pairs[n][0].softmax(0) @ pairs[n][1])
    return module.proj(out.flatten(-2))


@pytest.mark.parametrize("aggregate", ["similarity", "mean", "descriptor"])
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
def test_whole_patches_equal_a_loop_over_pixels(aggregate: str, size: tuple[int, int]) -> None:
    module = build(patch=3, k=3, retrieval="exact", aggregate=aggregate)

    def offset(y: int, z: int, r: int, c: int) -> int | None:
        return (y - r + 2) * 5 + (z - c + 2) if 0 <= r < 3 and 0 <= c < 3 else None

    x = tokens(1, *size)
    torch.testing.assert_close(module(x)[0], naive(module, x[0], offset), rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregate", ["similarity", "mean", "descriptor"])
@pytest.mark.parametrize("size", [(6, 6), (4, 7)])
def test_aligned_neighbourhoods_equal_a_loop_over_pixels(aggregate: str, size: tuple[int, int]) -> None:
    module = build(patch=3, k=3, retrieval="exact", aggregate=aggregate, support="aligned", size=3)

    def offset(y: int, z: int, r: int, c: int) -> int | None:
        down, right = r - y + 1, c - z + 1
        return down * 3 + right if 0 <= down < 3 and 0 <= right < 3 else None

    x = tokens(1, *size)
    torch.testing.assert_close(module(x)[0], naive(module, x[0], offset), rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), height=st.integers(1, 21), width=st.integers(1, 21), k=st.integers(1, 5))
def test_any_height_and_width_keep_shape_and_treat_images_apart(batch: int, height: int, width: int, k: int) -> None:
    module = build(patch=4, k=k, retrieval="lsh", chunk=5, shift=True, rounds=2)
    x = tokens(batch, height, width)
    y = module(x)
    assert y.shape == x.shape
    alone = torch.cat([module(image[None]) for image in x])
    torch.testing.assert_close(y, alone, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 13), width=st.integers(1, 13))
def test_one_neighbour_is_window_attention(height: int, width: int) -> None:
    module = build(patch=4, k=1)
    other = window.Attention(4, 2, window=4).double()
    other.load_state_dict({name: value for name, value in module.state_dict().items() if name != "rotations"})
    x = tokens(2, height, width)
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 13), width=st.integers(1, 13))
def test_all_patches_as_neighbours_are_global_attention(height: int, width: int) -> None:
    module = build(patch=4, k=16, chunk=16)
    torch.nn.init.zeros_(module.bias.table)
    other = global_.Attention(4, 2).double()
    shared = other.state_dict().keys()
    other.load_state_dict({name: value for name, value in module.state_dict().items() if name in shared})
    x = tokens(2, height, width)
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=1e-12)


def test_shift_is_a_roll_of_the_map() -> None:
    shifted, plain = build(patch=4, k=2, shift=True), build(patch=4, k=2)
    x = tokens(1, 10, 12)
    expected = plain(x.roll((-2, -2), (1, 2))).roll((2, 2), (1, 2))
    torch.testing.assert_close(shifted(x), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"support": "aligned"}, {"aggregate": "mean"}, {"retrieval": "random"}])
def test_gradients_of_the_module_equal_finite_differences(options: dict[str, str]) -> None:
    module = build(patch=2, k=2, **options)
    x = tokens(1, 3, 4).requires_grad_()
    table = module.bias.table.detach().clone().requires_grad_()

    def attend(x: Tensor, table: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"bias.table": table}, (x,))

    # The neighbours must not change under the small steps: they do not, since no gradient flows through the search.
    assert torch.autograd.gradcheck(attend, (x, table), eps=1e-6)


@pytest.mark.parametrize("search", ["lsh", "chunk-only", "random"])
def test_training_draws_anew_from_the_seed_and_evaluation_is_fixed(search: str) -> None:
    module = build(patch=2, k=4, chunk=4, rounds=1, retrieval=search)
    x = tokens(2, 24, 24)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)

    assert torch.equal(drawn(0), drawn(1))
    module.train()
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    torch.manual_seed(0)
    first = module(x[:1])
    torch.testing.assert_close(first, drawn(0)[:1], rtol=0, atol=1e-12)  # the draw does not depend on the batch


def test_evaluation_draws_travel_with_the_weights() -> None:
    for search in ("lsh", "random"):
        module = build(patch=2, k=4, chunk=4, rounds=1, retrieval=search)
        torch.manual_seed(7)
        other = kit.Attention(4, 2, patch=2, k=4, chunk=4, rounds=1, retrieval=search).double().eval()
        x = tokens(1, 24, 24)
        assert not torch.equal(module(x), other(x))
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(x), other(x))


def test_random_control_is_kit_with_random_patches_for_all_images_alike() -> None:
    torch.manual_seed(0)
    control = kit_random.Attention(4, 2, patch=2, k=3).double().eval()
    patches = layout.cut(tokens(3, 8, 8), 2)
    found = control.neighbours(patches, None).neighbours
    assert (found == found[:1]).all()
    assert torch.equal(found[0], retrieval.random_neighbours(16, 3, control.salt))
    assert control.macs(8, 8) == build(patch=2, k=3, retrieval="exact").macs(8, 8) - 16 * 16 * 4


def test_followers_reuse_the_neighbours_of_the_block_before() -> None:
    first, second = build(patch=2, k=3, reuse=True), build(patch=2, k=3, reuse=True)
    second.follow(first)
    x, other = tokens(1, 8, 8), tokens(1, 8, 8).flip(1)
    with pytest.raises(RuntimeError, match="has not run yet"):
        second(x)
    first(x)
    expected = first.neighbours(layout.cut(x, 2), None).neighbours
    found = second.neighbours(layout.cut(other, 2), None).neighbours
    assert torch.equal(found, expected)
    assert first.macs(8, 8) - second.macs(8, 8) == 16 * 16 * 4
    assert [name for name, _ in second.named_modules()] == [name for name, _ in first.named_modules()]
    pair = copy.deepcopy(torch.nn.ModuleList([first, second]))
    assert pair[1].leader == (pair[0],)
    alone = build(patch=2, k=3)
    alone.follow(first)
    assert alone.leader == ()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retrieval": "exact", "descriptor": "flat"},
        {"retrieval": "chunk-only", "chunk": 8},
        {"retrieval": "random", "aggregate": "mean"},
        {"chunk": 8, "rounds": 2, "k": 2},
        {"support": "aligned", "size": 5},
        {"aggregate": "descriptor"},
    ],
)
@pytest.mark.parametrize("size", [(64, 64), (33, 50)])
def test_closed_form_equals_what_torch_counts(options: dict[str, object], size: tuple[int, int]) -> None:
    module = kit.Attention(8, 2, patch=4, **options).eval()
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, *size, 8))
    counted = counter.get_total_flops() // 2
    # einsum writes a sum over one axis as a product when it can: the descriptors of padded maps are counted, not charged.
    assert 0 <= counted - module.macs(*size) <= (size[0] + 3) * (size[1] + 3) * 8


def test_linear_in_the_number_of_pixels() -> None:
    module = kit.Attention(32, 1)
    assert module.macs(2048, 2048) / module.macs(1024, 1024) == pytest.approx(4, rel=0.01)


def test_compiles_without_graph_breaks() -> None:
    module = kit.Attention(8, 2, patch=4, chunk=8, k=3).train()
    x = torch.randn(2, 32, 30, 8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    expected = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected)


def test_autocast_gives_bfloat16_near_the_float32_result() -> None:
    torch.manual_seed(0)
    module = kit.Attention(16, 2, patch=4).eval()
    x = torch.randn(1, 32, 32, 16)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = module(x)
        narrow.float().sum().backward()
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), module(x), rtol=0.05, atol=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_report_of_exact_retrieval_is_full_recall() -> None:
    x = tokens(1, 64, 64)
    report = kit.retrieval_report(build(patch=4, retrieval="exact"), x)
    assert (report["recall"], report["patches"], report["k"]) == (1.0, 256, 4)
    hashed = kit.retrieval_report(build(patch=4, chunk=8, shift=True), x)
    assert report["chance"] < hashed["recall"] < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads must divide dim"),
        ({"patch": 0}, "patch must be at least 1"),
        ({"k": 0}, "k must be at least 1"),
        ({"k": 40}, "chunk must be at least k"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"size": 4}, "size must be odd"),
    ],
)
def test_settings_out_of_range_are_refused_in_words(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kit.Attention(**{"dim": 4, "heads": 2, **options})
