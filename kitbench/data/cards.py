"""Data cards: what a set is, where its files lie, and whether they are the right ones.

A card (`datasets/*.toml`) states name, expected tree, counts, checksums where known, licence and citation. Nothing has
to be converted first: a set is read as its authors publish it, and what is missing is named. An image is uint8
[H, W, 3] (colour) or [H, W, 1] (gray); a pair has its real input beside the clean target.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator

from kitbench.data.images import blocks, decode, shape_of_blocks, to_gray
from kitbench.errors import InputError, nearest
from kitbench.suite import Frozen, Kind, Mode, parse

Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
"""Glob patterns relative to the set's folder."""

T = TypeVar("T")

RESIDENT = 0.5
"""Share of the free memory that the decoded images of one set may take; what is beyond is decoded at each use."""


class Pairs(Frozen):
    """Where the inputs of a set lie, and where their clean targets.

    The text that the stars of a pattern stand for is the name of a pair: `input/*.png` and `target/*.png` pair
    input/7.png with target/7.png. A target with fewer stars serves all inputs whose names begin like its own:
    `im*_kernel*_img.png` and `gt/im*.png`. In a .mat file every image is one input, named by its place.
    """

    inputs: Patterns
    targets: tuple[str, ...]
    """Empty: the set's server keeps them."""
    only: str = ""
    """A text file of the set: only the pairs whose files it names belong to this split."""
    spare: bool = False
    """Targets without an input are no fault: the folder of targets serves other splits too."""


class Address(Frozen):
    """A file that may be fetched."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


class Card(Frozen):
    """One data set, or one split of it."""

    name: str
    title: str
    tasks: tuple[Kind, ...]
    """What the set may test."""
    colour: bool
    home: str
    licence: str
    citation: str
    note: str = ""
    package: str = ""
    """An installed Python package that ships the files; else they are looked for in the data folder."""
    folders: Patterns = (".",)
    """Names that the set's folder goes by, below the data folder."""
    layouts: tuple[tuple[str, ...], ...] = ()
    """Glob patterns of the clean images in that folder: the first group that matches a file is the set's layout."""
    without: tuple[str, ...] = ()
    """Files of the layout that this set leaves out."""
    pairs: tuple[Pairs, ...] = ()
    """Instead of `layouts`, where the set has inputs of its own: the first that matches a file is the set's layout."""
    count: Annotated[int, Field(ge=1)]
    """Images, or pairs; files of a set whose targets its server keeps."""
    numbered: tuple[str, str] | None = None
    """First and last name, without suffix, of a set of clean images that are numbered without gaps."""
    size: tuple[int, int] | None = None
    """Longer and shorter side in pixels of all images, upright or turned; None where they differ."""
    averaged: Literal["", "values", "light"] = ""
    """What the blurred inputs are averages of: the frames' 8-bit values, or their light (gamma 2.2 undone)."""
    checksum: Literal["none", "pixels", "file"] = "none"
    """What `sha256` is taken of: the decoded pixels (any lossless file will do) or the file's bytes (JPEG)."""
    sha256: Mapping[str, str] = Field(default_factory=dict)
    """By path relative to the set's folder; with `pixels`, without suffix."""
    urls: tuple[Address, ...] = ()
    """What `kitbench data fetch` may download: archives, or the files themselves."""
    ask: str = ""
    """Where people get the set where it may not, or cannot, be fetched by a program."""

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if bool(self.layouts) == bool(self.pairs):
            raise ValueError("give either layouts (clean images) or pairs (inputs and targets)")
        return self

    @property
    def trees(self) -> list[tuple[str, ...]]:
        """The patterns of every layout, inputs before targets."""
        return [*self.layouts, *((*pairs.inputs, *pairs.targets) for pairs in self.pairs)]

    @property
    def tree(self) -> str:
        """The layouts, for people."""
        return " or ".join(" + ".join(patterns) for patterns in self.trees)

    @property
    def blind(self) -> bool:
        """The targets are kept by the set's server."""
        return bool(self.pairs) and not self.pairs[0].targets


class Photograph:
    """One image of a set: `pixels` is the clean one, `degraded` the real input of a pair or None; both uint8 [H, W, C].

    `name` is its path in the set, without suffix; `sha256` covers all its pixels. Images that do not fit in memory
    (`RESIDENT`) are decoded when their pixels are asked for, and only the last few are kept.
    """

    def __init__(self, name: str, pixels: np.ndarray, sha256: str, degraded: np.ndarray | None = None) -> None:
        self.name, self.sha256 = name, sha256
        self.shape: tuple[int, ...] = pixels.shape
        self._images: Images | None = (pixels, degraded)
        self._decode: Callable[[], Images] | None = None

    def leave_on_disk(self, again: Callable[[], Images]) -> None:
        """Forget the pixels; `again` decodes them."""
        self._images, self._decode = None, again

    @property
    def pixels(self) -> np.ndarray:
        return self._read()[0]

    @property
    def degraded(self) -> np.ndarray | None:
        return self._read()[1]

    def _read(self) -> Images:
        return self._images if self._images is not None else _decoded(self)


Images = tuple[np.ndarray, np.ndarray | None]


@lru_cache(maxsize=4)
def _decoded(photo: Photograph) -> Images:
    assert photo._decode is not None
    return photo._decode()


@dataclass(frozen=True)
class Entry:
    """Where an image, or pair, of a set lies; `block` is its place in a .mat file."""

    name: str
    target: Path | None
    input: Path | None = None
    block: tuple[int, ...] = ()

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.input, self.target) if path is not None]


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


def check_root(root: Path | None) -> None:
    """Raises InputError where a data folder is named that does not exist."""
    if root is not None and not root.is_dir():
        raise InputError(
            f"Data folder {root} does not exist; give a folder that holds data sets (kitbench list names them)."
        )


def locate(card: Card, root: Path | None) -> Path | None:
    """The folder of a set: inside an installed package, or below `root`; None where no folder holds a file of it.

    An empty folder of the set's name counts: somebody began to put it there.
    """
    if card.package:
        spec = find_spec(card.package)
        return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if root is None:
        return None
    there = [root / folder for folder in card.folders if (root / folder).is_dir()]
    holding = (folder for folder in there if any(_matches(folder, patterns) for patterns in card.trees))
    empty = (folder for folder in there if next(folder.iterdir(), None) is None)
    return next(holding, next(empty, None))


def present(card: Card, root: Path | None) -> Path | None:
    """The folder of a set, unless what lies there is another version of it."""
    folder = locate(card, root)
    return folder if folder is not None and described(card, folder).name == card.name else None


def _matches(folder: Path, patterns: Iterable[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def glob(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files that match any of the patterns, sorted by path."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def entries(card: Card, folder: Path) -> list[Entry]:
    """The images of a set, sorted by path.

    Raises InputError for a folder without images, an input without its target, a target without its input, and a
    wrong count, naming the set that lies there instead where a card describes it.
    """
    found = _entries(card, folder)
    if len(found) != card.count:
        missing = unnumbered(card, found)
        which = f" ({', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} missing)" if missing else ""
        raise InputError(
            f"Data set {card.name}: {len(found)} {'pairs' if card.pairs else 'images'} in {folder}, "
            f"expected {card.count}{which}; {_instead(card, folder)}."
        )
    return found


def unnumbered(card: Card, found: Iterable[Entry]) -> list[str]:
    """The names that are missing from a numbered set."""
    if card.numbered is None:
        return []
    first, last = card.numbered
    digits = len(first) - len(first.rstrip("0123456789"))
    names = (f"{first[:-digits]}{n:0{digits}d}" for n in range(int(first[-digits:]), int(last[-digits:]) + 1))
    there = {entry.name.rsplit("/", 1)[-1] for entry in found}
    return [name for name in names if name not in there]


def _entries(card: Card, folder: Path) -> list[Entry]:
    for layout in card.layouts:
        if files := glob(folder, layout):
            left_out = {folder / name for name in card.without}
            return [Entry(name_in(path, folder), path) for path in files if path not in left_out]
    if pairs := layout_of_pairs(card, folder):
        return _pair_up(card, pairs, folder)
    raise InputError(f"Data set {card.name}: no image in {folder}; expected {card.count} files as {card.tree}.")


def layout_of_pairs(card: Card, folder: Path) -> Pairs | None:
    """Which of the card's layouts of pairs the folder has. Some share their targets, so the inputs tell first."""
    by_inputs = (pairs for pairs in card.pairs if _matches(folder, pairs.inputs))
    by_targets = (pairs for pairs in card.pairs if _matches(folder, pairs.targets))
    return next(by_inputs, next(by_targets, None))


def name_in(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _pair_up(card: Card, pairs: Pairs, folder: Path) -> list[Entry]:
    found, lonely = match(pairs, folder)
    for path, target in found:
        if target is None and pairs.targets:
            raise InputError(
                f"Data set {card.name}: {path} has no target; expected one of that name as "
                f"{' or '.join(pairs.targets)}: restore the set as its authors publish it ({card.home})."
            )
    if lonely:
        raise InputError(
            f"Data set {card.name}: {lonely[0]} has no input; expected one of that name as "
            f"{' or '.join(pairs.inputs)}: restore the set as its authors publish it ({card.home})."
        )
    return [block for path, target in found for block in _blocks_of(Entry(name_in(path, folder), target, path))]


def match(pairs: Pairs, folder: Path) -> tuple[list[tuple[Path, Path | None]], list[Path]]:
    """(input, target or None) by name, sorted by input; and the targets that have no input."""
    inputs, targets = (_starred(folder, patterns, pairs.only) for patterns in (pairs.inputs, pairs.targets))
    by_name = {stars: path for path, stars in targets.items()}
    found = [
        (path, next((by_name[key] for n in range(len(stars), -1, -1) if (key := stars[:n]) in by_name), None))
        for path, stars in inputs.items()
    ]
    used = {target for _, target in found}
    return found, [] if pairs.spare else [path for path in targets if path not in used]


def _starred(folder: Path, patterns: tuple[str, ...], only: str) -> dict[Path, tuple[str, ...]]:
    """The files that match, sorted, with the texts that the stars of the pattern stand for."""
    named = None
    if only:
        list_file = folder / only
        if not list_file.is_file():
            raise InputError(f"{list_file} is missing; it names the files of this split: restore the set.")
        named = list_file.read_text("utf-8").split()
    found: dict[Path, tuple[str, ...]] = {}
    for pattern in patterns:
        stars = re.compile("".join("([^/]*)" if c == "*" else re.escape(c) for c in pattern))
        for path in folder.glob(pattern):
            if path.is_file() and (match := stars.fullmatch(path.relative_to(folder).as_posix())):
                found[path] = match.groups()
    if named is not None:
        ends = {tuple(name.split("/")[-4:]) for name in named}
        found = {path: key for path, key in found.items() if _end(path.relative_to(folder)) in ends}
    return dict(sorted(found.items()))


def _end(path: Path) -> tuple[str, ...]:
    return path.parts[-4:]


def _blocks_of(entry: Entry) -> list[Entry]:
    """The images inside a pair of .mat files, or the pair of image files itself."""
    if entry.input is None or entry.input.suffix != ".mat" or entry.target is None:
        return [entry]
    return [
        Entry(f"{entry.name}/{'_'.join(f'{i + 1:02d}' for i in place)}", entry.target, entry.input, place)
        for place in np.ndindex(shape_of_blocks(entry.input)[:-3])
    ]


def described(card: Card, folder: Path) -> Card:
    """The card that describes what lies in a folder: the given one, or that of another version of the set."""
    if fits(card, folder):
        return card
    others = (other for other in cards().values() if set(other.folders) & set(card.folders))
    return next((other for other in others if other.name != card.name and fits(other, folder)), card)


def fits(card: Card, folder: Path) -> bool:
    """Whether a folder has as many images as the card says, the first of them of the right size."""
    try:
        found = _entries(card, folder)
        if len(found) != card.count or card.size is None or found[0].block:
            return len(found) == card.count
        return _size(load(card, found[0])) == card.size
    except InputError:
        return False


def _instead(card: Card, folder: Path) -> str:
    """What to do about a set that is not the card's."""
    other = described(card, folder)
    if other.name == card.name:
        return f"restore the set as its authors publish it ({card.home})"
    return f"what lies there is {other.name} ({other.title}): name that set, or get the other one ({card.home})"


def read(card: Card, root: Path | None, mode: Mode) -> list[Photograph]:
    """All images of a set, checked against its card and decoded for a colour mode.

    A colour image is made gray by MATLAB's rgb2gray; a gray one cannot be made colour. Decoded images stay in memory
    as far as half of what is free allows (`RESIDENT`; GoPro's training pairs take 11.6 GB, SIDD-medium's 29 GB), the
    others are decoded again at each use. Raises InputError for a missing folder, a wrong count, a pair without its
    other half or of two sizes, another version of the set, a file that is no 8-bit image or has another checksum, and
    the wrong number of channels.
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
        raise InputError(f"Data set {card.name} has no targets here: its server scores a submission. {card.ask}")
    found = entries(card, folder)
    room = _Room()

    def one(entry: Entry) -> Photograph:
        images = load(card, entry)
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
        import psutil

        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.left = RESIDENT * psutil.virtual_memory().available / processes
        self.lock = threading.Lock()

    def take(self, photo: Photograph) -> bool:
        needed = sum(image.nbytes for image in (photo.pixels, photo.degraded) if image is not None)
        with self.lock:
            fits = needed <= self.left
            self.left -= needed if fits else 0
        return fits


def load(card: Card, entry: Entry) -> Images:
    """The pixels of an entry, as its files have them: target, and input of a pair."""
    assert entry.target is not None
    target = pixels_of(card, entry.target, entry.block)
    return target, None if entry.input is None else pixels_of(card, entry.input, entry.block)


def pixels_of(card: Card, path: Path, block: tuple[int, ...]) -> np.ndarray:
    """One image of the right number of channels: a file, or a block of a .mat file. Raises InputError."""
    try:
        if block:
            array = blocks(path)
            if any(i >= n for i, n in zip(block, array.shape[:-3], strict=True)):
                raise InputError(f"{path} holds {len(array)} images, fewer than its other half; restore the file.")
            pixels = array[block]
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


def _size(images: Images) -> tuple[int, int]:
    """Width and height of an image as if it lay on its longer side."""
    height, width = images[0].shape[:2]
    return max(height, width), min(height, width)


def verify(card: Card, folder: Path, entry: Entry, images: Images) -> None:
    """Compare an entry with its card: sizes and checksums. Raises InputError, naming the file."""
    target, degraded = images
    if degraded is not None and degraded.shape != target.shape:
        sizes = [f"{image.shape[1]} x {image.shape[0]}" for image in (degraded, target)]
        raise InputError(
            f"Data set {card.name}: {entry.input} is {sizes[0]} px and its target {entry.target} is {sizes[1]} px; "
            f"a pair has one size: restore the set."
        )
    if card.size is not None and _size(images) != card.size:
        found, expected = f"{target.shape[1]} x {target.shape[0]}", " x ".join(map(str, card.size))
        raise InputError(
            f"Data set {card.name}: {entry.target} is {found} px, expected {expected}; {_instead(card, folder)}."
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


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _photograph(entry: Entry, images: Images, mode: Mode) -> Photograph:
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


def _again(card: Card, entry: Entry, mode: Mode) -> Images:
    return _in_mode(load(card, entry), mode)


def sample(items: Sequence[T]) -> Sequence[T]:
    """Some 64 items, evenly spread: enough to tell what the blurred images of a set are averages of."""
    return items[:: max(1, len(items) // 64)]


def check_averaging(card: Card, images: Iterable[Images]) -> None:
    """Refuse blurred images that are averages of something else than the card says.

    An average of frames keeps the mean of what was averaged: of the 8-bit values, or of the light. By Jensen's
    inequality an average of light is brighter in its values than the frames are, so the two can be told apart.
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
            f"{card.averaged}; what lies there is {other.name if other else 'another version of the set'}."
        )


def pixel_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of an image's shape and pixels: the same for every lossless file of it."""
    header = f"{'x'.join(map(str, pixels.shape))}:{pixels.dtype}:".encode()
    return hashlib.sha256(header + np.ascontiguousarray(pixels).tobytes()).hexdigest()
