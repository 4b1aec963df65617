"""A plain folder of the user's own pictures as a data set: no card is written, the path names the set.

A set is named by the name of a card, or by a path, which is whatever contains a slash: `./photos`. The folder contains
clean pictures, or pairs: `input/` with degraded pictures and `target/` with clean ones of the same names.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from PIL import Image

from kitbench.data.cards import Card, Pairs, card
from kitbench.data.headers import orientation, require_plain
from kitbench.data.layout import ImageFiles
from kitbench.errors import InputError
from kitbench.spec.tasks import Kind

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of the files that count as pictures, in lower or upper case."""
NAMED = 3
"""Files that a message names."""
INPUT, TARGET = "input", "target"
PAIRED: tuple[Kind, ...] = ("deblur", "derain", "denoise-real")
"""Tasks whose inputs may be pictures. Gaussian noise is always made, because its level is a condition."""


def card_of_set(name: str) -> Card:
    """The card of a set: a shipped one, or one made for the folder that `name` is the path of.

    Raises InputError for an unknown name, and for a path that is not a folder of pictures.
    """
    if "/" in name:
        return _card_of_folder(name)
    try:
        return card(name)
    except InputError as error:
        if Path(name).is_dir():
            raise InputError(
                f"Unknown data set {name!r}; a folder of your own pictures is named by a path with a slash: ./{name}."
            ) from error
        raise


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself, not in its subfolders, sorted by name; without hidden files, which
    macOS writes beside copied ones. Raises InputError.
    """
    try:
        listed = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
        return sorted(path for path in listed if path.is_file())
    except OSError as error:
        raise InputError(f"Folder {folder} cannot be read ({error.strerror}); make it readable.") from error


def other_files(folder: Path) -> list[Path]:
    """The files in a folder that are no pictures of a format that is read, sorted, without hidden ones."""
    named = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [path for path in named if not path.is_dir() and (path.suffix.lower() not in SUFFIXES or not path.is_file())]


def files_beside(card: Card) -> list[Path]:
    """Of a user's folder, the files beside its pictures that are no pictures of a format that is read."""
    folders = [Path(card.own, half) for half in (INPUT, TARGET)] if card.pairs else [Path(card.own)]
    return [path for folder in folders for path in other_files(folder)]


def left_out(others: Sequence[Path]) -> str:
    """The line that names files which are no pictures of a format that is read."""
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return f"left out: {', '.join(path.name for path in others[:NAMED])}{more}, not PNG, JPEG, TIFF, WebP or BMP"


def no_pictures(folder: Path) -> str:
    """The sentence for a folder without pictures, naming a subfolder that has some."""
    inside = next((path for path in sorted(folder.iterdir()) if path.is_dir() and _has_pictures(path)), None)
    hint = f"; its subfolder {inside} has some: name that" if inside else f"; put some there ({', '.join(SUFFIXES)})"
    others = [path.name for path in other_files(folder)[:NAMED]]
    hint = f" of a format that is read (found {', '.join(others)}){hint}" if others and not inside else hint
    return f"Folder {folder} has no pictures{hint}."


def _has_pictures(folder: Path) -> bool:
    """Whether a folder has pictures; not, as far as can be told, where it cannot be read (lost+found of a disk)."""
    try:
        return bool(pictures_in(folder))
    except InputError:
        return False


def require_readable_as_shown(entry: ImageFiles) -> None:
    """Raises InputError for a file of 16 bits or of several pictures, and for a pair whose pictures a viewer turns
    differently: pixels are read as they are stored.
    """
    for path in entry.paths:
        require_plain(path)
    turned = {path: orientation(path) for path in entry.paths}
    if len(set(turned.values())) > 1:
        found = " and ".join(f"{path} has {value}" for path, value in turned.items())
        raise InputError(
            f"The pictures of a pair have different EXIF orientations ({found}), and pixels are read as they are "
            f"stored; save both upright, without an EXIF orientation."
        )


def _card_of_folder(name: str) -> Card:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        where = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise InputError(
            f"{name} is not a folder{where}; give the path of a folder of pictures, or the name of a data set."
        )
    halves = [folder / half for half in (INPUT, TARGET)]
    there = [half for half in halves if half.is_dir()]
    if len(there) == 1:
        [missing] = set(halves) - set(there)
        raise InputError(
            f"Folder {folder} has {there[0].name}/ without {missing.name}/; put degraded pictures into {INPUT}/ and "
            f"clean ones of the same names into {TARGET}/, or name a folder of clean pictures."
        )
    files = [pictures_in(half) for half in there] if there else [pictures_in(folder)]
    for place, found in zip(there or [folder], files, strict=True):
        if not found:
            raise InputError(no_pictures(place))
        one_picture_a_name(found)
    patterns = [tuple(sorted({f"*{path.suffix}" for path in found})) for found in files]
    pairs: tuple[Pairs, ...] = ()
    if there:
        inputs, targets = (tuple(f"{half.name}/{p}" for p in own) for half, own in zip(there, patterns, strict=True))
        pairs = (Pairs(inputs=inputs, targets=targets),)
    return Card(
        name=name, title="your own pictures", tasks=PAIRED if there else get_args(Kind), home="", licence="",
        citation="", own=os.fspath(folder), count=len(files[0]), colour=any(map(_is_colour, files[-1])),
        layouts=() if there else tuple(patterns), pairs=pairs,
    )  # fmt: skip


def _is_colour(path: Path) -> bool:
    """By a picture's header. One that cannot be opened counts as colour: what is wrong is said where it is read."""
    try:
        with Image.open(path) as image:
            return image.mode not in ("1", "L", "LA", "I", "I;16", "F")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


def one_picture_a_name(files: list[Path]) -> None:
    """Pictures are named without their suffix. Raises InputError where two have one name."""
    twice = [stem for stem, count in Counter(path.stem for path in files).items() if count > 1]
    if twice:
        first = [path.name for path in files if path.stem == twice[0]]
        raise InputError(f"Folder {files[0].parent} has {' and '.join(first)}, two pictures of one name; remove one.")
