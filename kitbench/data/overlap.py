"""Whether training and test images are disjoint, by content: finds copies, rotated or mirrored copies, and crops.

Every test image is cut into squares of 16 x 16 pixels; each square, in its 8 orientations, has a hash. The hash of the
square at *every* position of every training image is then looked up among them. A hash is a polynomial in two variables
over the pixels, modulo 2 ** 64, so that doubling the side four times gives all positions at once. Four equal squares
are an overlap: any region of 47 x 47 pixels that two images share contains four squares of the test image's grid.
Squares with few distinct values (sky, a black border) are evidence of nothing and are left out. Cost: linear in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kitbench.data.photograph import Photograph
from kitbench.errors import InputError
from kitbench.text import counted

SIDE = 16
"""Pixels; a power of two."""
ENOUGH = 4
"""Equal squares that count as an overlap; all of them where the test image has fewer."""
LEVELS = 16
"""Distinct values that a square must contain to be compared."""

Hashes = NDArray[np.uint64]

_random = np.random.default_rng(0)
_VALUES = _random.integers(0, 2**64, (3, 256), dtype=np.uint64)
"""A random number for every value of every channel: the coefficients of the polynomial."""
_ROW, _COLUMN = (_random.integers(0, 2**64, 2, dtype=np.uint64) | np.uint64(1)).tolist()


@dataclass(frozen=True)
class Overlap:
    """A test image that shares squares with a training image."""

    train: str
    test: str
    shared: int
    squares: int


def assert_disjoint(
    train: Mapping[str, Sequence[Photograph]],
    test: Mapping[str, Sequence[Photograph]],
    roles: tuple[str, str] = ("Training", "test"),
    otherwise: str = "",
) -> None:
    """Raises InputError where a test image shares a region with a training image, also flipped or rotated.

    roles: what the message calls the images. otherwise: what its advice says besides choosing disjoint sets.
    """
    found = overlaps(train, test)
    if found:
        first = found[0]
        raise InputError(
            f"{roles[0]} and {roles[1]} images overlap: {first.train} contains all or part of {first.test}: "
            f"{first.shared} of its {first.squares} squares of {SIDE} x {SIDE} px are equal "
            f"({counted(len(found), 'such pair')} in all); choose disjoint sets"
            f"{f', {otherwise}' if otherwise else ''}."
        )


def overlaps(train: Mapping[str, Sequence[Photograph]], test: Mapping[str, Sequence[Photograph]]) -> list[Overlap]:
    """All pairs of a training and a test image that share a region, in the order of the training images."""
    tests = [(f"{name}/{photo.name}", photo) for name, photos in test.items() for photo in photos]
    trains = [(f"{name}/{photo.name}", photo) for name, photos in train.items() for photo in photos]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        squares = list(pool.map(lambda item: _squares(item[1].pixels), tests))
        index = _Index(squares)
        shared = list(pool.map(lambda item: index.shared(_everywhere(item[1].pixels)), trains))
    return [
        Overlap(train_name, tests[owner][0], count, len(squares[owner]))
        for (train_name, _), owners in zip(trains, shared, strict=True)
        for owner, count in owners.items()
    ]


class _Index:
    """Which squares of which test image have a hash."""

    def __init__(self, squares: Sequence[Hashes]) -> None:
        """squares: of each test image, uint64 [N, 8], a column for each orientation."""
        self.needed = [min(ENOUGH, len(of_image)) for of_image in squares]
        self.owners = np.repeat(np.arange(len(squares)), [len(of_image) for of_image in squares])
        hashes = np.concatenate([np.empty(0, np.uint64), *(of_image.ravel() for of_image in squares)])
        order = np.argsort(hashes)
        self.hashes, self.numbers = hashes[order], order // 8
        # Most positions of a training image are in no test image: a lookup in a table of bits finds that quickly.
        self.shift = np.uint64(64 - min(28, max(16, len(hashes).bit_length() + 5)))
        self.seen = np.zeros(1 << (64 - int(self.shift)), bool)
        self.seen[self.hashes >> self.shift] = True

    def shared(self, places: Hashes) -> dict[int, int]:
        """Test images that share enough squares with an image of these hashes, and how many."""
        maybe = np.unique(places[self.seen[places >> self.shift]])
        # Several squares may have the same hash, where a test image occurs twice.
        first, last = np.searchsorted(self.hashes, maybe, "left"), np.searchsorted(self.hashes, maybe, "right")
        hits = np.concatenate([np.arange(0), *map(np.arange, first[last > first], last[last > first])])
        owners, counts = np.unique(self.owners[np.unique(self.numbers[hits])], return_counts=True)
        found = zip(owners.tolist(), counts.tolist(), strict=True)
        return {owner: count for owner, count in found if count >= self.needed[owner]}


def _values(pixels: np.ndarray) -> Hashes:
    """uint8 [H, W, C] to a random number a pixel, uint64 [H, W]."""
    values: Hashes = _VALUES[0][pixels[..., 0]]
    for channel in range(1, pixels.shape[2]):
        values += _VALUES[channel][pixels[..., channel]]
    return values


def _everywhere(pixels: np.ndarray) -> Hashes:
    """The hash of the square at every place of an image, flat."""
    hashes, side = _values(pixels), 1
    if min(hashes.shape) < SIDE:
        return np.empty(0, np.uint64)
    while side < SIDE:
        hashes = hashes[:-side] * _power(_ROW, side) + hashes[side:]
        hashes = hashes[:, :-side] * _power(_COLUMN, side) + hashes[:, side:]
        side *= 2
    return hashes.ravel()


def _squares(pixels: np.ndarray) -> Hashes:
    """The hashes of an image's squares that have content, in 8 orientations: uint64 [N, 8]."""
    rows, columns = (size // SIDE for size in pixels.shape[:2])
    if not rows * columns:
        return np.empty((0, 8), np.uint64)
    tiles = pixels[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE, -1).swapaxes(1, 2)
    tiles = tiles.reshape(rows * columns, SIDE, SIDE, -1)
    ordered = np.sort(tiles.reshape(len(tiles), -1), axis=1)
    tiles = tiles[(np.diff(ordered.astype(np.int16), axis=1) > 0).sum(1) >= LEVELS - 1]
    weights = np.outer(
        [_power(_ROW, SIDE - 1 - y) for y in range(SIDE)], [_power(_COLUMN, SIDE - 1 - x) for x in range(SIDE)]
    )
    turned = [np.rot90(weights, turns) for turns in range(4)]
    views = np.stack([*turned, *(view[:, ::-1] for view in turned)]).reshape(8, SIDE * SIDE)
    hashes: Hashes = _values(tiles.reshape(len(tiles), SIDE * SIDE, -1)) @ views.T
    return hashes


def _power(base: int, exponent: int) -> np.uint64:
    return np.uint64(pow(base, exponent, 2**64))
