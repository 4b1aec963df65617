"""NLSN, CATANet, ATD and IPG against loops over positions, their costs, and what they keep in their state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from kitbench.baselines import graph, nlsn
from torch import Tensor, nn

from kitbench.attention import chunks
from kitbench.attention.selection import nth_largest
from kitbench.cost.flops import count_module
from kitbench.cost.second_counter import count_fvcore
from kitbench.errors import InputError, Interrupted
from kitbench.model import methods
from kitbench.runs.checkpoint import state_sha256
from tests.runs.test_train import trained

NAMES = ("nlsn", "centres", "categories", "graph")
SMALL = {
    "nlsn": {"rounds": 3, "chunk": 20},
    "centres": {"centres": 7, "group": 24},
    "categories": {"entries": 9, "chunk": 25},
    "graph": {"k": 6, "tile": 4, "halo": 2, "grid": 3},
}
"""Settings with which 13 x 17 positions fill several chunks and the start of another one."""


def build(name: str, dim: int = 6, heads: int = 2, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return methods.load_method(name).build(dim, heads, False, **settings).double().eval()


def tokens(height: int, width: int, dim: int = 6, batch: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, height, width, dim, dtype=torch.float64)


def softmax(q: Tensor, k: Tensor, v: Tensor, chosen: Sequence[int]) -> Tensor:
    """One query [h, d] over chosen rows of k and v [N, h, d], repeats as often as they stand: [h, d]."""
    logits = torch.einsum("hd,nhd->nh", q, k[list(chosen)]) / math.sqrt(q.shape[-1])
    return torch.einsum("nh,nhd->hd", logits.softmax(0), v[list(chosen)])


def company(labels: Sequence[int], chunk: int, before: int, after: int) -> list[list[int]]:
    """Whom each token attends: sorted by label and place, its chunk of ranks and those around it, on a circle."""
    ranked = sorted(range(len(labels)), key=lambda token: (labels[token], token))
    found: list[list[int]] = [[] for _ in labels]
    for rank, token in enumerate(ranked):
        first = rank // chunk * chunk
        reached = {other % len(ranked) for other in range(first - before * chunk, first + (after + 1) * chunk)}
        found[token] = [ranked[other] for other in sorted(reached)]
    return found


def naive_nlsn(module: nn.Module, x: Tensor) -> Tensor:
    match = module.match(x)
    q, v = (table.unflatten(-1, (module.heads, -1)) for table in (match, module.value(x)))
    k = q / q.square().sum(-1, keepdim=True).sqrt()
    buckets = len(x) // module.chunk // 2 * 2
    heard: list[list[int]] = [[] for _ in x]
    for rotation in module.rotations if len(x) > 3 * module.chunk else module.rotations[:1]:
        sides = (match @ rotation[:, : max(1, buckets // 2)]).tolist()
        codes = [int(np.argmax(row + [-side for side in row])) for row in sides]
        for token, others in enumerate(company(codes, module.chunk, 1, 1)):
            heard[token] += others
    out = [softmax(q[i] * math.sqrt(q.shape[-1]), k, v, heard[i]) for i in range(len(x))]
    return module.proj(torch.stack(out).flatten(1))


def naive_centres(module: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (table.unflatten(-1, (module.heads, -1)) for table in module.qkv(x).chunk(3, -1))
    centre_k, centre_v = (
        table.unflatten(-1, (module.heads, -1)) for table in module.centre_kv(module.centres).chunk(2, -1)
    )
    cosines = nn.functional.cosine_similarity(x[:, None], module.centres[None], dim=-1)
    heard = company(cosines.argmax(1).tolist(), module.group, 0, 1)
    every = range(len(module.centres))
    out = [softmax(q[i], k, v, heard[i]) + softmax(q[i], centre_k, centre_v, every) for i in range(len(x))]
    return module.proj(torch.stack(out).flatten(1))


def naive_categories(module: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (table.unflatten(-1, (module.heads, -1)) for table in module.qkv(x).chunk(3, -1))
    entries = module.dictionary
    cosines = nn.functional.cosine_similarity(module.query(x)[:, None], module.key(entries)[None], dim=-1)
    shares = (cosines * (1 + module.sharpness * math.log(len(entries)))).softmax(1)
    heard = company(shares.argmax(1).tolist(), module.chunk, 0, 0)
    looked_up = [
        sum(shares[i, entry] * module.value(entries[entry]) for entry in range(len(entries))) for i in range(len(x))
    ]
    out = [softmax(q[i], k, v, heard[i]) for i in range(len(x))]
    return module.proj(torch.stack(out).flatten(1)) + torch.stack(looked_up)


def naive_graph(module: nn.Module, x: Tensor, height: int, width: int) -> Tensor:
    q, k, v = (table.unflatten(-1, (module.heads, -1)) for table in module.qkv(x).chunk(3, -1))
    places = list(itertools.product(range(height), range(width)))
    plain = {place: x[i].detach() for i, place in enumerate(places)}
    detail = []
    for y, z in places:
        block = [p for p in itertools.product((y // 2 * 2, y // 2 * 2 + 1), (z // 2 * 2, z // 2 * 2 + 1)) if p in plain]
        detail.append(float((plain[y, z] - sum(plain[p] for p in block) / len(block)).abs().sum()))
    by_detail = sorted(range(len(places)), key=detail.__getitem__)
    degree = {token: 1 + (2 * rank + 1) * (2 * module.k - 1) // (2 * len(x)) for rank, token in enumerate(by_detail)}
    middle = [
        [(2 * i + 1) * side // (2 * min(module.grid, side)) for i in range(min(module.grid, side))]
        for side in (height, width)
    ]
    out = []
    for i, (y, z) in enumerate(places):
        top, left = y // module.tile * module.tile, z // module.tile * module.tile
        reach = range(-module.halo, module.tile + module.halo)
        sample = {(top + r, left + c) for r in reach for c in reach} | set(itertools.product(*middle))
        others = [j for j, place in enumerate(places) if place in sample]
        near = nn.functional.cosine_similarity(x[i].detach(), x[others].detach()).tolist()
        cosine = {j: 2.0 if j == i else value for j, value in zip(others, near, strict=True)}
        out.append(softmax(q[i], k, v, sorted(others, key=lambda j: -cosine[j])[: degree[i]]))
    return module.proj(torch.stack(out).flatten(1))


def naive(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """The attention of one image [1, H, W, C] by loops over positions."""
    flat = x[0].flatten(0, 1)
    if name == "graph":
        out = naive_graph(module, flat, *x.shape[1:3])
    else:
        loops: dict[str, Callable[[nn.Module, Tensor], Tensor]]
        loops = {"nlsn": naive_nlsn, "centres": naive_centres, "categories": naive_categories}
        out = loops[name](module, flat)
    return out.view(x.shape)


def with_gradients(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of an uneven sum over it with respect to the input and all parameters."""
    x = x.clone().requires_grad_()
    y = call(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    return y.detach(), list(torch.autograd.grad(loss, [x, *module.parameters()]))


@pytest.mark.parametrize("size", [(13, 17), (3, 5)])  # the second is smaller than one chunk, window and grid
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_over_positions_gives_the_same_output_and_gradients(name: str, size: tuple[int, int]) -> None:
    module, x = build(name, **SMALL[name]), tokens(*size)
    found, slopes = with_gradients(module, x, module)
    expected, expected_slopes = with_gradients(module, x, lambda x: naive(name, module, x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for slope, wanted in zip(slopes, expected_slopes, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_notices_another_grouping(name: str) -> None:
    """The comparison above would fail for a neighbouring setting: the maps are large enough for it to matter."""
    x, other = (
        tokens(13, 17),
        {"nlsn": {"chunk": 19}, "centres": {"group": 23}, "categories": {"chunk": 24}, "graph": {"k": 5}},
    )
    module, neighbour = (build(name, **SMALL[name] | change) for change in ({}, other[name]))
    assert float((module(x) - neighbour(x)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_restored_alike_alone_in_a_batch_and_twice(name: str) -> None:
    module, x = build(name, **SMALL[name]), tokens(13, 17, batch=2)
    together = module(x)
    assert torch.equal(together, module(x))
    torch.testing.assert_close(together, torch.cat([module(x[:1]), module(x[1:])]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
@pytest.mark.parametrize("name", NAMES)
def test_default_settings_take_maps_of_a_few_positions(name: str, size: tuple[int, int]) -> None:
    module, x = build(name), tokens(*size, batch=2)
    for mode in (False, True):
        assert module.train(mode)(x).isfinite().all()


@pytest.mark.parametrize("size", [(13, 17), (37, 41), (5, 99)])
@pytest.mark.parametrize("name", NAMES)
def test_closed_form_equals_both_counts(name: str, size: tuple[int, int]) -> None:
    module = methods.load_method(name).build(16, 2, False, **SMALL[name]).eval()
    counted = count_module(module, (1, *size, 16))
    assert (counted.macs, counted.uncounted) == (module.macs(*size), {})
    if size == (13, 17):
        assert count_module(module, (1, *size, 16), inside=True).macs == module.macs(*size)  # as the sweep does
        assert count_fvcore(module, torch.zeros(1, *size, 16)) == (module.macs(*size), set())


@pytest.mark.parametrize("name", NAMES)
def test_cost_is_linear_in_the_number_of_positions(name: str) -> None:
    module = methods.load_method(name).build(32, 2, False)
    for side in (32, 64, 128, 256, 512):
        assert math.log(module.macs(2 * side, 2 * side) / module.macs(side, side), 4) <= 1.1


@pytest.mark.parametrize("name", NAMES)
def test_what_a_module_draws_and_learns_is_in_its_state(name: str, tmp_path: Path) -> None:
    module, x = build(name, **SMALL[name]), tokens(13, 17)
    module.train()(x)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "state.safetensors")
    torch.manual_seed(5)
    other = methods.load_method(name).build(6, 2, False, **SMALL[name]).double()
    before = other.eval()(x)
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(x), module.eval()(x))
    assert not torch.equal(other(x), before)


def test_hashes_are_drawn_in_training_and_kept_in_evaluation() -> None:
    module, x = build("nlsn", **SMALL["nlsn"]).train(), tokens(13, 17)
    kept = module.rotations.clone()
    first = module(x)
    assert not torch.equal(first, module(x))
    assert torch.equal(kept, module.rotations)


def test_the_rows_that_a_gpu_asks_for_change_no_result_of_nlsn(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = build("nlsn", **SMALL["nlsn"]), tokens(13, 17)
    assert module.spare(torch.device("cuda")) == 8 - 6 // 2
    expected = module(x)
    monkeypatch.setattr(nlsn.Attention, "spare", lambda self, device: 5)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-13)


def refined(x: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Spherical k-means by loops: unit means of the unit tokens nearest to each centre; empty ones stay."""
    unit = [token / token.square().sum().sqrt() for token in x.flatten(0, 2)]
    centres = centres / centres.square().sum(1, keepdim=True).sqrt()
    for _ in range(iterations):
        members: list[list[Tensor]] = [[] for _ in centres]
        for token in unit:
            members[int((centres @ token).argmax())].append(token)
        means = [torch.stack(own).sum(0) if own else centre for own, centre in zip(members, centres, strict=True)]
        centres = torch.stack([mean / mean.square().sum().sqrt() for mean in means])
    return centres


def test_centres_move_as_a_moving_average_of_spherical_k_means_in_training_alone() -> None:
    module, x = build("centres", centres=5, group=24, iterations=2, decay=0.9), tokens(13, 17, batch=2)
    start = module.centres.clone()
    module(x)
    assert torch.equal(module.centres, start)
    module.train()
    module(x)
    first = refined(x, start, 2)
    torch.testing.assert_close(module.centres, first, rtol=0, atol=1e-12)  # at the first step all the way
    later = tokens(13, 17, batch=3).flip(0)
    module(later)
    torch.testing.assert_close(module.centres, 0.9 * first + 0.1 * refined(later, first, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x)[:1], naive("centres", module, x[:1]), rtol=0, atol=1e-12)


def test_a_centre_without_a_position_stays() -> None:
    module, x = build("centres", centres=5, group=24), tokens(1, 2)
    start = module.centres.clone()
    module.train()(x)
    assert (
        sum(torch.allclose(now, then, rtol=0, atol=1e-15) for now, then in zip(module.centres, start, strict=True)) >= 3
    )


def test_two_passes_may_come_before_their_gradients() -> None:
    """As in a network that uses one attention twice: the second pass moves the centres."""
    module, x = build("centres", **SMALL["centres"]).train(), tokens(13, 17)
    (module(x).sum() + module(2 * x).sum()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("size", [(13, 17), (1, 1), (8, 9)])
@pytest.mark.parametrize("k", [1, 6, 64])
def test_degrees_have_the_mean_k_on_every_image_and_grow_with_detail(size: tuple[int, int], k: int) -> None:
    x = tokens(*size, batch=2)
    x[:, : size[0] // 4 * 2] = 1.0  # no detail in the upper half
    found = graph.degrees(x, k)
    assert found.flatten(1).sum(1).tolist() == [k * size[0] * size[1]] * 2
    assert int(found.min()) >= 1
    assert int(found.max()) <= 2 * k - 1
    if size == (13, 17):
        assert int(found[:, :6].max()) <= int(found[:, 6:].min())


def test_a_flat_image_attends_all_candidates_once() -> None:
    """Equal candidates cannot be told apart: all are attended, and the result is the value that all share."""
    module, x = build("graph", **SMALL["graph"]), torch.ones(1, 13, 17, 6, dtype=torch.float64)
    edges = module.edges(x, graph.grid_places(13, 17, 3, x.device))[0]
    assert (
        edges[0, -1].sum() == 6 * 6 + 8
    )  # the corner tile has 36 positions within reach, and one of 9 of the grid is in it
    torch.testing.assert_close(module(x), module.proj(module.qkv(x).chunk(3, -1)[2]), rtol=0, atol=1e-13)


def test_the_nth_largest_is_that_of_a_sorted_list() -> None:
    values = torch.tensor([[3.0, -math.inf, 1.0, math.inf, 1.0]] * 5)
    found = nth_largest(values, torch.arange(1, 6)[:, None])
    assert found.flatten().tolist() == [math.inf, 3.0, 1.0, 1.0, -math.inf]


def test_an_order_is_undone_by_its_inverse() -> None:
    order = torch.stack([torch.randperm(50), torch.randperm(50)])
    table, rows = torch.randn(2, 50, 3), chunks.rows_of(order)
    assert torch.equal(chunks.take(table, rows)[1, 7], table[1, order[1, 7]])
    assert torch.equal(chunks.take(chunks.take(table, rows), chunks.inverse(rows)), table)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [(name, {setting: 0}, f"{setting} must be at least 1, but is 0") for name, setting in (
        ("nlsn", "rounds"), ("nlsn", "chunk"), ("centres", "centres"), ("centres", "group"), ("centres", "iterations"),
        ("categories", "entries"), ("categories", "chunk"), ("graph", "k"), ("graph", "tile"),
    )] + [
        ("graph", {"halo": -1}, "halo must be at least 0"),
        ("graph", {"grid": 0}, "grid must be at least 1"),
        ("centres", {"decay": 1.0}, r"decay must be in \[0, 1\), but is 1.0"),
        *((name, {"heads": 4}, "heads must divide dim, but dim is 6 and heads is 4") for name in NAMES),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(name, **settings)


def test_training_that_was_stopped_goes_on_to_the_same_centres(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", "centres")
    with pytest.raises(Interrupted):
        trained(tmp_path / "parts", "centres", stop_at=5)
    assert state_sha256(trained(tmp_path / "parts", "centres").state_dict()) == state_sha256(whole.state_dict())
