"""Reading a set: its images checked against the card and decoded.

Sets are read as their authors publish them, without conversion. An image is uint8 [H, W, 3] (colour) or [H, W, 1]
(gray); a pair is the degraded input and the clean target.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from kitbench.data.cards import Card, cards
from kitbench.data.images import to_gray
from kitbench.data.layout import ImageFiles, name_in
from kitbench.data.locate import files_of_set, instead, locate
from kitbench.data.pixels import Images, file_sha256, load_pixels, pixel_sha256, size_of
from kitbench.errors import InputError
from kitbench.host import free_host_bytes
from kitbench.spec.fields import Mode

T = TypeVar("T")
RESIDENT = 0.5
"""Share of the free memory that the decoded images of one set may take; the others are decoded at each use."""


class Photograph:
    """One image of a set: `pixels` is the clean one, `degraded` the real input of a pair or None; both uint8 [H, W, C].

    `name` is its path in the set, without suffix; `sha256` covers all its pixels. Images that do not fit in memory
    (`RESIDENT`) are decoded when their pixels are read, and only the last few are kept.
    """

    def __init__(self, name: str, pixels: np.ndarray, sha256: str, degraded: np.ndarray | None = None) -> None:
        self.name, self.sha256 = name, sha256
        self.shape: tuple[int, ...] = pixels.shape
        self._images: Images | None = (pixels, degraded)
        self._decode: Callable[[], Images] | None = None

    def leave_on_disk(self, again: Callable[[], Images]) -> None:
        """Release the pixels; `again` decodes them when they are read next."""
        self._images, self._decode = None, again

    @property
    def pixels(self) -> np.ndarray:
        return self._read()[0]

    @property
    def degraded(self) -> np.ndarray | None:
        return self._read()[1]

    def _read(self) -> Images:
        return self._images if self._images is not None else _decoded(self)


@lru_cache(maxsize=4)
def _decoded(photo: Photograph) -> Images:
    assert photo._decode is not None
    return photo._decode()


def read_set(card: Card, root: Path | None, mode: Mode) -> list[Photograph]:
    """All images of a set, checked against its card and decoded for a colour mode.

    A colour image is made gray by MATLAB's rgb2gray; a gray one cannot be made colour. Decoded images stay in memory
    as far as half of what is free allows (`RESIDENT`; GoPro's training pairs take 11.6 GB, SIDD-medium's 29 GB), the
    others are decoded again at each use. Raises InputError for a missing folder, a wrong count, a pair without its
    other half or of two sizes, another version of the set, a file that is not an 8-bit image or has another checksum,
    and the wrong number of channels.
    """
    folder = locate(card, root)
    if folder is None:
        where = f"package {card.package}" if card.package else f"{root} (looked for {', '.join(card.folders)})"
        raise InputError(f"Data set {card.name} is not in {where} as {card.tree}; get it from {card.home}.")
    if mode == "colour" and not card.colour:
        raise InputError(
            f"Data set {card.name} is gray and cannot be used in mode 'colour'; choose a colour set, or mode 'gray'."
        )
    if card.blind:
        raise InputError(f"Data set {card.name} has no public targets: its server scores submissions. {card.ask}")
    found = files_of_set(card, folder)
    room = _Room()

    def one(entry: ImageFiles) -> Photograph:
        images = load_pixels(card, entry)
        verify(card, folder, entry, images)
        photo = _photograph(entry, images, mode)
        if not room.take(photo):
            photo.leave_on_disk(partial(_again, card, entry, mode))
        return photo

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        photographs = list(pool.map(one, found))
    check_averaging(card, ((photo.pixels, photo.degraded) for photo in sample(photographs)))
    return photographs


class _Room:
    """How much of the free memory the images of a set may still take; processes of one machine share it."""

    def __init__(self) -> None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.left = RESIDENT * free_host_bytes() / processes
        self.lock = threading.Lock()

    def take(self, photo: Photograph) -> bool:
        needed = sum(image.nbytes for image in (photo.pixels, photo.degraded) if image is not None)
        with self.lock:
            fits = needed <= self.left
            self.left -= needed if fits else 0
        return fits


def verify(card: Card, folder: Path, entry: ImageFiles, images: Images) -> None:
    """Compare an entry with its card: sizes and checksums. Raises InputError, naming the file."""
    target, degraded = images
    if degraded is not None and degraded.shape != target.shape:
        sizes = [f"{image.shape[1]} x {image.shape[0]}" for image in (degraded, target)]
        raise InputError(
            f"Data set {card.name}: {entry.input} is {sizes[0]} px and its target {entry.target} is {sizes[1]} px; "
            f"the images of a pair must have one size: restore the set."
        )
    if card.size is not None and size_of(images) != card.size:
        found, expected = f"{target.shape[1]} x {target.shape[0]}", " x ".join(map(str, card.size))
        raise InputError(
            f"Data set {card.name}: {entry.target} is {found} px, expected {expected}; {instead(card, folder)}."
        )
    if card.checksum == "none" or any(entry.block):  # a .mat file is checked with its first block
        return
    for path, pixels in ((entry.target, target), (entry.input, degraded)):
        if path is None or pixels is None:
            continue
        found = pixel_sha256(pixels) if card.checksum == "pixels" else file_sha256(path)
        wanted = wanted_sha256(card, folder, path, found)
        if found != wanted:
            raise InputError(
                f"Data set {card.name}: {path} has {card.checksum} checksum {found[:12]}, "
                f"expected {(wanted or 'no such file')[:12]}; "
                f"the file is altered or from another version of the set: restore it."
            )


def key_of(card: Card, folder: Path, path: Path) -> str:
    """The name of a file in the card's `sha256`."""
    return path.relative_to(folder).as_posix() if card.checksum == "file" else name_in(path, folder)


def wanted_sha256(card: Card, folder: Path, path: Path, found: str) -> str | None:
    """The checksum that the card states for a file; a file of another name may be any of the set's."""
    return card.sha256.get(key_of(card, folder, path)) or (found if found in card.sha256.values() else None)


def _photograph(entry: ImageFiles, images: Images, mode: Mode) -> Photograph:
    target, degraded = _in_mode(images, mode)
    sha256 = pixel_sha256(target)
    if degraded is not None:
        sha256 = hashlib.sha256(f"{sha256}:{pixel_sha256(degraded)}".encode()).hexdigest()
    return Photograph(entry.name, target, sha256, degraded)


def _in_mode(images: Images, mode: Mode) -> Images:
    target, degraded = (
        to_gray(image) if image is not None and mode == "gray" and image.shape[2] == 3 else image for image in images
    )
    assert target is not None
    return target, degraded


def _again(card: Card, entry: ImageFiles, mode: Mode) -> Images:
    return _in_mode(load_pixels(card, entry), mode)


def sample(items: Sequence[T]) -> Sequence[T]:
    """About 64 items, evenly spaced: enough to find out what the blurred images of a set are averages of."""
    return items[:: max(1, len(items) // 64)]


def check_averaging(card: Card, images: Iterable[Images]) -> None:
    """Raises InputError for blurred images that are not averages of what the card states.

    An average of frames keeps the mean of what was averaged: of the 8-bit values, or of the light. By Jensen's
    inequality an average of light has larger values than the frames on average, so the two can be distinguished.
    """
    if not card.averaged:
        return
    off = {"values": 0.0, "light": 0.0}
    for target, degraded in images:
        assert degraded is not None
        sharp, blurred = target / 255, degraded / 255
        off["values"] += blurred.mean() - sharp.mean()
        # In units of values: the slope of v ** 2.2 at the mean.
        slope = 2.2 * max(1e-3, sharp.mean()) ** 1.2
        off["light"] += ((blurred**2.2).mean() - (sharp**2.2).mean()) / slope
    found = min(off, key=lambda domain: abs(off[domain]))
    if found != card.averaged:
        other = next((c for c in cards().values() if c.averaged == found and c.count == card.count), None)
        raise InputError(
            f"Data set {card.name}: its blurred images are averages of the frames' {found}, expected of their "
            f"{card.averaged}; the folder contains {other.name if other else 'another version of the set'}."
        )
