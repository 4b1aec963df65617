"""`kitbench retrieval`: how often a patch's true copies are among the neighbours that are found, under noise.

The images are those of the set `Repetition`, whose copies are known exactly. Neighbours are searched as KiT searches
them, exactly and by hashing, among features of the noisy image: its pixels, and the tokens that each k-NN attention of
a trained network gets. The patch grid is the unshifted one, so that a patch and its copy lie on it alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kitbench.attention import layout, retrieval
from kitbench.data.degrade import add_noise
from kitbench.data.repetition import SCENES, WITH, Scene, copies_of_patches, scene_pixels
from kitbench.errors import InputError
from kitbench.model.backbone import UNet
from kitbench.seeds import derive, generator
from kitbench.verdict.sheets import Sheet

PATCHES, NEIGHBOURS = (4, 8), (4, 8)
ROUNDS, CHUNK = 4, 32
"""Of the hashing: KiT's defaults."""


@dataclass(frozen=True)
class FeatureMap:
    """Features of one image in which neighbours are searched."""

    name: str
    stride: int
    """Pixels of the image per position of the map, along each side."""
    descriptor: str
    """Of a patch: 'flat' or 'mean'."""
    tokens: Tensor
    """[1, H, W, C]"""


@dataclass
class Tally:
    """Recall of one kind of search, summed over the patches that have a copy."""

    counted: int = 0
    exact: float = 0.0
    hashed: float = 0.0
    chance: float = 0.0
    """Of neighbours drawn at random."""
    patches: set[int] = field(default_factory=set)
    """Numbers of patches of the maps."""


@dataclass(frozen=True)
class Search:
    """What a line of the table is about."""

    features: str
    descriptor: str
    patch: int
    """Side in positions of the map."""
    k: int
    """Neighbours of a patch, itself among them."""


Recall = dict[tuple[str, Search], dict[float, Tally]]
"""By kind of scene and search, then by noise level."""


def measure_recall(sigmas: Sequence[float], model: UNet | None, device: torch.device) -> Recall:
    """Recall of the true copies at each noise level, in pixels and, with a trained network, in its features.

    sigmas: in 8-bit grey levels. Raises InputError for a network that has no k-NN attention.
    """
    found: Recall = {}
    for scene in SCENES:
        clean = scene_pixels(scene, repeated=True).astype(np.float32) / 255
        for sigma in sigmas:
            # The noise that the image has when it is scored as one of a test set.
            random = generator("noise", WITH, scene.name, f"{sigma:g}")
            noisy = add_noise(clean, sigma, random) if sigma else clean
            image = torch.from_numpy(noisy)[None].to(device)  # [1, H, W, 3]
            if model is not None and image.shape[-1] != model.head.in_channels:
                raise InputError(
                    "The run was trained on gray images, the set of copies is in colour; give another run."
                )
            for features in (*pixel_features(image), *(network_features(model, image) if model is not None else ())):
                for patch in PATCHES:
                    _count(found, scene, sigma, features, patch)
    return found


def pixel_features(image: Tensor) -> list[FeatureMap]:
    """The pixels of [1, H, W, C], whole patches and their mean colours."""
    return [FeatureMap("pixels", 1, descriptor, image) for descriptor in ("flat", "mean")]


def network_features(model: UNet, image: Tensor) -> Iterator[FeatureMap]:
    """The tokens that each k-NN attention gets for an image [1, H, W, C]; with the descriptor that it searches by.

    Raises InputError for a network without such an attention.
    """
    tokens: dict[str, tuple[Any, Tensor]] = {}

    def keep(name: str) -> Any:
        def before(module: Any, arguments: tuple[Tensor]) -> None:
            tokens[name] = (module, arguments[0])

        return before

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.attentions()
        if hasattr(module, "neighbours") and hasattr(module, "patch")
    ]
    if not handles:
        raise InputError("This run's attention does not select patches; give a run of kit or one of its variants.")
    with torch.inference_mode():
        model(image.permute(0, 3, 1, 2))
    for handle in handles:
        handle.remove()
    for name, (module, x) in tokens.items():
        yield FeatureMap(name.removesuffix(".attention"), image.shape[1] // x.shape[1], module.descriptor, x)


def _count(found: Recall, scene: Scene, sigma: float, features: FeatureMap, patch: int) -> None:
    """Add what is found on one map with patches of one size, for each k that does not exceed their number."""
    side = patch * features.stride
    if scene.side % side:
        return
    group = copies_of_patches(scene, side)
    copies = np.bincount(group)[group] - 1  # others with the same content
    if not copies.any():
        return
    patches = layout.cut(features.tokens, patch)
    descriptors = retrieval.describe(patches, None, features.descriptor)
    random = torch.Generator().manual_seed(derive("rotations", scene.name))
    width = descriptors.shape[-1]
    rotations = torch.randn(ROUNDS, width, retrieval.MAX_BUCKETS // 2, generator=random).to(descriptors.device)
    # Both searches order what they find, so that the best k are the first k.
    most = min(max(NEIGHBOURS), len(group))
    exact = retrieval.exact(descriptors, most)[0].cpu().numpy()
    hashed = retrieval.lsh(descriptors, most, rotations, CHUNK, adjacent=True)[0].cpu().numpy()
    for k in (k for k in NEIGHBOURS if k <= len(group)):
        search = Search(features.name, features.descriptor, patch, k)
        tally = found.setdefault((scene.kind, search), {}).setdefault(sigma, Tally())
        having = copies > 0
        tally.counted += int(having.sum())
        tally.exact += float(share_of_copies(exact[:, :k], group).sum())
        tally.hashed += float(share_of_copies(hashed[:, :k], group).sum())
        drawn = (k - 1) * copies / (len(group) - 1)  # expected number of copies among k - 1 random others
        tally.chance += float((drawn[having] / np.minimum(k - 1, copies[having])).sum())
        tally.patches.add(len(group))


def share_of_copies(neighbours: np.ndarray, group: np.ndarray) -> np.ndarray:
    """For every patch that has copies: how many of its neighbours are copies, as a share of as many as could be.

    neighbours: int64 [N, k], itself first. group: int64 [N], equal for copies. float64, one value in [0, 1] a patch
    with copies.
    """
    copies = np.bincount(group)[group] - 1
    hits = (group[neighbours[:, 1:]] == group[:, None]).sum(1)
    having = copies > 0
    share: np.ndarray = hits[having] / np.minimum(neighbours.shape[1] - 1, copies[having])
    return share


def recall_sheets(found: Recall) -> list[Sheet]:
    """A table for each kind of scene."""
    titles = {
        "copies": "Squares that stand twice: how often the true copy is among the neighbours",
        "periodic": "Periodic textures: which share of the neighbours are true copies",
    }
    notes = (
        f"Recall with exact search / with hashing, over all patches of the set {WITH} that have a copy. σ: noise added "
        f"to the image. Hashing: {ROUNDS} rounds, chunks of {CHUNK}, random directions from a fixed seed; with up to "
        f"{3 * CHUNK} patches it is exact. Chance: neighbours drawn at random. The k neighbours include the patch.",
    )
    sheets = []
    for kind in titles:
        searches = {search: by_sigma for (of, search), by_sigma in found.items() if of == kind}
        sigmas = list(dict.fromkeys(sigma for by_sigma in searches.values() for sigma in by_sigma))
        header = ("Features", "Descriptor", "Patch", "k", "Patches", "Chance", *(f"σ{sigma:g}" for sigma in sigmas))
        lines = []
        for search, by_sigma in searches.items():
            first = next(iter(by_sigma.values()))
            numbers = sorted(first.patches)
            span = f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"
            recalls = (f"{t.exact / t.counted:.3f} / {t.hashed / t.counted:.3f}" for t in by_sigma.values())
            described = (search.features, search.descriptor, str(search.patch), str(search.k), span)
            lines.append((*described, f"{first.chance / first.counted:.3f}", *recalls))
        sheets.append(Sheet(titles[kind], header, tuple(lines), notes if kind == list(titles)[-1] else ()))
    return sheets
