"""A suite made ready to run on this machine: data read and proved disjoint, methods loaded and proved.

Everything that can be refused is refused here, before anything is written. What each method costs is measured in
probe.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kitbench.data.batches import Batches
from kitbench.data.cards import card
from kitbench.data.locate import check_root, locate
from kitbench.data.overlap import assert_disjoint
from kitbench.data.photograph import Photograph, read_set
from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.model.backbone import UNet, attention_levels
from kitbench.runs.cell import Cell
from kitbench.scoring.lpips import LPIPS, available
from kitbench.seeds import derive
from kitbench.spec.fields import CHANNELS, Mode, digest
from kitbench.spec.suite import Protocol, Suite
from kitbench.spec.suite import SetNames as NamedSets
from kitbench.spec.tasks import Denoise
from kitbench.store.files import writable
from kitbench.store.folder import RunFolder
from kitbench.system.environment import choose_device, device_name, make_repeatable
from kitbench.system.processes import current, pieces
from kitbench.system.tracking import trackers


@dataclass(frozen=True)
class Options:
    """What the command line decides beside the suite."""

    out: Path
    data: Path | None
    device: str
    workers: int
    lpips_weights: str | None
    micro_batch: int | None = None
    """Most crops of a batch at a time on one device; None: all of its share."""
    track: tuple[str, ...] = ()
    """Names of trackers."""


@dataclass(frozen=True)
class Sets:
    """The images of one colour mode, by set."""

    train: dict[str, list[Photograph]]
    test: dict[str, list[Photograph]]

    @property
    def training(self) -> list[Photograph]:
        return [photo for photos in self.train.values() for photo in photos]


class Scoring:
    """The test side of a suite, made ready on this machine: sets read, protocols and their metrics at hand."""

    def __init__(self, suite: Suite, options: Options) -> None:
        self.suite, self.options = suite, options
        self.device, self.world = choose_device(options.device), current()
        if self.world.size > suite.recipe.batch:
            raise InputError(
                f"{self.world.size} processes cannot share a batch of {suite.recipe.batch}; start fewer, or set a "
                f"larger recipe.batch, which changes the numbers."
            )
        self.pieces = pieces(self.world.share(suite.recipe.batch), options.micro_batch)
        """Of each batch, what this process takes, a piece at a time."""
        self.trackers = trackers(options.track)
        make_repeatable(suite.recipe)
        self.absent: dict[str, str] = {}
        source = suite.data.folder if options.data is not None else suite.data.embedded
        named = {mode: getattr(source, mode) for mode in source.modes}
        self.sets: dict[Mode, Sets] = self._read_all(named)
        self.protocols: dict[Mode, Protocol] = {mode: named[mode].protocol or suite.protocol for mode in self.sets}
        writable(options.out)
        self.lpips: dict[str, LPIPS] = {}
        """The networks of LPIPS that the protocols ask for, by name; a missing one has its reason in the notes."""
        self.lpips_notes: dict[str, str] = {}
        for net in {protocol.lpips for protocol in self.protocols.values()}:
            if net != "none":
                note = available(net, options.lpips_weights)
                if note is None:
                    self.lpips[net] = LPIPS(net, options.lpips_weights)
                else:
                    self.lpips_notes[net] = note

    def _read_all(self, named: dict[Mode, NamedSets]) -> dict[Mode, Sets]:
        """The sets of every mode. Training sets must all be there; test sets that are not are named and left out, and a
        mode without any, as long as one is there.
        """
        root = self.options.data
        check_root(root)
        present: dict[Mode, list[str]] = {}
        for mode, sets in named.items():
            # Clean images will do to train for any task; pairs have inputs of their own.
            for name in (*sets.test, *(name for name in sets.train if card(name).pairs)):
                if self.suite.task.kind not in card(name).tasks:
                    raise InputError(
                        f"Data set {name} is made for {' and '.join(card(name).tasks)}, the suite's task is "
                        f"{self.suite.task.kind}; choose another set."
                    )
            for name in sets.test:
                if locate(card(name), root) is None:
                    self.absent[name] = f"not in {root}; get it from {card(name).home}"
                else:
                    present.setdefault(mode, []).append(name)
        if not present:
            raise InputError(
                f"None of the test sets {', '.join(self.absent)} is in {root}; get one, "
                f"or change {' or '.join(f'data.folder.{mode}.test' for mode in named)}."
            )
        return {mode: self._read(mode, named[mode], names) for mode, names in present.items()}

    def _read(self, mode: Mode, sets: NamedSets, present: list[str]) -> Sets:
        """The sets of one mode: those to test on only."""
        return Sets({}, {name: read_set(card(name), self.options.data, mode) for name in present})

    def units(self, cell: Cell) -> list[tuple[str, float | None]]:
        """The evaluations of a cell: every test set under every condition of the task."""
        return [(name, sigma) for name in self.sets[cell.mode].test for sigma in self.suite.task.conditions]

    def test_sha256(self, mode: Mode, name: str) -> str:
        """Of what a test set's inputs and truths are: its images, and the task's degradation where it makes the inputs.

        Gaussian noise is told by sigma and protocol, which stand in every row, and is left out.
        """
        photographs, task = self.sets[mode].test[name], self.suite.task
        sha256 = set_sha256(photographs)
        made = isinstance(task, Denoise) or all(photo.degraded is not None for photo in photographs)
        return sha256 if made else digest([sha256, task.model_dump(mode="json")])

    def missing(self, cell: Cell, folder: RunFolder) -> list[tuple[str, float | None]]:
        """The evaluations that are not stored yet, or that LPIPS can now be added to."""
        absent, protocol = [], self.protocols[cell.mode]
        for name, sigma in self.units(cell):
            found = folder.evaluation(name, self.test_sha256(cell.mode, name), sigma, protocol.stamp)
            if found is None or (found.lpips_note is not None and protocol.lpips in self.lpips):
                absent.append((name, sigma))
        return absent


class Job(Scoring):
    """A suite made ready to run on this machine: data read and checked, methods loaded and proved."""

    def __init__(self, suite: Suite, options: Options) -> None:
        self.methods = {name: methods.load_method(method.attention, name) for name, method in suite.methods.items()}
        self.references = {name: methods.load_method(name) for name in suite.references}
        for name, loaded in self.methods.items():
            if loaded.network is not None:
                raise InputError(f"Method {name!r} is a whole network; `kitbench eval` scores it with given weights.")
            if loaded.attention is None:
                raise InputError(f"Method {name!r} is training-free; name it in `references`, not in `methods`.")
        for name, loaded in self.references.items():
            if loaded.restore is None:
                raise InputError(f"Method {name!r} is not training-free; it cannot stand in `references`.")
        self.settings = {name: loaded.resolve(suite.methods[name].settings) for name, loaded in self.methods.items()}
        super().__init__(suite, options)
        for loaded in self.references.values():
            for mode in self.sets:
                methods.check_restore(loaded, CHANNELS[mode], suite.task.conditions[0])
        levels = attention_levels(suite.backbone, suite.recipe.crop)
        for name, loaded in self.methods.items():
            methods.check_method(loaded, levels, self.settings[name])
        for sets in self.sets.values():
            Batches(sets.training, suite.task, suite.recipe, 0)  # refuses images smaller than the crop
        self.cells = list(self._cells())

    def _read(self, mode: Mode, sets: NamedSets, present: list[str]) -> Sets:
        train = {name: read_set(card(name), self.options.data, mode) for name in sets.train}
        test = super()._read(mode, sets, present).test
        assert_disjoint(train, test)
        return Sets(train, test)

    def _cells(self) -> Iterator[Cell]:
        for mode, sets in self.sets.items():
            train_sha256 = digest([photo.sha256 for photo in sets.training])
            for name in self.references:
                yield Cell(self.suite, mode, name, name, None, {}, None, "cpu", None)
            for seed in self.suite.seeds:
                for name, loaded in self.methods.items():
                    # A user's file is known by its content, wherever it lies.
                    attention = loaded.source_sha256 or self.suite.methods[name].attention
                    yield Cell(
                        self.suite, mode, name, attention, loaded.source_sha256, self.settings[name], seed,
                        device_name(self.device), train_sha256,
                    )  # fmt: skip

    def build(self, cell: Cell) -> UNet:
        """The shared backbone with the cell's attention in it, initialised from the cell's seed."""
        seed = derive(cell.seed, "model")
        model = UNet(CHANNELS[cell.mode], self.suite.backbone, self.methods[cell.method], cell.settings, seed)
        model.lay_out(torch.channels_last if self.suite.recipe.channels_last else torch.contiguous_format)
        return model

    def unfinished(self, cell: Cell, folder: RunFolder) -> bool:
        """Whether something of the cell is still to be done."""
        return bool((cell.trained and not folder.trained) or self.missing(cell, folder))


def set_sha256(photographs: list[Photograph]) -> str:
    """Of a set's images, by name and content."""
    return digest([[photo.name, photo.sha256] for photo in photographs])
