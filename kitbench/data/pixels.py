"""The pixels of a set's images, before any conversion, and the checksums of pixels and files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from kitbench.data.cards import Card
from kitbench.data.images import blocks_of_mat, decode
from kitbench.data.layout import ImageFiles
from kitbench.errors import InputError

Images = tuple[np.ndarray, np.ndarray | None]


def load_pixels(card: Card, entry: ImageFiles) -> Images:
    """The pixels of an image or pair, before any conversion: target, and input or None."""
    assert entry.target is not None
    target = pixels_of(card, entry.target, entry.block)
    return target, None if entry.input is None else pixels_of(card, entry.input, entry.block)


def pixels_of(card: Card, path: Path, block: tuple[int, ...]) -> np.ndarray:
    """One image of the right number of channels: a file, or a block of a .mat file. Raises InputError."""
    try:
        if block:
            array = blocks_of_mat(path)
            if any(i >= n for i, n in zip(block, array.shape[:-3], strict=True)):
                raise InputError(
                    f"{path} holds {len(array)} images, fewer than the other file of the pair; restore the file."
                )
            pixels: np.ndarray = array[block]
        else:
            pixels = decode(path)
    except InputError as error:
        raise InputError(f"Data set {card.name}: {error}") from error
    kind = {True: "colour", False: "gray"}
    if (pixels.shape[2] == 3) != card.colour:
        raise InputError(
            f"Data set {card.name}: {path} is {kind[pixels.shape[2] == 3]}, expected {kind[card.colour]}; "
            f"replace the file."
        )
    return pixels


def size_of(images: Images) -> tuple[int, int]:
    """The longer and the shorter side of an image, in pixels."""
    height, width = images[0].shape[:2]
    return max(height, width), min(height, width)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of an image's shape and pixels: the same for every lossless file of it."""
    header = f"{'x'.join(map(str, pixels.shape))}:{pixels.dtype}:".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).hexdigest()
