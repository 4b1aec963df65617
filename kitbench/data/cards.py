"""Data cards: what a set is, and where people get it.

A card (`datasets/*.toml`) states name, expected tree, counts, checksums where known, licence and citation. Read next:
layout.py (which files are images, which are pairs), locate.py (where a set lies), photograph.py (a set read).
"""

from __future__ import annotations

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

Patterns = Annotated[tuple[str, ...], Field(min_length=1)]
"""Glob patterns relative to the set's folder."""


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
