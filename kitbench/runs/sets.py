"""The image sets of a suite on this machine: which are here, read, and proved disjoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kitbench.data.locate import check_root, locate, named_root
from kitbench.data.overlap import assert_disjoint
from kitbench.data.own import card_of_set
from kitbench.data.photograph import Photograph
from kitbench.data.repetition import images_of
from kitbench.errors import InputError
from kitbench.spec.fields import Mode, digest
from kitbench.spec.suite import SetNames, Suite

VALIDATION_KEY = "or another validation set: --set data.validation=SET"
"""Ends the advice where images of the validation set, which few name themselves, are elsewhere too."""


@dataclass(frozen=True)
class ImageSets:
    """The images of one colour mode, by set."""

    train: dict[str, list[Photograph]]
    test: dict[str, list[Photograph]]
    validation: dict[str, list[Photograph]] = field(default_factory=dict)

    @property
    def training(self) -> list[Photograph]:
        return [photo for photos in self.train.values() for photo in photos]


def choose_sets(suite: Suite, root: Path | None) -> tuple[dict[Mode, SetNames], dict[str, str]]:
    """The sets of every mode that are used here, and why the others are not.

    Training sets must all be there; test and validation sets that are not are named and left out, and a mode without
    any test set, as long as one is there. Raises InputError.
    """
    check_root(root)
    source = suite.data.folder if root is not None else suite.data.embedded
    place = "any data folder: give one with --data" if root is None else root
    named: dict[Mode, SetNames] = {mode: getattr(source, mode) for mode in source.modes}
    absent: dict[str, str] = {}
    chosen: dict[Mode, SetNames] = {}
    for mode, sets in named.items():
        for name in (*sets.train, *sets.test, *sets.validation):
            card = card_of_set(name)
            if mode == "colour" and not card.colour:
                raise InputError(
                    f"Data set {name} is gray and cannot be used in mode 'colour'; choose a colour set, or run gray "
                    "alone with --set data.modes=gray."
                )
            # Clean images will do for any task, degraded by the task's own model; pairs have inputs of their own.
            if card.pairs and suite.task.kind not in card.tasks:
                raise InputError(
                    f"Data set {name} is made for {' and '.join(card.tasks)}, the suite's task is {suite.task.kind}; "
                    "choose another set."
                )
        there = {}
        for part in ("test", "validation"):
            names = getattr(sets, part)
            there[part] = tuple(name for name in names if locate(card_of_set(name), root) is not None)
            gone = (name for name in names if name not in there[part])
            absent |= {name: f"not in {place}; get it from {card_of_set(name).home}" for name in gone}
        if there["test"]:
            chosen[mode] = sets.model_copy(update=there)
    if not chosen:
        wanted = dict.fromkeys(name for sets in named.values() for name in sets.test)
        where = place if root is None else named_root(root)
        raise InputError(
            f"None of the test sets {', '.join(wanted)} is in {where}; get one, or choose others with `run "
            "--test-set SET`, which is --set data.test=SET, or "
            f"{' or '.join(f'data.folder.{mode}.test' for mode in named)} for one mode."
        )
    return chosen, absent


def require_training(suite: Suite, named: Mapping[Mode, SetNames], root: Path | None) -> None:
    """Raises InputError where a training set is not here, naming the keys that choose another."""
    source = "embedded" if root is None else "folder"
    for mode, sets in named.items():
        for name in sets.train:
            wanted = card_of_set(name)
            if locate(wanted, root) is not None:
                continue
            looked = f"package {wanted.package}" if wanted.package else f"{root} as {' or '.join(wanted.folders)}"
            raise InputError(
                f"Training set {name} is not in {looked}; get it from {wanted.home}, or choose another: --train-set "
                f"SET, which is --set data.train=SET, or data.{source}.{mode}.train for one mode."
            )


def read_sets(mode: Mode, named: SetNames, root: Path | None, training: bool) -> ImageSets:
    """The images of one mode. Raises InputError, of training sets before the others are read."""

    def images(names: tuple[str, ...]) -> dict[str, list[Photograph]]:
        return {name: images_of(card_of_set(name), root, mode) for name in names}

    train = images(named.train) if training else {}
    return ImageSets(train, images(named.test), images(named.validation) if training else {})


def require_unseen(train: Mapping[str, Sequence[Photograph]], sets: ImageSets) -> None:
    """Raises InputError where an image that is trained on is also a test or validation image."""
    assert_disjoint(train, sets.test)
    assert_disjoint(train, sets.validation, ("Training", "validation"), VALIDATION_KEY)


def require_disjoint(sets: ImageSets) -> None:
    """Raises InputError where an image has two of the roles training, validation and test."""
    require_unseen(sets.train, sets)
    assert_disjoint(sets.validation, sets.test, ("Validation", "test"), VALIDATION_KEY)


def set_sha256(photographs: list[Photograph]) -> str:
    """Of a set's images, by name and content."""
    return digest([[photo.name, photo.sha256] for photo in photographs])
