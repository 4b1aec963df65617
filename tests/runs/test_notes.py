"""What is noted of the retrieval: on maps whose neighbours are known, and on how many images."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kitbench.data.photograph import Photograph
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.runs.notes import CROPS, cut_crops, measured
from kitbench.spec.suite import Backbone

PATCH = 4
FULL = Backbone(width=8, head_dim=8, blocks=(1,), attention_levels=(1,))


def network(name: str = "kit", **settings: object) -> UNet:
    """One block at full resolution, whose attention gets the normalised pixels and nothing of their neighbours."""
    method = methods.load_method(name)
    model = UNet(3, FULL, method, method.resolve({"patch": PATCH} | settings), seed=0).eval()
    with torch.no_grad():
        middle = model.head.weight[..., 1, 1].clone()
        model.head.weight.zero_()
        model.head.weight[..., 1, 1] = middle
    return model


def copied(rows: int, columns: int, down: bool) -> Tensor:
    """[1, 3, H, W]: patches that all differ, in rows and columns, and below or beside them their exact copies."""
    torch.manual_seed(0)
    half = torch.rand(1, 3, rows * PATCH, columns * PATCH)
    return torch.cat([half, half], 2 if down else 3)


@pytest.mark.parametrize("retrieval", ["exact", "lsh"])
@pytest.mark.parametrize(("rows", "columns", "down", "distance"), [(16, 12, False, 12), (9, 16, True, 9)])
def test_exact_copies_at_a_known_distance_are_found_there(
    retrieval: str, rows: int, columns: int, down: bool, distance: int
) -> None:
    [note] = measured(network(k=2, retrieval=retrieval), [copied(rows, columns, down)]).values()
    assert note["patches"] == 2 * rows * columns > 3 * 32  # more than the candidates of one round of hashing
    assert (note["recall"], note["adjacent"], note["distance"]) == (1.0, 0.0, distance)


def test_copies_in_the_next_patch_are_adjacent() -> None:
    [note] = measured(network(k=2, retrieval="exact"), [copied(16, 1, False)]).values()
    assert (note["recall"], note["adjacent"], note["distance"]) == (1.0, 1.0, 1.0)


def test_where_every_patch_is_attended_a_loop_over_all_pairs_gives_the_same() -> None:
    x = torch.rand(1, 3, 5 * PATCH, 8 * PATCH)
    [note] = measured(network(retrieval="exact", k=40, chunk=40), [x] * 3).values()
    patches = list(product(range(5), range(8)))
    apart = [max(abs(a - c), abs(b - d)) for a, b in patches for c, d in patches if (a, b) != (c, d)]
    assert note["distance"] == np.median(apart)
    assert note["adjacent"] == round(float(np.mean([distance == 1 for distance in apart])), 4)


@pytest.mark.parametrize("shift", [False, True])
def test_what_is_noted_are_the_patches_that_the_forward_pass_attends(shift: bool) -> None:
    """The result of a query patch depends on the patches that are noted, and on no others."""
    torch.manual_seed(0)
    module = methods.load_method("kit").build(8, 1, shift, patch=PATCH, k=3).eval()
    x = torch.rand(1, 4 * PATCH, 6 * PATCH, 8, requires_grad=True)
    neighbours, columns = module.attended(x)
    assert columns == 6

    def in_patches(a: Tensor) -> Tensor:
        """[H, W] to [4, 6, positions], on the grid of the block."""
        a = a.roll((-module.roll, -module.roll), (0, 1))
        return a.reshape(4, PATCH, 6, PATCH).transpose(1, 2).flatten(2)

    in_patches(module(x)[0].sum(-1))[2, 3].sum().backward()
    felt = in_patches(x.grad[0].abs().sum(-1)).sum(-1).flatten().nonzero().flatten()
    assert set(felt.tolist()) == set(neighbours[0, 2 * columns + 3].tolist())


class Reports(nn.Module):
    """An attention of the user's own that says something of itself and attends no patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def report(self, x: Tensor) -> dict[str, object]:
        return {"largest": float(x.abs().max()), "side": x.shape[1], "name": "mine", "twice": True}


def test_numbers_of_a_users_own_report_are_means_over_the_images() -> None:
    model = network()
    [block] = model.bottom
    block.attention = Reports()
    values = []
    block.norm_attention.register_forward_hook(lambda module, x, y: values.append(float(y.abs().max())))
    [note] = measured(model, [torch.rand(1, 3, 16, 16), torch.rand(1, 3, 32, 16)]).values()
    assert note == {"largest": round(np.mean(values), 4), "side": 24.0, "name": "mine", "twice": True}
    assert not block.attention._forward_pre_hooks


def photographs(*shapes: tuple[int, int], pair: bool = False) -> list[Photograph]:
    random = np.random.default_rng(0)
    found = []
    for number, shape in enumerate(shapes):
        pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        found.append(Photograph(f"p{number}", pixels, f"{number}", 255 - pixels if pair else None))
    return found


def test_twenty_crops_are_cut_and_no_image_twice_where_there_are_enough() -> None:
    few = cut_crops({"A": photographs((300, 451), (512, 512)), "B": photographs((260, 700))}, 256)
    assert len(few) == CROPS
    assert len({(name, crop.pixels.tobytes()) for name, crop in few}) == CROPS  # all different
    assert {crop.pixels.shape for _, crop in few} == {(256, 256, 3)}
    tops = {int(crop.name.split("+")[1]) for _, crop in few if crop.name.startswith("p1")}
    assert {0, 256} <= tops  # from the top of the second image of A to its bottom
    many = cut_crops({"A": photographs(*[(64, 80)] * 30), "B": photographs(*[(64, 64)] * 3)}, 48)
    assert len(many) == CROPS
    assert len({(name, crop.sha256) for name, crop in many}) == CROPS
    assert [name for name, _ in many[:7]] == ["A", "B", "A", "B", "A", "B", "A"]
    assert len(cut_crops({"A": photographs((64, 64))}, 256)) == 1  # no other crop exists, and the note says 1


def test_a_crop_of_a_pair_is_cut_from_both_images_alike() -> None:
    for _, crop in cut_crops({"A": photographs((70, 90), pair=True)}, 64):
        np.testing.assert_array_equal(crop.degraded, 255 - crop.pixels)
