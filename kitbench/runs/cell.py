"""A cell: one training run, one training-free reference, or one network with given weights, and the key that tells it
from every other.

The key is a hash of all that decides the run's numbers (task, training images by content, backbone, recipe, the
attention with all its settings, seed, device, version of the numerics) and of nothing else: not of the suite's name,
the test sets, or how often a checkpoint is written. Test sets and protocols only add evaluations to a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from kitbench import NUMERICS
from kitbench.errors import InputError
from kitbench.spec.fields import Mode, digest
from kitbench.spec.suite import Recipe, Suite
from kitbench.spec.tasks import Denoise

_DECIDES_NO_NUMBER = {"name", "card", "checkpoint_every", "validations", "init"}
"""Of `init` the checksum of the weights decides, which the identity has."""
_ADDED_LATER = {"ema": 0.0, "tf32": False, "channels_last": True, "compile": False, "fused": True, "threads": None}
"""Keys of a recipe that do not count at these values, which stand for what was done before they existed: older runs
keep their keys."""


Rates = Mapping[Mode, Mapping[str, tuple[float, ...]]]
"""By colour mode and method, the learning rates to train at in place of the recipe's."""


@dataclass(frozen=True)
class Axes:
    """What a suite's cell is called: mode, method and seed (None for what is not trained). Reads no image."""

    mode: Mode
    method: str
    seed: int | None
    lr: float | None = None
    """The learning rate in place of the recipe's; no part of the label."""

    @property
    def label(self) -> str:
        """The same on every machine: `colour/kit/0`, `colour/nlm`."""
        return f"{self.mode}/{self.method}" + ("" if self.seed is None else f"/{self.seed}")


def axes(suite: Suite, modes: Iterable[Mode], rates: Rates = MappingProxyType({})) -> list[Axes]:
    """The cells of a suite in the order in which they are run, by their names.

    Raises InputError where `rates` are given, and not of every mode and method.
    """

    def of(mode: Mode, method: str) -> tuple[float | None, ...]:
        if rates and method not in rates.get(mode, {}):
            raise InputError(f"No learning rate of {method} in mode {mode} was searched; run `kitbench tune` for it.")
        return rates[mode][method] if rates else (None,)

    return [
        Axes(mode, name, seed, lr)
        for mode in modes
        for seed, names in ((None, suite.references), *((seed, tuple(suite.methods)) for seed in suite.seeds))
        for name in names
        for lr in (of(mode, name) if seed is not None else (None,))
    ]


@dataclass(frozen=True, eq=False)
class Cell:
    """`seed` and everything trained are None or empty where nothing is trained."""

    suite: Suite
    mode: Mode
    method: str
    attention: str
    source_sha256: str | None
    settings: dict[str, Any]
    seed: int | None
    device: str
    """What trains: `cpu`, or the CUDA device's name."""
    train_sha256: str | None
    """Digest of the checksums of all training images, in order."""
    weights_sha256: str | None = None
    """Of the file of a network that is scored with given weights; its `settings` count too."""
    weights_key: str | None = None
    """The state dict in that file, where it holds several."""
    init_sha256: str | None = None
    """Of the weights that training starts from; None: drawn from the seed."""
    lr: float | None = None
    """The learning rate in place of that of the suite's recipe."""

    @property
    def recipe(self) -> Recipe:
        """The suite's, at the cell's learning rate."""
        return self.suite.recipe if self.lr is None else self.suite.recipe.model_copy(update={"lr": self.lr})

    @property
    def trained(self) -> bool:
        return self.seed is not None

    @property
    def label(self) -> str:
        return Axes(self.mode, self.method, self.seed).label

    def identity(self) -> dict[str, Any]:
        """All that decides the numbers of the run, as JSON values."""
        identity: dict[str, Any] = {
            "numerics": NUMERICS,
            # Noise levels are conditions of an evaluation; the other degradations decide what a reference restores.
            "task": {"kind": self.suite.task.kind} if isinstance(self.suite.task, Denoise) else self._task(),
            "mode": self.mode,
            "attention": self.source_sha256 or self.attention,
        }
        if self.trained:
            identity |= {
                "task": self._task(),
                "settings": self.settings,
                "backbone": self.suite.backbone.model_dump(mode="json"),
                "recipe": decisive(self.recipe),
                "train_sha256": self.train_sha256,
                "device": self.device,
                "seed": self.seed,
            }
            if self.init_sha256 is not None:
                identity["init_sha256"] = self.init_sha256
        if self.weights_sha256 is not None:
            identity |= {"settings": self.settings, "weights_sha256": self.weights_sha256}
            if self.weights_key is not None:
                identity["weights_key"] = self.weights_key
        return identity

    def _task(self) -> dict[str, Any]:
        return self.suite.task.model_dump(mode="json", exclude={"sigma_test"})

    @cached_property
    def key(self) -> str:
        return digest(self.identity())

    @property
    def comparison(self) -> str:
        """What all cells that may be compared share: everything but the method and the seed. Empty for a reference."""
        if not self.trained:
            return ""
        left_out = ("attention", "settings", "seed")
        return digest({key: value for key, value in self.identity().items() if key not in left_out})

    @property
    def folder(self) -> str:
        """Name of the run's folder: readable first, unique by the key behind it."""
        seed = f"-s{self.seed}" if self.trained else ""
        return f"{self.suite.task.kind}-{self.mode}-{self.method}{seed}-{self.key[:10]}"


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide numbers."""
    found = recipe.model_dump(mode="json", exclude=_DECIDES_NO_NUMBER)
    return {k: v for k, v in found.items() if k not in _ADDED_LATER or v != _ADDED_LATER[k]}
