"""The differences between a set's folder and its card: one line for every missing, extra and altered file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitbench.data.cards import Card
from kitbench.data.layout import ImageFiles, glob, layout_of_pairs, match, unnumbered
from kitbench.data.locate import files_of_set
from kitbench.data.photograph import check_averaging, key_of, sample, verify
from kitbench.data.pixels import file_sha256, load_pixels, pixel_sha256, pixels_of
from kitbench.data.repetition import generated_set
from kitbench.errors import InputError


@dataclass(frozen=True)
class File:
    """A file of a set: its name in the card, its checksum and size, or what is wrong with it."""

    key: str
    path: Path
    sha256: str | None = None
    fault: str | None = None


def audit(card: Card, folder: Path) -> list[str]:
    """All differences, sorted; empty where the folder agrees with the card. Reads every file.

    The images of a generated set are made, and compared with the card's checksums.
    """
    if card.generated:
        return _audit_generated(card)
    paths, lines = _files(card, folder)
    if not paths:
        return [f"missing: all of it; expected {card.count} files as {card.tree}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda path: _inspect(card, folder, path), paths))
    lines += [f"altered: {file.fault}" for file in files if file.fault]
    lines += _by_name(card, [file for file in files if not file.fault]) if card.sha256 else []
    if card.numbered and not card.sha256:
        lines += [f"missing: {name}" for name in unnumbered(card, [ImageFiles(path.stem, path) for path in paths])]
    if lines:
        return sorted(lines)
    try:
        found = files_of_set(card, folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            lines = [line for line in pool.map(lambda entry: _verify(card, folder, entry), found) if line]
        if not card.blind:
            check_averaging(card, (load_pixels(card, entry) for entry in sample(found)))
    except InputError as error:
        lines.append(f"altered: {_short(card, error)}")
    return lines


def _audit_generated(card: Card) -> list[str]:
    try:
        generated_set(card, "colour")
    except InputError as error:
        return [f"altered: {_short(card, error)}"]
    return []


def _files(card: Card, folder: Path) -> tuple[list[Path], list[str]]:
    """The files of the layout that the folder has, and a line for each half of a pair without the other."""
    pairs = layout_of_pairs(card, folder)
    if pairs is None:
        layouts = (glob(folder, layout) for layout in card.layouts)
        left_out = {folder / name for name in card.without}
        return [path for path in next((paths for paths in layouts if paths), []) if path not in left_out], []
    found, lonely = match(pairs, folder)
    lines = [
        f"missing: the target of {path.relative_to(folder)}, as {' or '.join(pairs.targets)}"
        for path, target in found
        if target is None and pairs.targets
    ]
    lines += [f"missing: the input of {path.relative_to(folder)}, as {' or '.join(pairs.inputs)}" for path in lonely]
    paths: Iterable[Path | None] = (path for pair in found for path in pair)
    return sorted({path for path in (*paths, *lonely) if path is not None}), lines


def _inspect(card: Card, folder: Path, path: Path) -> File:
    """Decode an image file, and compute its checksum where the card states checksums."""
    key = key_of(card, folder, path)
    try:
        pixels: np.ndarray | None = None if path.suffix == ".mat" else pixels_of(card, path, ())
    except InputError as error:
        return File(key, path, fault=_short(card, error))
    if card.checksum == "none":
        return File(key, path)
    return File(
        key,
        path,
        file_sha256(path) if pixels is None or card.checksum == "file" else pixel_sha256(pixels),
    )


def _by_name(card: Card, files: list[File]) -> list[str]:
    """Missing, extra and altered files, by names and checksums of the card; a renamed file counts as present."""
    known, there = set(card.sha256.values()), {file.sha256 for file in files}
    lines = []
    for file in files:
        expected = card.sha256.get(file.key)
        if expected is None and file.sha256 not in known:
            lines.append(f"extra: {file.key}")
        elif expected is not None and file.sha256 != expected:
            lines.append(f"altered: {file.key}, {card.checksum} checksum {file.sha256}, expected {expected}")
    names = {file.key for file in files}
    lines += [f"missing: {key}" for key, value in card.sha256.items() if key not in names and value not in there]
    return lines


def _verify(card: Card, folder: Path, entry: ImageFiles) -> str | None:
    if entry.target is None:
        return None
    try:
        verify(card, folder, entry, load_pixels(card, entry))
    except InputError as error:
        return f"altered: {_short(card, error)}"
    return None


def _short(card: Card, error: InputError) -> str:
    return str(error).removeprefix(f"Data set {card.name}: ")
