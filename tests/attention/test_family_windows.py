"""Attention over channels, overlapping windows, strided groups, and the variants of global attention and KiT.

Each against its definition by loops in float64, forward and backward, at sizes that nothing divides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from kitbench.baselines import channel, global_, global_position, kit_nonadjacent, overlap, sparse, window
from torch import Tensor, nn

from kitbench.attention import kit, layout, retrieval
from kitbench.cost.agreement import agree
from kitbench.cost.flops import count_module
from kitbench.cost.second_counter import count_fvcore
from kitbench.model import methods

SIZES = [(7, 5), (11, 13)]
Row = Callable[[int, int, int, int], "int | None"]
"""Of query (y, z) and key (r, c): the row of the bias table, -1 for no bias, None where the query does not attend."""


def tokens(height: int, width: int, dim: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, height, width, dim, dtype=torch.float64)


def build(method: type[nn.Module], dim: int = 4, heads: int = 2, **settings: object) -> nn.Module:
    """In float64, with every parameter far from where it starts."""
    torch.manual_seed(0)
    module = method(dim, heads, **settings).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def assert_equal_with_gradients(module: nn.Module, x: Tensor, definition: Callable[[Tensor], Tensor]) -> None:
    """`definition` maps one image [H, W, C] to the same, through the parameters of the module."""
    x = x.requires_grad_()
    leaves = [x, *module.parameters()]
    out, expected = module(x)[0], definition(x[0])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    upstream = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(y, leaves, upstream) for y in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10 * max(1, other.abs().max().item()))


def attention(module: nn.Module, x: Tensor, row: Row, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of one image [H, W, C] with all logits held; bias: table [entries, heads]."""
    height, width, dim = x.shape
    heads = module.heads
    places = list(itertools.product(range(height), range(width)))
    rows = [[row(*query, *key) for key in places] for query in places]
    q, k, v = (t.reshape(height * width, heads, -1).transpose(0, 1) for t in module.qkv(x).chunk(3, -1))
    logits = q @ k.mT / math.sqrt(dim / heads)
    if bias is not None:
        entries = torch.tensor([[entry or 0 for entry in line] for line in rows])
        logits = logits + bias[entries].permute(2, 0, 1)
    forbidden = torch.tensor([[entry is None for entry in line] for line in rows])
    out = logits.masked_fill(forbidden, -math.inf).softmax(-1) @ v
    return module.proj(out.transpose(0, 1).reshape(height, width, dim))


def depthwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Each channel of [H, W, C] filtered by its own kernel, position by position; zero outside."""
    height, width, _ = x.shape
    side = convolution.kernel_size[0]
    lines = []
    for y, z in itertools.product(range(height), range(width)):
        total = convolution.bias
        for down, right in itertools.product(range(side), repeat=2):
            r, c = y + down - side // 2, z + right - side // 2
            if 0 <= r < height and 0 <= c < width:
                total = total + convolution.weight[:, 0, down, right] * x[r, c]
        lines.append(total)
    return torch.stack(lines).view(height, width, -1)


# Channels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("filtered", [True, False])
def test_channel_attention_equals_a_loop_over_channels(size: tuple[int, int], filtered: bool) -> None:
    module = build(channel.Attention, dim=6, depthwise=filtered)

    def definition(x: Tensor) -> Tensor:
        tables = depthwise(module.mix, module.qkv(x)) if filtered else module.qkv(x)
        q, k, v = (table.unflatten(-1, (2, 3)) for table in tables.chunk(3, -1))  # [H, W, h, d]
        out = torch.zeros_like(v)
        for head, i in itertools.product(range(2), range(3)):
            logits = []
            for j in range(3):
                a, b = q[:, :, head, i], k[:, :, head, j]
                cosine = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
                logits.append(module.temperature[head, 0, 0] * cosine)
            for j, share in enumerate(torch.stack(logits).softmax(0)):
                out[:, :, head, i] = out[:, :, head, i] + share * v[:, :, head, j]
        return module.proj(out.flatten(-2))

    assert_equal_with_gradients(module, tokens(*size, dim=6), definition)


def test_channel_attention_without_its_convolution_knows_no_position() -> None:
    x = tokens(5, 7)
    order = torch.randperm(35)
    for filtered in (False, True):
        module = build(channel.Attention, depthwise=filtered)
        moved = module(x.flatten(1, 2)[:, order].view_as(x)).flatten(1, 2)
        expected = module(x).flatten(1, 2)[:, order]
        assert torch.allclose(moved, expected, atol=1e-12) is not filtered


# Overlapping windows


@pytest.mark.parametrize("size", [*SIZES, (2, 3)])
@pytest.mark.parametrize(("side", "ratio"), [(4, 0.5), (3, 2 / 3), (2, 2.0)])
def test_overlapping_windows_equal_a_loop(size: tuple[int, int], side: int, ratio: float) -> None:
    module = build(overlap.Attention, window=side, overlap=ratio)
    margin = round(ratio * side / 2)

    def row(y: int, z: int, r: int, c: int) -> int | None:
        top, left = y // side * side - margin, z // side * side - margin
        edge = side + 2 * margin
        if not (top <= r < top + edge and left <= c < left + edge):
            return None
        return (r - y + side + margin - 1) * (2 * side + 2 * margin - 1) + c - z + side + margin - 1

    # The offset of a key reaches from -(M - 1) - margin to M - 1 + margin: 2 M + 2 margin - 1 of them.
    assert_equal_with_gradients(module, tokens(*size), lambda x: attention(module, x, row, module.bias.table))


def test_overlap_of_nothing_is_window_attention() -> None:
    module, plain = build(overlap.Attention, window=4, overlap=0.0), build(window.Attention, window=4)
    # Windows number their offsets from the key to the query.
    plain.load_state_dict(module.state_dict() | {"bias.table": module.bias.table.flip(0)})
    x = tokens(11, 13)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-12)


# Dense and sparse in turn


@pytest.mark.parametrize("size", [*SIZES, (2, 3), (1, 1)])
def test_strided_groups_equal_a_loop(size: tuple[int, int]) -> None:
    module = build(sparse.Attention, shift=True, interval=3)

    def row(y: int, z: int, r: int, c: int) -> int | None:
        return -1 if (y - r) % 3 == 0 and (z - c) % 3 == 0 else None

    assert_equal_with_gradients(module, tokens(*size), lambda x: attention(module.attend, x, row))


@pytest.mark.parametrize("size", SIZES)
def test_dense_blocks_of_sparse_equal_a_loop(size: tuple[int, int]) -> None:
    module = build(sparse.Attention, window=4)

    def row(y: int, z: int, r: int, c: int) -> int | None:
        return (y - r + 3) * 7 + z - c + 3 if (y // 4, z // 4) == (r // 4, c // 4) else None

    assert_equal_with_gradients(
        module, tokens(*size), lambda x: attention(module.attend, x, row, module.attend.bias.table)
    )


def test_the_first_block_of_a_level_is_of_the_kind_asked_for_and_the_second_of_the_other() -> None:
    kinds = {
        (first, shift): type(sparse.Attention(4, 2, shift=shift, first=first).attend)
        for first, shift in itertools.product(("dense", "sparse"), (False, True))
    }
    a, b = window.Attention, sparse.Strided
    assert kinds == {("dense", False): a, ("dense", True): b, ("sparse", False): b, ("sparse", True): a}


def test_an_interval_of_one_is_global_attention() -> None:
    module, plain = build(sparse.Attention, shift=True, interval=1), build(global_.Attention)
    plain.load_state_dict(module.attend.state_dict())
    x = tokens(5, 7)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-12)


# Global attention with positions


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("form", "kernel"), [("sdpa", 3), ("materialised", 5)])
def test_global_attention_with_positions_equals_a_loop(size: tuple[int, int], form: str, kernel: int) -> None:
    module = build(global_position.Attention, form=form, kernel=kernel)

    def definition(x: Tensor) -> Tensor:
        return attention(module.attend, x + depthwise(module.position, x), lambda *_: -1)

    assert_equal_with_gradients(module, tokens(*size), definition)


def test_global_attention_starts_from_the_same_weights_with_and_without_positions() -> None:
    built = []
    for method in (global_.Attention, global_position.Attention):
        torch.manual_seed(3)
        built.append(method(4, 2))
    plain, positional = built
    for name, value in plain.state_dict().items():
        assert torch.equal(value, positional.state_dict()[f"attend.{name}"])


# KiT without adjacent patches


def apart(height: int, width: int, patch: int, shift: bool) -> list[list[int]]:
    """For each patch of a map the patches that do not touch it, by the positions of their corners, in any order."""
    grid = layout.grid(height, width, patch)
    places = list(itertools.product(range(grid[0]), range(grid[1])))

    def touch(a: tuple[int, int], b: tuple[int, int]) -> bool:
        # Moved by a patch or by none in each direction, around the torus where the grid is shifted, one lies on the other.
        moved = [(a[0] + down, a[1] + right) for down, right in itertools.product((-1, 0, 1), repeat=2)]
        return b in ([(y % grid[0], z % grid[1]) for y, z in moved] if shift else moved)

    return [[n for n, other in enumerate(places) if not touch(one, other)] for one in places]


def nearest(x: Tensor, patch: int, k: int, shift: bool) -> list[list[int]]:
    """The patches that each patch of one image [H, W, C] attends, by loops: itself, then by the cosine of the means."""
    height, width, dim = x.shape
    grid = layout.grid(height, width, patch)
    means = torch.stack(
        [
            x[top : top + patch, left : left + patch].reshape(-1, dim).mean(0)
            for top, left in itertools.product(range(0, grid[0] * patch, patch), range(0, grid[1] * patch, patch))
        ]
    )
    centred = means - means.mean(0)
    far = apart(height, width, patch, shift)
    most = min(k - 1, *(len(others) for others in far))
    found = []
    for one, others in enumerate(far):
        cosine = {n: float(torch.cosine_similarity(centred[one], centred[n], dim=0)) for n in others}
        found.append([one, *sorted(cosine, key=lambda n: -cosine[n])[:most]])
    return found


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("size", [(13, 11), (14, 7)])
def test_kit_without_adjacent_patches_equals_a_loop(size: tuple[int, int], shift: bool) -> None:
    module = build(kit_nonadjacent.Attention, shift=shift, patch=3, k=4, retrieval="exact", chunk=12)

    def definition(x: Tensor) -> Tensor:
        x = x.roll((-1, -1), (0, 1)) if shift else x
        found = nearest(x.detach(), 3, 4, shift)
        columns = layout.grid(*size, 3)[1]

        def row(y: int, z: int, r: int, c: int) -> int | None:
            mine, other = y // 3 * columns + z // 3, r // 3 * columns + c // 3
            return (y % 3 - r % 3 + 2) * 5 + z % 3 - c % 3 + 2 if other in found[mine] else None

        y = attention(module, x, row, module.bias.table)
        return y.roll((1, 1), (0, 1)) if shift else y

    assert_equal_with_gradients(module, tokens(*size), definition)


@pytest.mark.parametrize("shift", [False, True])
def test_the_patches_that_it_attends_are_told_without_a_pass_before(shift: bool) -> None:
    module = build(kit_nonadjacent.Attention, shift=shift, patch=3, k=4, retrieval="exact", chunk=12)
    x = tokens(13, 11)
    found, columns = module.attended(x)
    assert columns == 4
    assert found[0].tolist() == nearest((x.roll((-1, -1), (1, 2)) if shift else x)[0], 3, 4, shift)


@pytest.mark.parametrize("shift", [False, True])
def test_hashing_offers_the_best_of_its_candidates_that_do_not_touch(shift: bool) -> None:
    module = build(kit_nonadjacent.Attention, shift=shift, patch=2, k=4, rounds=2, chunk=14)
    x = tokens(17, 23)
    module(x)
    descriptors = retrieval.describe(layout.cut(x, 2), layout.real_positions(17, 23, 2, 0, x.device), "mean")
    # The fourteen best of the same hashes, which do touch among others; then those that do not, by loops.
    widest = retrieval.lsh(descriptors, 14, module.rotations, 14, adjacent=True)[0].tolist()
    far = apart(17, 23, 2, shift)
    expected = [[one, *[n for n in line if n in far[one]][:3]] for one, line in enumerate(widest)]
    found = module.search(descriptors)[0].tolist()
    assert found == expected
    assert found != [line[:4] for line in widest]


def test_kit_without_adjacent_patches_on_nine_patches_is_window_attention() -> None:
    module, plain = build(kit_nonadjacent.Attention, patch=4), build(window.Attention, window=4)
    plain.load_state_dict({name: value for name, value in module.state_dict().items() if name != "rotations"})
    x = tokens(11, 9)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-12)
    assert module.macs(11, 9) == plain.macs(11, 9) + 9 * 9 * 4  # the search is made, and finds nobody


def test_its_report_compares_with_the_nearest_that_do_not_touch() -> None:
    x = tokens(37, 41)
    exact = build(kit_nonadjacent.Attention, patch=3, retrieval="exact", shift=True).report(x)
    assert exact == {
        "retrieval": "exact", "descriptor": "mean", "k": 4, "patches": 182, "recall": 1.0, "chance": 3 / 173
    }  # fmt: skip
    hashed = build(kit_nonadjacent.Attention, patch=3, rounds=1, chunk=16).report(x)
    assert 3 / 173 < hashed["recall"] < 1


def test_a_search_for_another_map_than_the_last_is_refused() -> None:
    module = build(kit_nonadjacent.Attention, patch=2)
    module(tokens(13, 11))
    with pytest.raises(RuntimeError, match="7 x 6 patches, not 12"):
        module.search(torch.randn(1, 12, 4, dtype=torch.float64))


# Cost and settings


@pytest.mark.parametrize("size", [(17, 23), (35, 13), (51, 49)])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (channel.Attention, {}),
        (channel.Attention, {"depthwise": False}),
        (overlap.Attention, {}),
        (overlap.Attention, {"window": 5, "overlap": 0.4}),
        (sparse.Attention, {}),
        (sparse.Attention, {"shift": True}),
        (global_position.Attention, {"kernel": 5}),
        (kit_nonadjacent.Attention, {"patch": 4, "chunk": 12, "rounds": 2}),
        (kit_nonadjacent.Attention, {"retrieval": "exact", "shift": True}),
    ],
)
def test_closed_form_equals_the_count(method: type[nn.Module], settings: dict, size: tuple[int, int]) -> None:
    module = method(8, 2, **settings).eval()
    counted = count_module(module, (1, *size, 8)).macs
    if isinstance(module, kit.Attention):  # the means over the real positions of padded maps are counted, not charged
        counted -= math.prod(layout.grid(*size, module.patch)) * module.patch**2 * 8
    assert counted == module.macs(*size)
    by_fvcore, unsupported = count_fvcore(module, torch.zeros(1, *size, 8))
    assert agree(module.macs(*size), by_fvcore)
    assert not unsupported


@pytest.mark.parametrize(
    ("method", "settings", "exponent"),
    [
        (channel.Attention, {}, 1),
        (overlap.Attention, {}, 1),
        (sparse.Attention, {}, 1),
        (kit_nonadjacent.Attention, {}, 1),
        (sparse.Attention, {"shift": True}, 2),
        (global_position.Attention, {}, 2),
    ],
)
def test_cost_grows_with_the_pixels_as_the_card_says(method: type[nn.Module], settings: dict, exponent: int) -> None:
    module = method(32, 1, **settings)
    small, large = (module.macs(side, side) for side in (1024, 4096))
    assert exponent - 0.1 < math.log(large / small, 16) < exponent + 0.1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("channel", {"heads": 3}, "heads must divide dim"),
        ("overlap", {"heads": 3}, "heads must divide dim"),
        ("overlap", {"window": 0}, "window must be at least 1"),
        ("overlap", {"overlap": 0.4}, "overlap is 0.4 and window is 8"),
        ("overlap", {"overlap": -0.5}, "overlap is -0.5"),
        ("overlap", {"overlap": math.nan}, "overlap is nan"),
        ("overlap", {"overlap": math.inf}, "overlap is inf"),
        ("sparse", {"heads": 3}, "heads must divide dim"),
        ("sparse", {"heads": 3, "shift": True}, "heads must divide dim"),
        ("sparse", {"interval": 0}, "interval must be at least 1"),
        ("sparse", {"window": 0}, "window must be at least 1"),
        ("global-position", {"heads": 3}, "heads must divide dim"),
        ("global-position", {"kernel": 2}, "kernel must be odd"),
        ("kit-nonadjacent", {"k": 25}, r"chunk must be at least k \+ 8"),
        ("kit-nonadjacent", {"patch": 0}, "patch must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused_in_words(name: str, settings: dict, message: str) -> None:
    method = methods.load_method(name).attention
    assert method is not None
    with pytest.raises(ValueError, match=message):
        method(**{"dim": 4, "heads": 2, **settings})
