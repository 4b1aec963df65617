"""What a trained attention reports of itself, kept with the run: for k-NN retrieval, how well and how far it finds.

Measured after training, in evaluation mode, on degraded crops of the test and validation images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kitbench.data.photograph import Photograph
from kitbench.model.backbone import UNet
from kitbench.runs.work import CellWork
from kitbench.scoring.evaluate import degraded
from kitbench.spec.tasks import condition

CROPS = 20
SIDE = 256
"""Pixels of a crop's side, at most; also at most GROWN times the side of the crops that are trained on."""
GROWN = 4
MEASURED_ON = ("crops", "images", "side", "sets", "condition")
"""Keys of a note that say what it was measured on."""


def attention_notes(work: CellWork, model: UNet) -> dict[str, dict[str, Any]]:
    """What each attention with a method `report(x)` or `attended(x)` says of itself, by its place in the network.

    model: in evaluation mode. A note holds what `measured` finds; the place's `level` (1: full resolution); and what it
    was measured on: `crops`, of so many `images` of these `sets`, `side` pixels at most, and their `condition`.
    """
    if not any(hasattr(module, name) for _, module in model.attentions() for name in ("report", "attended")):
        return {}
    prepared, mode = work.prepared, work.cell.mode
    sets, task = prepared.sets[mode].test | prepared.sets[mode].validation, prepared.suite.task
    sigma = task.conditions[len(task.conditions) // 2]
    side = min(SIDE, GROWN * prepared.suite.recipe.crop)
    cut = cut_crops(sets, side)
    inputs = (
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32))[None].to(prepared.device)
        for name, crop in cut
        for image in [degraded(crop, name, task, sigma, prepared.protocols[mode])]
    )
    depth = len(model.config.blocks)
    measured_on = {
        "crops": len(cut), "images": len({(name, crop.sha256) for name, crop in cut}), "side": side,
        "sets": ", ".join(dict.fromkeys(name for name, _ in cut)), "condition": condition(sigma),
    }  # fmt: skip
    return {
        name: note | {"level": depth if name.startswith("bottom") else int(name.split(".")[1]) + 1} | measured_on
        for name, note in measured(model, inputs).items()
    }


def cut_crops(sets: Mapping[str, Sequence[Photograph]], side: int) -> list[tuple[str, Photograph]]:
    """CROPS crops, with the names of their sets: one of each image, the sets in turn, or as many of each as it takes.

    Fewer where the images are too small for so many different crops. A crop bears the checksum of its image.
    """
    deepest = max((len(photos) for photos in sets.values()), default=0)
    images = [(name, photos[place]) for place in range(deepest) for name, photos in sets.items() if place < len(photos)]
    images = images[:CROPS]
    each = -(-CROPS // len(images))
    by_image = [[(name, crop) for crop in _crops(photo, side, each)] for name, photo in images]
    in_turn = [crops[number] for number in range(each) for crops in by_image if number < len(crops)]
    return in_turn[:CROPS]


def _crops(photo: Photograph, side: int, wanted: int) -> Iterator[Photograph]:
    """At most so many different crops of an image, spread over it; the middle where one is wanted."""
    side = min(side, *photo.shape[:2])
    across = int(np.ceil(np.sqrt(wanted)))
    tops, lefts = (_starts(extent - side, across) for extent in photo.shape[:2])
    places = list(product(tops, lefts))
    for number in np.linspace(0, len(places) - 1, min(wanted, len(places))).round().astype(int):
        top, left = places[number]
        pair = [p if p is None else p[top : top + side, left : left + side] for p in (photo.pixels, photo.degraded)]
        assert pair[0] is not None
        yield Photograph(f"{photo.name}+{top}+{left}", pair[0], photo.sha256, pair[1])


def _starts(room: int, count: int) -> list[int]:
    return [room // 2] if count == 1 else sorted(set(np.linspace(0, room, count).round().astype(int).tolist()))


def measured(model: UNet, inputs: Iterable[Tensor]) -> dict[str, dict[str, Any]]:
    """What the attentions of a network say of themselves over some images [1, C, H, W] in [0, 1], by their places.

    From `report(x)`: numbers are means over the images, anything else is that of the first. From `attended(x)`, which
    gives the patches that each patch attends, itself first, and the number of columns of the grid: `adjacent`, the
    share, in [0, 1], of those other than itself that are among the 8 that touch it, and `distance`, the median of their
    distances in patches (in rows or columns, whichever is more). x are the tokens that an attention gets.
    """
    reports: dict[str, list[Mapping[str, Any]]] = {}
    distances: dict[str, list[Tensor]] = {}

    def listen(name: str, attention: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def before(module: nn.Module, arguments: tuple[Tensor]) -> None:
            if hasattr(module, "report"):
                reports.setdefault(name, []).append(module.report(*arguments))  # type: ignore[operator]
            if hasattr(module, "attended"):
                distances.setdefault(name, []).append(_distances(*module.attended(*arguments)))  # type: ignore[operator]

        return attention.register_forward_pre_hook(before)

    handles = [listen(name, attention) for name, attention in model.attentions()]
    try:
        with torch.inference_mode():
            for x in inputs:
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    notes = {name: {key: _mean([r[key] for r in found]) for key in found[0]} for name, found in reports.items()}
    for name, found in distances.items():
        every = torch.cat(found).cpu().numpy()
        if every.size:
            far = {"adjacent": round(float((every <= 1).mean()), 4), "distance": float(np.median(every))}
            notes[name] = notes.get(name, {}) | far
    return notes


def _distances(neighbours: Tensor, columns: int) -> Tensor:
    """From each patch to those of its neighbours [B, N, k] that it is not itself: int64 [B * N * (k - 1)]."""
    own, others = neighbours[..., :1], neighbours[..., 1:]
    apart = [(others // columns - own // columns).abs(), (others % columns - own % columns).abs()]
    return torch.maximum(*apart).flatten()


def _mean(values: Sequence[Any]) -> Any:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or len(set(values)) == 1:
        return values[0]
    return round(float(np.mean(values)), 4)
