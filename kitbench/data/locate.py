"""Finding the folder of a set, and checking that it contains the set that the card describes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from kitbench.data.cards import Card, cards
from kitbench.data.images import shape_of_blocks
from kitbench.data.layout import ImageFiles, listed, matches, unnumbered
from kitbench.data.pixels import load_pixels, size_of
from kitbench.errors import InputError
from kitbench.text import counted


def check_root(root: Path | None) -> None:
    """Raises InputError where the data folder does not exist."""
    if root is not None and not root.is_dir():
        raise InputError(
            f"Data folder {root} does not exist; give a folder that contains data sets (kitbench list names them)."
        )


def locate(card: Card, root: Path | None) -> Path | None:
    """The folder of a set: inside an installed package (of a generated set, that of its source), or below `root`; None
    where no folder contains a file of it.

    An empty folder of the set's name is returned too: the user has begun to put the set there.
    """
    if card.own:
        return Path(card.own)
    if card.generated:
        return Path(__file__).parent
    if card.package:
        spec = find_spec(card.package)
        return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if root is None:
        return None
    there = [root / folder for folder in card.folders if (root / folder).is_dir()]
    holding = (folder for folder in there if any(matches(folder, patterns) for patterns in card.trees))
    empty = (folder for folder in there if next(folder.iterdir(), None) is None)
    return next(holding, next(empty, None))


def named_root(root: Path) -> str:
    """A data folder as messages name it, with a hint where it is the folder of one set."""
    above = root.resolve()
    for card in cards().values():
        folder = None if card.package or card.generated else locate(card, above.parent)
        if folder is not None and folder.is_relative_to(above):
            return f"{root}, which looks like the folder of one set (--data takes the folder above it)"
    return str(root)


def present(card: Card, root: Path | None) -> Path | None:
    """The folder of a set; None where it is missing or contains another version of the set."""
    folder = locate(card, root)
    return folder if folder is not None and described(card, folder).name == card.name else None


def files_of_set(card: Card, folder: Path) -> list[ImageFiles]:
    """The images of a set, sorted by path.

    Raises InputError for a folder without images, an input without its target, a target without its input, and a
    wrong count; where the folder contains a set that another card describes, the message names it. Of a .mat file
    whose targets are not public, the shape of its array is compared with the card's.
    """
    found = listed(card, folder)
    for path in (path for entry in found for path in entry.paths if card.blocks):
        shape, expected = (" x ".join(map(str, s)) for s in (shape_of_blocks(path), card.blocks))
        if shape != expected:
            raise InputError(
                f"Data set {card.name}: {path} holds an array of {shape}, expected {expected}; {card.advice}."
            )
    if len(found) != card.count:
        missing = unnumbered(card, found)
        which = f" ({', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} missing)" if missing else ""
        raise InputError(
            f"Data set {card.name}: {counted(len(found), 'pair' if card.pairs else 'image')} in {folder}, "
            f"expected {card.count}{which}; {instead(card, folder)}."
        )
    return found


def described(card: Card, folder: Path) -> Card:
    """The card that describes the contents of a folder: the given one, or that of another version of the set."""
    if card.own or card.generated or fits(card, folder):
        return card
    others = (other for other in cards().values() if set(other.folders) & set(card.folders))
    return next((other for other in others if other.name != card.name and fits(other, folder)), card)


def fits(card: Card, folder: Path) -> bool:
    """Whether a folder has the number of images that the card states, the first of them of the right size."""
    try:
        found = listed(card, folder)
        if len(found) != card.count or card.size is None or found[0].block:
            return len(found) == card.count
        return size_of(load_pixels(card, found[0])) == card.size
    except InputError:
        return False


def instead(card: Card, folder: Path) -> str:
    """Advice where a folder does not contain the set of the card."""
    other = described(card, folder)
    if other.name == card.name:
        return card.advice
    return f"the folder contains {other.name} ({other.title}): use that name, or get {card.name} ({card.home})"
