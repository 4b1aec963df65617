"""The baselines against loops over pixels, and their closed forms against torch's counter."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from kitbench.baselines import global_, local, neighbourhood, san, window
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def tokens(height: int, width: int, dim: int = 4, batch: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, height, width, dim, dtype=torch.float64)


def build(module: ModuleType, dim: int = 4, heads: int = 2, **options: object) -> nn.Module:
    torch.manual_seed(0)
    attention = module.Attention(dim, heads, **options).double()
    if hasattr(attention, "bias"):
        nn.init.normal_(attention.bias.table)
    return attention


def naive(attention: nn.Module, x: Tensor, row: Callable[[int, int, int, int], int | None]) -> Tensor:
    """Attention of one image [H, W, C] by loops: `row` of query (y, z) and key (r, c) is the bias row, -1 for none, or None."""
    height, width, dim = x.shape
    heads = attention.heads
    q, k, v = (table.unflatten(-1, (heads, -1)) for table in attention.qkv(x).chunk(3, -1))
    out = torch.zeros_like(q)
    for y, z, head in itertools.product(range(height), range(width), range(heads)):
        scores, values = [], []
        for r, c in itertools.product(range(height), range(width)):
            entry = row(y, z, r, c)
            if entry is not None:
                bias = attention.bias.table[entry, head] if entry >= 0 else 0
                scores.append(q[y, z, head] @ k[r, c, head] / math.sqrt(dim / heads) + bias)
                values.append(v[r, c, head])
        out[y, z, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return attention.proj(out.flatten(-2))


@pytest.mark.parametrize("form", ["sdpa", "materialised"])
def test_global_equals_a_loop(form: str) -> None:
    attention, x = build(global_, form=form), tokens(4, 5)
    torch.testing.assert_close(attention(x)[0], naive(attention, x[0], lambda *_: -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["registered", "sdpa"])
@pytest.mark.parametrize("size", [(9, 9), (8, 5), (2, 7)])
@pytest.mark.parametrize("shift", [False, True])
def test_window_equals_a_loop(form: str, size: tuple[int, int], shift: bool) -> None:
    attention, x = build(window, shift=shift, window=3, form=form), tokens(*size)
    step = [1 if shift and extent > 3 else 0 for extent in size]

    def row(y: int, z: int, r: int, c: int) -> int | None:
        # Swin's shifted windows are the plain grid moved by -step, cut off at the borders of the image.
        mine, other = ((y - step[0]) // 3, (z - step[1]) // 3), ((r - step[0]) // 3, (c - step[1]) // 3)
        return (y - r + 2) * 5 + (z - c + 2) if mine == other else None

    torch.testing.assert_close(attention(x)[0], naive(attention, x[0], row), rtol=0, atol=1e-12)


def test_both_forms_of_window_have_the_same_gradients() -> None:
    x = tokens(10, 7, batch=2)
    results = []
    for form in ("registered", "sdpa"):
        attention = build(window, shift=True, window=4, form=form)
        attention(x).square().sum().backward()
        results.append([parameter.grad for parameter in attention.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(9, 9), (8, 8), (3, 10)])
def test_local_equals_a_loop(size: tuple[int, int]) -> None:
    attention, x = build(local, size=5), tokens(*size)

    def row(y: int, z: int, r: int, c: int) -> int | None:
        return (r - y + 2) * 5 + (c - z + 2) if abs(r - y) <= 2 and abs(c - z) <= 2 else None

    torch.testing.assert_close(attention(x)[0], naive(attention, x[0], row), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(9, 9), (20, 3), (2, 18)])
def test_neighbourhood_equals_a_loop(size: tuple[int, int]) -> None:
    attention, x = build(neighbourhood, size=5), tokens(*size)

    def inside(query: int, key: int, extent: int) -> bool:
        side = min(5, extent)
        first = min(max(query - side // 2, 0), extent - side)
        return first <= key < first + side

    def row(y: int, z: int, r: int, c: int) -> int | None:
        return -1 if inside(y, r, size[0]) and inside(z, c, size[1]) else None

    torch.testing.assert_close(attention(x)[0], naive(attention, x[0], row), rtol=0, atol=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("natten") is None, reason="the natten package is not installed")
def test_neighbourhood_equals_the_natten_package() -> None:
    x = tokens(20, 33, batch=2).float()
    expected = build(neighbourhood, form="natten").float()(x)
    torch.testing.assert_close(build(neighbourhood).float()(x), expected, rtol=1e-4, atol=1e-5)


def test_neighbourhood_without_natten_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "natten", None)
    with pytest.raises(ValueError, match="use form 'sdpa'"):
        build(neighbourhood, form="natten")


def test_san_equals_a_loop() -> None:
    attention, x = build(san, dim=16, size=3), tokens(4, 5, dim=16)
    phi, psi, value = attention.phi(x)[0], attention.psi(x)[0], attention.value(x)[0]
    out = torch.zeros_like(value)
    for y, z in itertools.product(range(4), range(5)):
        logits, values = [], []
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            r, c = y + down, z + right
            if 0 <= r < 4 and 0 <= c < 5:
                pair = torch.cat([phi[y, z] - psi[r, c], torch.tensor([down, right], dtype=torch.float64)])
                logits.append(attention.weigh(attention.expand(pair.relu()).relu()))
                values.append(value[r, c])
        weights = torch.stack(logits).softmax(0).repeat_interleave(san.SHARE, dim=1)
        out[y, z] = (weights * torch.stack(values)).sum(0)
    torch.testing.assert_close(attention(x)[0], attention.proj(out), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (global_, {"form": "materialised"}),
        (window, {"form": "registered", "shift": True}),
        (local, {}),
    ],
)
@pytest.mark.parametrize("size", [(16, 24), (13, 9)])
def test_closed_form_equals_what_torch_counts(module: ModuleType, options: dict, size: tuple[int, int]) -> None:
    attention = module.Attention(8, 2, **options)
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, *size, 8))
    assert counter.get_total_flops() == 2 * attention.macs(*size)


def test_closed_form_of_san_is_what_torch_counts_and_the_weighted_sums() -> None:
    attention = san.Attention(16, 2)
    with FlopCounterMode(display=False) as counter:
        attention(torch.randn(1, 9, 10, 16))
    assert attention.macs(9, 10) == counter.get_total_flops() // 2 + 9 * 10 * 49 * 16


@pytest.mark.parametrize("module", [global_, window, local, neighbourhood])
def test_heads_that_do_not_divide_are_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="heads must divide dim"):
        module.Attention(4, 3)
    if module in (local, neighbourhood):
        with pytest.raises(ValueError, match="size must be odd"):
            module.Attention(4, 2, size=2)


def test_other_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1"):
        window.Attention(4, 2, window=0)
    with pytest.raises(ValueError, match="multiple of 8"):
        san.Attention(12, 2)
    with pytest.raises(ValueError, match="size must be odd"):
        san.Attention(16, 2, size=0)
