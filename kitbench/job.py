"""A suite made ready to run on this machine: data read and proved disjoint, methods loaded and proved, costs probed.

Everything that can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kitbench import methods
from kitbench.backbone import UNet, attention_levels
from kitbench.cell import Cell
from kitbench.cost.flops import count_module, reconcile
from kitbench.cost.memory import peak_bytes
from kitbench.data.batches import Batches
from kitbench.data.cards import Photograph, assert_disjoint, card, locate, read
from kitbench.environment import choose_device, device_name, make_repeatable
from kitbench.errors import InputError
from kitbench.lpips import LPIPS, available
from kitbench.seeds import derive
from kitbench.store import Cost, RunFolder, writable
from kitbench.suite import Mode, Suite, digest
from kitbench.train import loss_of

RESOLUTION = 256
"""Side in pixels of the image that GMACs are stated for."""
CHANNELS: dict[Mode, int] = {"colour": 3, "gray": 1}


@dataclass(frozen=True)
class Options:
    """What the command line decides beside the suite."""

    out: Path
    data: Path | None
    device: str
    workers: int
    lpips_weights: str | None


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


class Job:
    """A suite made ready to run on this machine: data read and checked, methods loaded and proved."""

    def __init__(self, suite: Suite, options: Options) -> None:
        self.suite, self.options = suite, options
        self.device = choose_device(options.device)
        make_repeatable(suite.recipe)
        self.methods = {name: methods.load(method.attention, name) for name, method in suite.methods.items()}
        self.references = {name: methods.load(name) for name in suite.references}
        for name, loaded in self.methods.items():
            if loaded.attention is None:
                raise InputError(f"Method {name!r} is training-free; name it in `references`, not in `methods`.")
        for name, loaded in self.references.items():
            if loaded.restore is None:
                raise InputError(f"Method {name!r} is trained; name it in `methods`, not in `references`.")
        self.settings = {name: loaded.resolve(suite.methods[name].settings) for name, loaded in self.methods.items()}
        self.absent: dict[str, str] = {}
        source = suite.data.folder if options.data is not None else suite.data.embedded
        self.sets: dict[Mode, Sets] = {mode: self._read(mode, getattr(source, mode)) for mode in source.modes}
        for loaded in self.references.values():
            for mode in self.sets:
                methods.check_restore(loaded, CHANNELS[mode])
        levels = attention_levels(suite.backbone, suite.recipe.crop)
        for name, loaded in self.methods.items():
            methods.check(loaded, levels, self.settings[name])
        for sets in self.sets.values():
            Batches(sets.training, suite.task, suite.recipe, 0)  # refuses images smaller than the crop
        writable(options.out)
        self.lpips: LPIPS | None = None
        self.lpips_note: str | None = None
        if suite.protocol.lpips != "none":
            self.lpips_note = available(suite.protocol.lpips, options.lpips_weights)
            if self.lpips_note is None:
                self.lpips = LPIPS(suite.protocol.lpips, options.lpips_weights)
        self.cells = list(self._cells())

    def _read(self, mode: Mode, sets: Any) -> Sets:
        """Training sets must all be there; test sets that are not are named and left out, as long as one is there."""
        root = self.options.data
        if root is not None and not root.is_dir():
            raise InputError(
                f"Data folder {root} does not exist; give a folder that holds data sets (kitbench list names them)."
            )
        present = []
        for name in sets.test:
            if locate(card(name), root) is None:
                self.absent[name] = f"not in {root}; get it from {card(name).home}"
            else:
                present.append(name)
        if not present:
            raise InputError(
                f"None of the test sets {', '.join(sets.test)} is in {root}; get one, "
                f"or change data.folder.{mode}.test."
            )
        train = {name: read(card(name), root, mode) for name in sets.train}
        test = {name: read(card(name), root, mode) for name in present}
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
        return UNet(CHANNELS[cell.mode], self.suite.backbone, self.methods[cell.method], cell.settings, seed)

    def units(self, cell: Cell) -> list[tuple[str, float]]:
        """The evaluations of a cell: every test set at every sigma."""
        return [(name, sigma) for name in self.sets[cell.mode].test for sigma in self.suite.task.sigma_test]

    def missing(self, cell: Cell, folder: RunFolder) -> list[tuple[str, float]]:
        """The evaluations that are not stored yet, or that LPIPS can now be added to."""
        absent = []
        for name, sigma in self.units(cell):
            sha256 = set_sha256(self.sets[cell.mode].test[name])
            found = folder.evaluation(name, sha256, sigma, self.suite.protocol.stamp)
            if found is None or (found.lpips_note is not None and self.lpips is not None):
                absent.append((name, sigma))
        return absent

    def probe(self, cell: Cell) -> Probe:
        """Cost of a method: counted on fake tensors; memory and time from a few steps on the device."""
        recipe, channels = self.suite.recipe, CHANNELS[cell.mode]
        model = self.build(cell)
        closed, counted, note = count_macs(model.eval(), channels)
        model.to(self.device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
        x = torch.rand(recipe.batch, channels, recipe.crop, recipe.crop, device=self.device)

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
            step_seconds,
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


def count_macs(model: UNet, channels: int) -> tuple[int | None, int | None, str | None]:
    """Multiply-adds of one image of RESOLUTION: closed form, count of what runs, and what the two leave open."""
    closed = model.macs(RESOLUTION, RESOLUTION)
    try:
        counted = count_module(model, (1, channels, RESOLUTION, RESOLUTION))
    except Exception as error:  # noqa: BLE001 - a stranger's attention may fail on fake tensors: the row says so
        return closed, None, f"closed form only: it could not be counted ({type(error).__name__})"
    if closed is not None:
        return closed, counted.macs, reconcile(closed, counted.macs, counted.uncounted)
    note = "counted only: the attention states no closed form (macs)"
    if counted.uncounted:
        note = f"{note}; nobody counted {', '.join(sorted(counted.uncounted))}"
    return None, counted.macs, note


def set_sha256(photographs: list[Photograph]) -> str:
    """Of a set's images, by name and content."""
    return digest([[photo.name, photo.sha256] for photo in photographs])
