"""The differences between a set's folder and its card: one line a cause.

A cause is a missing, extra or altered file, half of a pair without the other, or a folder that contains another set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kitbench.data.cards import Card
from kitbench.data.headers import require_plain
from kitbench.data.layout import ImageFiles, glob, layout_of_pairs, match, unnumbered
from kitbench.data.locate import described, files_of_set, instead
from kitbench.data.own import require_readable_as_shown
from kitbench.data.photograph import check_averaging, key_of, sample, verify
from kitbench.data.pixels import file_sha256, load_pixels, pixel_sha256, pixels_of
from kitbench.data.repetition import generated_set
from kitbench.errors import InputError
from kitbench.text import counted

LISTED = 10
"""Names that are listed, where a cause concerns many files."""


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
    paths, halves = _files(card, folder)
    if not paths:
        return [f"missing: all of it; expected {counted(card.count, 'file')} as {card.tree}"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        files = list(pool.map(lambda path: _inspect(card, folder, path), paths))
    lines = [f"altered: {file.fault}" for file in files if file.fault]
    if len(files) > 1 and len({_cause(file.fault, [file.path]) for file in files}) == 1 and lines:
        return [_alike(lines)]
    if card.sha256:
        if _of_another_set(card, files):
            return [*lines, f"another set: no file has a checksum of the card; {instead(card, folder)}"]
        lines += _by_name(card, files)
    elif card.numbered and described(card, folder).name == card.name:
        lines += _each("missing", unnumbered(card, [ImageFiles(path.stem, path) for path in paths]))
    # A half whose other half is missing or extra by the names on the card is no cause of its own.
    lines += [] if card.sha256 and any(line.startswith(("missing", "extra")) for line in lines) else halves
    return sorted(lines) or _whole(card, folder)


def _whole(card: Card, folder: Path) -> list[str]:
    """What is wrong with a set whose files are all readable: their number, sizes and averaging."""
    try:
        found = files_of_set(card, folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = list(pool.map(lambda entry: _verify(card, folder, entry), found))
        lines = [fault for fault in faults if fault]
        causes = {_cause(fault, entry.paths) for fault, entry in zip(faults, found, strict=True)}
        if len(found) > 1 and len(causes) == 1 and lines:
            return [_alike(lines)]
        if not card.blind:
            check_averaging(card, (load_pixels(card, entry) for entry in sample(found)))
    except InputError as error:
        return [f"altered: {_short(card, error)}"]
    return lines


def _audit_generated(card: Card) -> list[str]:
    try:
        generated_set(card, "colour")
    except InputError as error:
        return [f"altered: {error}"]
    return []


def _of_another_set(card: Card, files: Sequence[File]) -> bool:
    """Whether several files were read, and none of them is a file of the set under any name."""
    read = [file for file in files if not file.fault]
    return len(read) > 1 and set(card.sha256.values()).isdisjoint(file.sha256 for file in read)


def _alike(lines: Sequence[str]) -> str:
    """One line, where every file of the folder has one of the same wording: its cause is not in the files."""
    return f"{lines[0].rstrip('.')} (and so on for all {len(lines)})"


def _cause(fault: str | None, paths: Iterable[Path]) -> str | None:
    """A fault without the names and the numbers in its sentence."""
    if fault is None:
        return None
    for path in paths:
        fault = fault.replace(str(path), "")
    return re.sub(r"\d+", "", fault)


def _each(kind: str, names: Sequence[str]) -> list[str]:
    """A line for each name, or one line for more than LISTED, which have one cause."""
    if len(names) <= LISTED:
        return [f"{kind}: {name}" for name in names]
    return [f"{kind}: {len(names)} files: {', '.join(names[:LISTED])} and {len(names) - LISTED} more"]


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
        if card.own:
            require_plain(path)
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
    lines, extra = [], []
    for file in files:
        expected = card.sha256.get(file.key)
        if file.fault:  # has its line
            continue
        if expected is None and file.sha256 not in known:
            extra.append(file.key)
        elif expected is not None and file.sha256 != expected:
            lines.append(f"altered: {file.key}, {card.checksum} checksum {file.sha256}, expected {expected}")
    names = {file.key for file in files}
    missing = [key for key, value in card.sha256.items() if key not in names and value not in there]
    return [*lines, *_each("extra", extra), *_each("missing", missing)]


def _verify(card: Card, folder: Path, entry: ImageFiles) -> str | None:
    if entry.target is None:
        return None
    try:
        if card.own:
            require_readable_as_shown(entry)
        verify(card, folder, entry, load_pixels(card, entry))
    except InputError as error:
        return f"altered: {_short(card, error)}"
    return None


def _short(card: Card, error: InputError) -> str:
    return str(error).removeprefix(f"Data set {card.name}: ")
