"""The files of a set: which are images, and which input belongs to which target."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitbench.data.cards import Card, Pairs
from kitbench.data.images import shape_of_blocks
from kitbench.errors import InputError
from kitbench.text import counted


@dataclass(frozen=True)
class ImageFiles:
    """The files of an image or pair of a set; `block` is its index in a .mat file."""

    name: str
    target: Path | None
    input: Path | None = None
    block: tuple[int, ...] = ()

    @property
    def paths(self) -> list[Path]:
        return [path for path in (self.input, self.target) if path is not None]


def matches(folder: Path, patterns: Iterable[str]) -> bool:
    """Whether any file in the folder matches any of the patterns."""
    return any(next(_matching(folder, pattern), None) is not None for pattern in patterns)


def glob(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files that match any of the patterns, sorted by path."""
    return sorted({path for pattern in patterns for path in _matching(folder, pattern)})


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    """The files that match a pattern; without hidden ones, which macOS writes beside files that it copies."""
    return (path for path in folder.glob(pattern) if path.name[0] != "." and path.is_file())


def unnumbered(card: Card, found: Iterable[ImageFiles]) -> list[str]:
    """The names that are missing from a numbered set."""
    if card.numbered is None:
        return []
    first, last = card.numbered
    digits = len(first) - len(first.rstrip("0123456789"))
    names = (f"{first[:-digits]}{n:0{digits}d}" for n in range(int(first[-digits:]), int(last[-digits:]) + 1))
    there = {entry.name.rsplit("/", 1)[-1] for entry in found}
    return [name for name in names if name not in there]


def listed(card: Card, folder: Path) -> list[ImageFiles]:
    """The images or pairs of the first of the card's layouts that has files. Raises InputError where none has."""
    for layout in card.layouts:
        if files := glob(folder, layout):
            left_out = {folder / name for name in card.without}
            return [ImageFiles(name_in(path, folder), path) for path in files if path not in left_out]
    if pairs := layout_of_pairs(card, folder):
        return _pair_up(card, pairs, folder)
    raise InputError(
        f"Data set {card.name}: no image in {folder}; expected {counted(card.count, 'file')} as {card.tree}."
    )


def layout_of_pairs(card: Card, folder: Path) -> Pairs | None:
    """The layout of pairs of the card that the folder has: by its inputs, because several may share targets."""
    by_inputs = (pairs for pairs in card.pairs if matches(folder, pairs.inputs))
    by_targets = (pairs for pairs in card.pairs if matches(folder, pairs.targets))
    return next(by_inputs, next(by_targets, None))


def name_in(path: Path, folder: Path) -> str:
    """The name of an image: its path inside the folder of the set, without suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _pair_up(card: Card, pairs: Pairs, folder: Path) -> list[ImageFiles]:
    found, lonely = match(pairs, folder)
    for path, target in found:
        if target is None and pairs.targets:
            raise InputError(
                f"Data set {card.name}: {path} has no target; expected one of that name as "
                f"{' or '.join(pairs.targets)}: {card.advice}."
            )
    if lonely:
        raise InputError(
            f"Data set {card.name}: {lonely[0]} has no input; expected one of that name as "
            f"{' or '.join(pairs.inputs)}: {card.advice}."
        )
    return [block for path, target in found for block in _blocks_of(ImageFiles(name_in(path, folder), target, path))]


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
    """The files that match, sorted, each with the texts that match the stars of the pattern."""
    named = None
    if only:
        list_file = folder / only
        if not list_file.is_file():
            raise InputError(f"{list_file} is missing; it names the files of this split: restore the set.")
        named = list_file.read_text("utf-8").split()
    found: dict[Path, tuple[str, ...]] = {}
    for pattern in patterns:
        stars = re.compile("".join("([^/]*)" if c == "*" else re.escape(c) for c in pattern))
        for path in _matching(folder, pattern):
            if match := stars.fullmatch(path.relative_to(folder).as_posix()):
                found[path] = match.groups()
    if named is not None:
        ends = {tuple(name.split("/")[-4:]) for name in named}
        found = {path: key for path, key in found.items() if _end(path.relative_to(folder)) in ends}
    return dict(sorted(found.items()))


def _end(path: Path) -> tuple[str, ...]:
    return path.parts[-4:]


def _blocks_of(entry: ImageFiles) -> list[ImageFiles]:
    """The images inside a pair of .mat files, or the pair of image files itself."""
    if entry.input is None or entry.input.suffix != ".mat" or entry.target is None:
        return [entry]
    return [
        ImageFiles(f"{entry.name}/{'_'.join(f'{i + 1:02d}' for i in place)}", entry.target, entry.input, place)
        for place in np.ndindex(shape_of_blocks(entry.input)[:-3])
    ]
