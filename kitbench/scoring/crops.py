"""Crops of restored images, stored as PNG files in the folder of the run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kitbench.data.photograph import Photograph
from kitbench.seeds import generator
from kitbench.store.files import write_atomic
from kitbench.store.folder import RunFolder

PICTURES = 4
"""Images of each test set of which crops are stored."""


def crop_saver(
    folder: RunFolder, photographs: list[Photograph], name: str, sigma: float | None, stamp: str
) -> Callable[[Photograph, np.ndarray, np.ndarray], None]:
    """A function that stores crops of the first PICTURES images of a set in the run's folder.

    It takes the photograph, its input and its restoration, float32 [H, W, C] nominally in [0, 1].
    """
    numbers = {photo.name: number for number, photo in enumerate(photographs[:PICTURES])}

    def save(photo: Photograph, degraded: np.ndarray, restored: np.ndarray) -> None:
        if photo.name in numbers:
            path = folder.crop_path(name, sigma, stamp, numbers[photo.name])
            write_atomic(path, crop_strip(photo, name, degraded, restored))

    return save


CROP = 128
"""Side in pixels of the stored crops."""


@dataclass(frozen=True)
class Place:
    """A square crop of an image: its top left corner and its side, in pixels."""

    top: int
    left: int
    side: int


def crop_place(photo: Photograph, data_set: str) -> Place:
    """The crop of an image: of 16 places drawn by a seed of (data set, image), the one with the strongest edges."""
    height, width = photo.pixels.shape[:2]
    side = min(CROP, height, width)
    grey = photo.pixels.mean(2)
    edges = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    random = generator("crop", data_set, photo.name)
    tops, lefts = (random.integers(size - side + 1, size=16).tolist() for size in (height, width))
    places = [Place(top, left, side) for top, left in zip(tops, lefts, strict=True)]
    return max(places, key=lambda at: edges[at.top : at.top + side, at.left : at.left + side].sum())


def crop_strip(photo: Photograph, data_set: str, degraded: np.ndarray, restored: np.ndarray) -> bytes:
    """A PNG of four squares in a row: the whole image reduced, then degraded, restored and clean crop, 8 bits.

    Its text chunk `place` is top, left and side of the crop, then height and width of the image, in pixels.
    """
    at = crop_place(photo, data_set)
    height, width = photo.pixels.shape[:2]
    squares = [np.zeros((at.side, at.side, photo.pixels.shape[2]), np.uint8)]
    scale = at.side / max(height, width)
    small = cv2.resize(
        photo.pixels, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA
    )
    squares[0][: small.shape[0], : small.shape[1]] = small.reshape(*small.shape[:2], -1)
    for image in (degraded, restored, photo.pixels / 255):
        crop = image[at.top : at.top + at.side, at.left : at.left + at.side]
        squares.append(np.rint(np.clip(crop, 0, 1) * 255).astype(np.uint8))
    strip = np.concatenate(squares, axis=1)
    text = PngInfo()
    text.add_text("place", json.dumps([at.top, at.left, at.side, height, width]))
    file = io.BytesIO()
    Image.fromarray(strip if strip.shape[2] == 3 else strip[..., 0]).save(file, "PNG", pnginfo=text, optimize=True)
    return file.getvalue()
