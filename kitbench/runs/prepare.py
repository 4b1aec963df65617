"""A suite prepared to run on this machine: image sets read and proved disjoint, methods loaded and checked.

Everything that can be refused is refused here, before anything is written. What each method costs is measured in
probe.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from kitbench.data.batches import Batches
from kitbench.errors import InputError
from kitbench.model import contract, methods
from kitbench.model.backbone import UNet, attention_levels
from kitbench.model.methods import Loaded
from kitbench.runs.cell import Axes, Cell, Rates, axes
from kitbench.runs.initial import InitialWeights, initial_weights, seen_images
from kitbench.runs.sets import (
    ImageSets,
    choose_sets,
    read_sets,
    require_disjoint,
    require_training,
    require_unseen,
    set_sha256,
)
from kitbench.scoring.lpips import LPIPS
from kitbench.scoring.perceptual import lpips_missing
from kitbench.seeds import derive
from kitbench.spec.fields import CHANNELS, Mode, digest
from kitbench.spec.suite import Protocol, Suite
from kitbench.spec.tasks import Denoise, condition
from kitbench.store.files import writable
from kitbench.store.folder import RunFolder
from kitbench.system.environment import choose_device, device_name, make_repeatable
from kitbench.system.processes import World, current, pieces
from kitbench.system.tracking import Tracker, trackers

Unit = tuple[str, float | None]
"""An evaluation: a test set, and a noise level or None."""


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
    jobs: int | None = None
    """Cells at a time; None: as many as cores, memory or GPUs allow."""
    gpus: str | None = None
    """Numbers of the GPUs to use, like 0,1."""
    rates: Rates = field(default_factory=dict)
    """Learning rates that a search tries, or has found."""


@dataclass(frozen=True)
class PreparedScoring:
    """The test side of a suite on this machine: sets read, protocols and their metrics at hand."""

    suite: Suite
    options: Options
    device: torch.device
    world: World
    sets: dict[Mode, ImageSets]
    absent: dict[str, str]
    """Sets that are not here and are done without, with the reason."""
    protocols: dict[Mode, Protocol]
    lpips: dict[str, LPIPS]
    """The networks of LPIPS that the protocols ask for, by name."""
    lpips_notes: dict[str, str]
    """Why one of them is missing."""

    @property
    def pieces(self) -> list[range]:
        """Of each batch, what this process takes, a piece at a time."""
        return pieces(self.world.share(self.suite.recipe.batch), self.options.micro_batch)

    def units(self, cell: Cell) -> list[Unit]:
        """The evaluations of a cell: every test set under every condition of the task."""
        return [(name, sigma) for name in self.sets[cell.mode].test for sigma in self.suite.task.conditions]

    def test_sha256(self, mode: Mode, name: str) -> str:
        """Of a test set's inputs and targets: its images, and the task's degradation where it makes the inputs.

        Gaussian noise is fixed by sigma and protocol, which stand in every row, and is left out.
        """
        photographs, task = self.sets[mode].test[name], self.suite.task
        sha256 = set_sha256(photographs)
        made = isinstance(task, Denoise) or all(photo.degraded is not None for photo in photographs)
        return sha256 if made else digest([sha256, task.model_dump(mode="json")])

    def missing(self, cell: Cell, folder: RunFolder) -> list[Unit]:
        """The evaluations that are not stored yet, or that LPIPS can now be added to (not to imported ones)."""
        absent, protocol, imported = [], self.protocols[cell.mode], folder.origin is not None
        for name, sigma in self.units(cell):
            found = folder.evaluation(name, self.test_sha256(cell.mode, name), sigma, protocol.stamp)
            lacks_lpips = found is not None and found.lpips_note is not None and not imported
            if found is None or (lacks_lpips and protocol.lpips in self.lpips):
                absent.append((name, sigma))
        return absent

    def require_own(self, cells: Iterable[Cell]) -> None:
        """Raises InputError where the run of a cell was imported and lacks scores: nothing is added to it."""
        for cell in cells:
            folder = RunFolder(self.options.out / cell.folder)
            origin = folder.origin
            for name, sigma in self.missing(cell, folder) if origin is not None else ():
                assert origin is not None
                where = f"{name} {condition(sigma)}".strip()
                raise InputError(
                    f"{folder.path} was imported (run by {origin.by}) and has no scores on {where} under "
                    f"{self.protocols[cell.mode].stamp}; nothing is added to runs of others, so make your own in "
                    f"another --out."
                )


@dataclass(frozen=True)
class PreparedSuite(PreparedScoring):
    """A whole suite on this machine: what `PreparedScoring` holds, and methods with their settings and cells."""

    methods: dict[str, Loaded]
    references: dict[str, Loaded]
    settings: dict[str, dict[str, object]]
    """Of every trained method, defaults included."""
    cells: tuple[Cell, ...]
    initial: InitialWeights | None
    """What training starts from, where the recipe names a run."""

    def build(self, cell: Cell) -> UNet:
        """The shared backbone with the cell's attention in it, its weights drawn from the cell's seed, or `initial`."""
        seed = derive(cell.seed, "model")
        model = UNet(CHANNELS[cell.mode], self.suite.backbone, self.methods[cell.method], cell.settings, seed)
        model.lay_out(torch.channels_last if self.suite.recipe.channels_last else torch.contiguous_format)
        if self.initial is not None:
            self.initial.put_into(model)
        return model

    def state_of(self, cell: Cell) -> str:
        """Digest of the cell's key, and of the images that it is scored on: equal where two processes read the same."""
        sets = self.sets[cell.mode]
        return digest([cell.key, *([n, set_sha256(own)] for n, own in (*sets.test.items(), *sets.validation.items()))])

    def trackers(self) -> list[Tracker]:
        """New trackers, for one run."""
        return trackers(self.options.track)

    def folder(self, cell: Cell) -> RunFolder:
        return RunFolder(self.options.out / cell.folder)

    def missing_units(self, cell: Cell) -> list[Unit]:
        """The evaluations of a cell that are missing; all of them where a record is damaged, which is reported when the
        cell's turn comes.
        """
        try:
            return self.missing(cell, self.folder(cell))
        except InputError:
            return self.units(cell)

    def unfinished(self, cell: Cell) -> bool:
        """Whether something of the cell is still to be done."""
        return bool((cell.trained and not self.folder(cell).trained) or self.missing_units(cell))


def prepare(suite: Suite, options: Options, checked: bool = True, console: Console | None = None) -> PreparedSuite:
    """Read what a suite needs, and check that it can run here.

    checked: False in a worker process, whose parent has checked methods, sizes and overlaps. console: where it is said
    which method is being tried. Raises InputError.
    """
    trackers(options.track)  # refuses unknown ones
    loaded, references, settings = load_methods(suite)
    suite, initial = initial_weights(suite, options.out)
    scoring = prepare_scoring(suite, options, checked, training=True)
    if checked:
        if initial is not None:
            _require_unseen(initial.folder, scoring, console or Console(quiet=True))
        check_methods(scoring, loaded, references, settings, console or Console(quiet=True))
    cells = tuple(
        _cell(place, scoring, loaded[place.method] if place.seed is not None else None, settings)
        for place in axes(suite, scoring.sets, options.rates)
    )
    if initial is not None:
        cells = tuple(replace(cell, init_sha256=initial.sha256) if cell.trained else cell for cell in cells)
    prepared = PreparedSuite(
        **vars(scoring), methods=loaded, references=references, settings=settings, cells=cells, initial=initial
    )
    if checked:
        prepared.require_own(cells)
    if initial is not None and checked:
        for cell in {(cell.mode, cell.method): cell for cell in cells if cell.trained}.values():
            prepared.build(cell)  # refuses weights of another network
    return prepared


def _require_unseen(init: RunFolder, scoring: PreparedScoring, console: Console) -> None:
    """Raises InputError where the weights that training starts from were trained on a test image."""
    found = scoring.sets.get(init.run.mode)
    if found is not None:  # else its weights fit no network of these modes, which is said when they are put into one
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        seen = seen_images(init, scoring.options.data, say)
        require_unseen({n: own for n, own in seen.items() if n not in found.train}, found)


def prepare_scoring(suite: Suite, options: Options, checked: bool = True, training: bool = False) -> PreparedScoring:
    """Read the test sets of a suite, with `training` the others too. Raises InputError."""
    device, world = choose_device(options.device), current()
    if world.size > suite.recipe.batch:
        raise InputError(
            f"{world.size} processes cannot share a batch of {suite.recipe.batch}; start fewer, or set a larger "
            f"recipe.batch, which changes the numbers."
        )
    make_repeatable(suite.recipe)
    named, absent = choose_sets(suite, options.data)
    if training:
        require_training(suite, named, options.data)
    sets = {mode: read_sets(mode, chosen, options.data, training) for mode, chosen in named.items()}
    if checked:
        for found in sets.values():
            require_disjoint(found)
    writable(options.out)
    protocols = {mode: named[mode].protocol or suite.protocol for mode in sets}
    notes = {
        net: lpips_missing(net, options.lpips_weights)
        for net in {protocol.lpips for protocol in protocols.values()} - {"none"}
    }
    return PreparedScoring(
        suite, options, device, world, sets, absent, protocols,
        lpips={net: LPIPS(net, options.lpips_weights) for net, note in notes.items() if note is None},
        lpips_notes={net: note for net, note in notes.items() if note is not None},
    )  # fmt: skip


def load_methods(
    suite: Suite,
) -> tuple[dict[str, Loaded], dict[str, Loaded], dict[str, dict[str, object]]]:
    """The trained methods, those without training, and the settings of the former. Raises InputError."""
    trained = {name: methods.load_method(method.attention, name) for name, method in suite.methods.items()}
    references = {name: methods.load_method(name) for name in suite.references}
    for name, loaded in trained.items():
        if loaded.network is not None:
            raise InputError(f"Method {name!r} is a whole network; `kitbench eval` scores it with given weights.")
        if loaded.attention is None:
            given = suite.methods[name].attention
            raise InputError(
                f"Method {name!r} is training-free; score it with `kitbench eval --method {given}`, or name a shipped "
                "one in `references` of a suite file."
            )
    for name, loaded in references.items():
        if loaded.restore is None:
            raise InputError(f"Method {name!r} is not training-free; it cannot stand in `references`.")
    settings = {name: one.resolve(suite.methods[name].settings) for name, one in trained.items()}
    first: dict[str, str] = {}
    for name, loaded in trained.items():
        same = first.setdefault(digest([loaded.source_sha256 or suite.methods[name].attention, settings[name]]), name)
        if same != name:
            raise InputError(
                f"Methods {same!r} and {name!r} are one attention with the same settings, which would be trained "
                f"twice; leave one out, or change a setting."
            )
    return trained, references, settings


def check_methods(
    scoring: PreparedScoring,
    trained: Mapping[str, Loaded],
    references: Mapping[str, Loaded],
    settings: Mapping[str, dict[str, object]],
    console: Console,
) -> None:
    """Call every method once on small input, and compare image sizes with the crop. Raises InputError.

    A user's own method may take long: it is named before it is called.
    """
    suite = scoring.suite
    for loaded in references.values():
        for mode in scoring.sets:
            contract.check_restore(loaded, CHANNELS[mode], suite.task.conditions[0])
    for sets in scoring.sets.values():
        Batches(sets.training, suite.task, suite.recipe, 0)  # refuses images smaller than the crop
    levels = attention_levels(suite.backbone, suite.recipe.crop)
    for name, loaded in trained.items():
        if loaded.source_sha256 is not None:
            where = f"level{'s' * (len(levels) > 1)} {', '.join(map(str, levels))}"
            tried = f"{escape(name)}: forward and backward at {where} of the network"
            console.print(f"[bold]probing   [/bold]{tried}", highlight=False, soft_wrap=True)
        with console.status(f"probing {escape(name)}"):
            contract.check_method(loaded, levels, settings[name])


def _cell(
    place: Axes, scoring: PreparedScoring, loaded: Loaded | None, settings: Mapping[str, dict[str, object]]
) -> Cell:
    suite = scoring.suite
    if loaded is None:
        return Cell(suite, place.mode, place.method, place.method, None, {}, None, "cpu", None)
    # A user's file is known by its content, wherever it lies.
    attention = loaded.source_sha256 or suite.methods[place.method].attention
    train_sha256 = digest([photo.sha256 for photo in scoring.sets[place.mode].training])
    return Cell(
        suite, place.mode, place.method, attention, loaded.source_sha256, settings[place.method], place.seed,
        device_name(scoring.device), train_sha256, lr=place.lr,
    )  # fmt: skip
