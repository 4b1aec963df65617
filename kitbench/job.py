"""A suite made ready to run on this machine: data read and proved disjoint, methods loaded and proved, costs probed.

Everything that can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kitbench import methods
from kitbench.backbone import UNet, attention_levels
from kitbench.cell import Cell
from kitbench.cost.flops import count_module, reconcile
from kitbench.cost.memory import free_bytes, peak_bytes, predict_peak_bytes
from kitbench.data.batches import Batches
from kitbench.data.cards import Photograph, card, check_root, locate, read
from kitbench.data.overlap import assert_disjoint
from kitbench.environment import choose_device, device_name, make_repeatable
from kitbench.errors import InputError, RunError
from kitbench.lpips import LPIPS, available
from kitbench.processes import current, pieces
from kitbench.progress import gib
from kitbench.seeds import derive
from kitbench.store import Cost, RunFolder, writable
from kitbench.suite import Denoise, Mode, Protocol, Suite, digest
from kitbench.suite import Sets as NamedSets
from kitbench.tracking import trackers
from kitbench.train import loss_of

RESOLUTION = 256
"""Side in pixels of the image that GMACs are stated for."""
CROPS_BYTES = 1 << 20
"""What one evaluation takes on disk, its crops with it."""
CHANNELS: dict[Mode, int] = {"colour": 3, "gray": 1}


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


@dataclass(frozen=True)
class Probe:
    """What one method costs here, measured before training."""

    cost: Cost
    step_seconds: float
    image_seconds: float
    """One forward of a training batch, a pixel."""


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
        return Sets({}, {name: read(card(name), self.options.data, mode) for name in present})

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
        self.methods = {name: methods.load(method.attention, name) for name, method in suite.methods.items()}
        self.references = {name: methods.load(name) for name in suite.references}
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
            methods.check(loaded, levels, self.settings[name])
        for sets in self.sets.values():
            Batches(sets.training, suite.task, suite.recipe, 0)  # refuses images smaller than the crop
        self.cells = list(self._cells())

    def _read(self, mode: Mode, sets: NamedSets, present: list[str]) -> Sets:
        train = {name: read(card(name), self.options.data, mode) for name in sets.train}
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

    def require_space(self, cells: list[Cell], probes: dict[str, Probe]) -> None:
        """Raises InputError where the disk has no room for what these cells will write."""
        average = 1 if self.suite.recipe.ema else 0
        kept, working = 0, 0
        for cell in cells:
            weights = 4 * probes[cell.method].cost.parameters
            kept += weights + len(self.units(cell)) * CROPS_BYTES
            # Weights, two moments of the optimiser and the average; this checkpoint, the last, and the one before.
            working = max(working, 3 * (3 + average) * weights)
        out = self.options.out.absolute()
        free = shutil.disk_usage(next(place for place in (out, *out.parents) if place.exists())).free
        if kept + working > free:
            raise InputError(
                f"{self.options.out} has {gib(free)} left, and these {len(cells)} runs need about "
                f"{gib(kept + working)}; free some, or choose another --out."
            )

    def require_memory(self, model: UNet, cell: Cell) -> None:
        """Raises RunError where a training step, or the largest test image, will not fit, as predicted without running.

        A method that cannot run on fake tensors is let through: nothing is known of it.
        """
        recipe, channels, protocol = self.suite.recipe, CHANNELS[cell.mode], self.protocols[cell.mode]
        sides = [photo.shape[:2] for photos in self.sets[cell.mode].test.values() for photo in photos]
        tile = protocol.tile or max(map(max, sides))
        height, width = max(((min(h, tile), min(w, tile)) for h, w in sides), key=math.prod)
        free = free_bytes(self.device)

        def step(model: nn.Module, x: torch.Tensor) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                y = model(x)
            loss_of(y.float() - x, recipe).backward()

        def forward(model: nn.Module, x: torch.Tensor) -> None:
            with torch.no_grad():
                model(x)

        moments = 2 * 4 * sum(p.numel() for p in model.parameters())
        batch = (len(self.pieces[0]), channels, recipe.crop, recipe.crop)
        for what, call, shape, extra, advice in (
            ("a training step", step, batch, moments, "--micro-batch"),
            (f"a test image of {width} x {height} px", forward, (1, channels, height, width), 0, "protocol.tile"),
        ):
            try:
                needed = predict_peak_bytes(call, model.train(call is step), shape) + extra
            except Exception:  # noqa: BLE001 - a stranger's method may fail on fake tensors, as count_macs says
                return
            if needed > free:
                raise RunError(
                    f"{what} needs about {gib(needed)} (predicted) and {gib(free)} are free on {self.device}; "
                    f"set a smaller {advice}, or use a machine with more memory"
                )

    def probe(self, cell: Cell) -> Probe:
        """Cost of a method: counted on fake tensors; memory and time from a few steps on the device."""
        recipe, channels = self.suite.recipe, CHANNELS[cell.mode]
        model = self.build(cell)
        self.require_memory(model, cell)
        closed, counted, note = count_macs(model.eval(), channels, model.macs(RESOLUTION, RESOLUTION))
        model.to(self.device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
        x = torch.rand(len(self.pieces[0]), channels, recipe.crop, recipe.crop, device=self.device)

        def step() -> None:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                y = model(x)
            loss_of(y.float() - x, recipe).backward()
            optimiser.step()

        def forward() -> None:
            with torch.inference_mode():
                model(x)

        step()
        peak = peak_bytes(step, self.device)
        step_seconds, forward_seconds = (self._seconds(fn) for fn in (step, forward))
        calibration_seconds = self._seconds(calibration(self.device), runs=5)
        return Probe(
            Cost(
                parameters=sum(p.numel() for p in model.parameters()),
                attention_parameters=sum(p.numel() for _, a in model.attentions() for p in a.parameters()),
                resolution=RESOLUTION,
                macs=closed,
                macs_counted=counted,
                macs_note=note,
                train_peak_bytes=peak,
                memory_note=None,
                calibration_seconds=calibration_seconds,
            ),
            step_seconds * len(self.pieces),
            forward_seconds / x[:, 0].numel(),
        )

    def _seconds(self, fn: Callable[[], None], runs: int = 3) -> float:
        times = []
        for _ in range(runs):
            clock = time.perf_counter()
            fn()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - clock)
        return statistics.median(times)


def calibration(device: torch.device) -> Callable[[], None]:
    """A fixed piece of work, of the kind that training does: a convolution, a product, a sum, forward and backward."""
    kernel = torch.full((32, 32, 3, 3), 0.01, device=device, requires_grad=True)
    images, tokens = torch.ones(2, 32, 96, 96, device=device), torch.ones(2048, 128, device=device)

    def work() -> None:
        ((images.mul(0.5) @ images.mT).mean() + nn.functional.conv2d(images, kernel).exp().mean()).backward()
        (tokens @ tokens.mT).softmax(-1).sum()

    return work


def count_macs(model: nn.Module, channels: int, closed: int | None) -> tuple[int | None, int | None, str | None]:
    """Multiply-adds of one image of RESOLUTION: closed form, count of what runs, and what the two leave open."""
    try:
        counted = count_module(model, (1, channels, RESOLUTION, RESOLUTION))
    except Exception as error:  # noqa: BLE001 - a stranger's attention may fail on fake tensors: the row says so
        return closed, None, f"closed form only: it could not be counted ({type(error).__name__})"
    if closed is not None:
        return closed, counted.macs, reconcile(closed, counted.macs, counted.uncounted)
    note = "counted only: the method states no closed form (macs)"
    if counted.uncounted:
        note = f"{note}; nobody counted {', '.join(sorted(counted.uncounted))}"
    return None, counted.macs, note


def set_sha256(photographs: list[Photograph]) -> str:
    """Of a set's images, by name and content."""
    return digest([[photo.name, photo.sha256] for photo in photographs])
