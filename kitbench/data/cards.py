"""Data cards: what a data set contains, and where to get it.

A card (`datasets/*.toml`) states name, expected files, counts, checksums where known, licence and citation. Read next:
layout.py (which files are images, which are pairs), locate.py (where a set is), photograph.py (reading a set).
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kitbench.errors import InputError, nearest
from kitbench.spec.fields import Frozen
from kitbench.spec.messages import parse
from kitbench.spec.tasks import Kind
from kitbench.text import counted

Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
"""Glob patterns relative to the set's folder."""


class Pairs(Frozen):
    """Patterns of the inputs of a set and of their clean targets.

    The text that the stars of a pattern match is the name of a pair: `input/*.png` and `target/*.png` pair
    input/7.png with target/7.png. A target with fewer stars belongs to all inputs whose names begin with its own:
    `im*_kernel*_img.png` and `gt/im*.png`. In a .mat file every image is one input, named by its index.
    """

    inputs: Patterns
    targets: tuple[str, ...]
    """Empty: not public; a server scores submissions."""
    only: str = ""
    """A text file of the set that names the files of this split; empty: all files."""
    spare: bool = False
    """Targets without an input are allowed: the folder of targets is shared with other splits."""


class Address(Frozen):
    """A file that `kitbench data fetch` may download."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


class Card(Frozen):
    """One data set, or one split of it."""

    name: str
    title: str
    tasks: tuple[Kind, ...]
    """The tasks that the set is a test or training set for."""
    colour: bool
    home: str
    licence: str
    citation: str
    note: str = ""
    package: str = ""
    """An installed Python package that contains the files; empty: they are in the data folder."""
    own: str = ""
    """The folder of a user's own pictures, wherever the data folder is (own.py); empty in every shipped card."""
    generated: bool = False
    """The images are made by repetition.py, not read from files."""
    folders: Patterns = (".",)
    """Possible names of the set's folder inside the data folder."""
    layouts: tuple[tuple[str, ...], ...] = ()
    """Groups of glob patterns of the clean images in that folder; the first group that matches a file is used."""
    without: tuple[str, ...] = ()
    """Files that match the layout but do not belong to this set."""
    pairs: tuple[Pairs, ...] = ()
    """Instead of `layouts`, where the set has degraded inputs; the first that matches a file is used."""
    count: Annotated[int, Field(ge=1)]
    """Number of images or pairs; of files, where the targets are not public."""
    blocks: tuple[int, ...] = ()
    """Shape of the array in the .mat file of a set whose targets are not public; empty: it has image files."""
    numbered: tuple[str, str] | None = None
    """First and last file name, without suffix, of clean images that are numbered consecutively."""
    size: tuple[int, int] | None = None
    """Longer and shorter side in pixels of all images, landscape or portrait; None where they differ."""
    averaged: Literal["", "values", "light"] = ""
    """What the blurred inputs are averages of: the frames' 8-bit values, or linear light (gamma 2.2 undone)."""
    checksum: Literal["none", "pixels", "file"] = "none"
    """What `sha256` covers: the decoded pixels (of any lossless format) or the bytes of the file (JPEG)."""
    sha256: Mapping[str, str] = Field(default_factory=dict)
    """By path relative to the set's folder; with `pixels`, without suffix."""
    urls: tuple[Address, ...] = ()
    """Files that `kitbench data fetch` may download: archives, or the images themselves."""
    ask: str = ""
    """How to get a set that a program may not or cannot download."""

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if bool(self.layouts) + bool(self.pairs) + self.generated != 1:
            raise ValueError("give either layouts (clean images) or pairs (inputs and targets), or generated = true")
        return self

    @property
    def trees(self) -> list[tuple[str, ...]]:
        """The patterns of every layout, inputs before targets."""
        return [*self.layouts, *((*pairs.inputs, *pairs.targets) for pairs in self.pairs)]

    @property
    def tree(self) -> str:
        """The layouts, as messages show them."""
        return " or ".join(" + ".join(patterns) for patterns in self.trees) or "no files: it is generated"

    @property
    def contents(self) -> str:
        """`12 images`, `100 pairs`, `1280 blocks`."""
        number = math.prod(self.blocks[:-3]) if self.blocks else self.count
        return counted(number, "block" if self.blocks else "pair" if self.pairs and not self.blind else "image")

    @property
    def advice(self) -> str:
        """What to do where a file of the set is missing."""
        if self.own:
            return "add it, or remove the other one"
        return f"restore the set as its authors publish it ({self.home})"

    @property
    def blind(self) -> bool:
        """Whether the targets are not public, so that only the set's server can score."""
        return bool(self.pairs) and not self.pairs[0].targets


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
    """The card of that name. Raises InputError, which suggests the most similar name."""
    if name not in cards():
        raise InputError(f"Unknown data set {name!r}; {nearest(name, cards())}")
    return cards()[name]
