"""Data cards: what a set is, where its files lie, and whether they are the right ones.

A card (`datasets/*.toml`) states name, expected tree, counts, checksums where known, licence and citation. Nothing is
ever downloaded or converted here: what is missing is named. An image is uint8 [H, W, 3] (colour) or [H, W, 1] (gray).
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from kitbench.errors import InputError, nearest
from kitbench.suite import Frozen, Mode, parse

GRAY_WEIGHTS = np.array([0.298936021293775, 0.587043074451121, 0.114020904255103])
"""MATLAB's rgb2gray (the inverse of the NTSC matrix), which made BSD68 from CBSD68: equal there in every pixel."""


class Card(Frozen):
    """One data set."""

    name: str
    title: str
    tasks: tuple[Literal["denoise"], ...]
    colour: bool
    home: str
    licence: str
    citation: str
    note: str = ""
    package: str = ""
    """An installed Python package that ships the files; else they are looked for in the data folder."""
    folders: Annotated[tuple[str, ...], Field(min_length=1)] = (".",)
    """Names that the set's folder goes by, below the data folder."""
    layouts: tuple[tuple[str, ...], ...] = ()
    """Glob patterns of the images in that folder: the first group that matches a file is the set's layout."""
    count: Annotated[int, Field(ge=1)]
    checksum: Literal["none", "pixels", "file"] = "none"
    """What `sha256` is taken of: the decoded pixels (any lossless file will do) or the file's bytes (JPEG)."""
    sha256: Mapping[str, str] = Field(default_factory=dict)
    """By path relative to the set's folder; with `pixels`, by the file's stem."""


@dataclass(frozen=True)
class Photograph:
    """One image of a set, decoded: uint8 [H, W, C]. `name` is its path in the set, without suffix."""

    name: str
    pixels: np.ndarray
    sha256: str


@cache
def cards() -> dict[str, Card]:
    """All shipped cards, by name."""
    found = {}
    for file in sorted(resources.files("kitbench.datasets").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            card = parse(Card, tomllib.loads(file.read_text("utf-8")), f"data card {file.name}")
            found[card.name] = card
    return found


def card(name: str) -> Card:
    """The card of that name. Raises InputError, with the nearest known one."""
    if name not in cards():
        raise InputError(f"Unknown data set {name!r}; {nearest(name, cards())}")
    return cards()[name]


def locate(card: Card, root: Path | None) -> Path | None:
    """The folder of a set: inside an installed package, or below `root`; None where there is no such folder."""
    if card.package:
        spec = find_spec(card.package)
        return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if root is None:
        return None
    return next((root / folder for folder in card.folders if (root / folder).is_dir()), None)


def files(card: Card, folder: Path) -> list[Path]:
    """The image files of a set, sorted by path. Raises InputError for an empty folder or a wrong count."""
    for layout in card.layouts:
        found = sorted({path for pattern in layout for path in folder.glob(pattern) if path.is_file()})
        if found:
            break
    else:
        tree = " or ".join(" + ".join(layout) for layout in card.layouts)
        raise InputError(f"Data set {card.name}: no image in {folder}; expected {card.count} files as {tree}.")
    if len(found) != card.count:
        raise InputError(
            f"Data set {card.name}: {len(found)} images in {folder}, expected {card.count}; "
            f"restore the set as its authors publish it ({card.home})."
        )
    return found


def read(card: Card, root: Path | None, mode: Mode) -> list[Photograph]:
    """All images of a set, checked against its card and decoded for a colour mode.

    A colour image is made gray by MATLAB's rgb2gray; a gray one cannot be made colour. Raises InputError for a missing
    folder, a wrong count, a file that is no image or has another checksum, or the wrong number of channels.
    """
    folder = locate(card, root)
    if folder is None:
        where = f"package {card.package}" if card.package else f"{root} (looked for {', '.join(card.folders)})"
        raise InputError(f"Data set {card.name} is not in {where}; get it from {card.home}.")
    if mode == "colour" and not card.colour:
        raise InputError(
            f"Data set {card.name} is gray and cannot be used in mode 'colour'; choose a colour set, or mode 'gray'."
        )
    photographs = []
    for path in files(card, folder):
        pixels = decode(path, card)
        if mode == "gray" and pixels.shape[2] == 3:
            pixels = to_gray(pixels)
        name = path.relative_to(folder).with_suffix("").as_posix()
        photographs.append(Photograph(name, pixels, pixel_sha256(pixels)))
    return photographs


def decode(path: Path, card: Card) -> np.ndarray:
    """One image file as uint8 [H, W, 3] or [H, W, 1], its checksum compared with the card's. Raises InputError."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"Data set {card.name}: {path} is not a readable image ({error}); replace the file."
        ) from error
    if mode not in ("RGB", "L"):
        raise InputError(
            f"Data set {card.name}: {path} has pixel format {mode}, expected 8-bit RGB or gray; replace the file."
        )
    if (mode == "RGB") != card.colour:
        kind = {True: "colour", False: "gray"}
        raise InputError(
            f"Data set {card.name}: {path} is {kind[mode == 'RGB']}, expected {kind[card.colour]}; replace the file."
        )
    pixels = np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])
    if card.checksum != "none":
        if card.checksum == "pixels":
            key, found = path.stem, pixel_sha256(pixels)
        else:
            key = next((name for name in card.sha256 if path.as_posix().endswith("/" + name)), path.name)
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        expected = card.sha256.get(key)
        if found != expected:
            raise InputError(
                f"Data set {card.name}: {path} has {card.checksum} checksum {found[:12]}, "
                f"expected {(expected or 'no such file')[:12]}; "
                f"the file is altered or from another version of the set: restore it."
            )
    return pixels


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [H, W, 1] by MATLAB's rgb2gray."""
    return np.floor(pixels @ GRAY_WEIGHTS + 0.5).astype(np.uint8)[..., None]


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of an image's shape and pixels: the same for every lossless file of it."""
    header = f"{'x'.join(map(str, pixels.shape))}:{pixels.dtype}:".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def upright_sha256(pixels: np.ndarray) -> str:
    """The least checksum over the 8 orientations of an image: equal for an image and its turned or mirrored copy."""
    turned = [np.rot90(pixels, turns) for turns in range(4)]
    return min(pixel_sha256(view) for view in [*turned, *(view[:, ::-1] for view in turned)])


def assert_disjoint(train: dict[str, list[Photograph]], test: dict[str, list[Photograph]]) -> None:
    """Raises InputError where a test image is, up to flips and turns, also a training image."""
    seen = {upright_sha256(photo.pixels): f"{name}/{photo.name}" for name, photos in train.items() for photo in photos}
    for name, photos in test.items():
        for photo in photos:
            twin = seen.get(upright_sha256(photo.pixels))
            if twin is not None:
                raise InputError(
                    f"Training and test images overlap: {twin} (train) is {name}/{photo.name} (test); "
                    f"choose disjoint sets."
                )
