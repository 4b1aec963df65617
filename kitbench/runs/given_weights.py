"""`kitbench eval`: score a network with given weights, or a training-free method, on a suite's test sets. No training.

A network is a Python file with a class `Network(channels, *, settings)`, [B, C, H, W] to the same. Where its forward
has a second argument, it is told the noise level (kitbench/model/noise_level.py). Its weights decide in which of the
suite's modes (gray, colour) it is scored: those whose channels they fit. The stored run is like all others, and holds
all noise levels; file, weights, settings, mode and task decide its key.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from kitbench.cost.agreement import state_macs
from kitbench.errors import METHOD_ERRORS, InputError, Interrupted, RunError, describe_error
from kitbench.model import contract, methods
from kitbench.model.noise_level import at_noise_level
from kitbench.model.weights import fit, given_file_sha256, read_state
from kitbench.runs.announce import Expected
from kitbench.runs.cell import Cell
from kitbench.runs.display import CellReporter, Display
from kitbench.runs.prepare import Options, PreparedScoring, prepare_scoring
from kitbench.runs.probe import RESOLUTION
from kitbench.runs.score import score_cell
from kitbench.runs.source import source_digests
from kitbench.runs.work import begin
from kitbench.scoring import evaluate
from kitbench.spec.fields import CHANNELS, Mode
from kitbench.spec.loading import load_suite
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder
from kitbench.store.records import Cost, Run
from kitbench.system.environment import device_name, environment, how_to_go_on
from kitbench.system.interrupt import interruptible


@dataclass(frozen=True)
class Weights:
    """A file of weights; `key` names the state dict inside it, where it holds several."""

    path: Path
    key: str | None


@dataclass(frozen=True)
class Scored:
    """What is scored in one mode."""

    cell: Cell
    restore: methods.Restore
    cost: Cost | None


@dataclass(frozen=True)
class Given:
    """What the command line names: a method (a name, or the path of a file), its weights, settings by `--set`."""

    method: str
    weights: Weights | None
    overrides: Sequence[str]


def score_given_weights(
    suite: str, preset: str | None, given: Given, options: Options, console: Console
) -> tuple[Suite, list[RunFolder]]:
    """Score a method on every test set of the suite that is not scored yet.

    Returns the resolved suite and the folders of the runs. Raises InputError before anything is written, RunError where
    scoring fails, and Interrupted on Ctrl-C or SIGTERM.
    """
    loaded, weights = _loaded(given), given.weights
    source = Path(given.method) if given.method.endswith(".py") else _source(given.method)
    resolved = load_suite(suite, preset, given.overrides, [str(source)])
    [(name, described)] = resolved.methods.items()
    settings = loaded.resolve(described.settings)
    state = read_state(weights.path, weights.key) if weights is not None else None
    scoring = prepare_scoring(resolved, options)
    for absent, why in scoring.absent.items():
        console.print(f"[bold]without[/bold] {absent}: {escape(why)}", highlight=False, soft_wrap=True)
    if weights is None or state is None:
        runs = _training_free(name, loaded, scoring)
    else:
        networks = _fitting(loaded, settings, scoring, state, weights.path, console)
        sha256 = loaded.source_sha256 or given_file_sha256(source)
        runs = []
        for mode, network in networks.items():
            one_level = at_noise_level(network.eval(), resolved.task.conditions[0], name)
            cost = _cost(network, one_level, CHANNELS[mode])  # on the CPU: counted on fake tensors
            contract.check_network(loaded, one_level.to(scoring.device), CHANNELS[mode], scoring.device)
            cell = Cell(
                resolved, mode, name, sha256, sha256, settings, None, device_name(scoring.device), None,
                weights_sha256=given_file_sha256(weights.path), weights_key=weights.key,
            )  # fmt: skip
            runs.append(Scored(cell, _restorer(network, name, mode, scoring), cost))
    records = {one.cell: _record(one, loaded, weights, scoring) for one in runs}
    return resolved, score_all(runs, records, scoring, console)


def _loaded(given: Given) -> methods.Loaded:
    """The method, which must be one that weights are given for, or a training-free one without any."""
    loaded = methods.load_method(given.method)
    if loaded.attention is not None:
        raise InputError(
            f"Method {given.method!r} is an attention inside the shared backbone, trained and scored by "
            "`kitbench run`; eval takes a file with a class Network, or a training-free method."
        )
    if loaded.network is None and given.weights is not None:
        raise InputError(f"Method {given.method!r} is training-free and takes no weights; leave --weights out.")
    if loaded.network is not None and given.weights is None:
        raise InputError(
            f"Method {given.method!r} is a network that needs its weights; name their file with --weights."
        )
    return loaded


def _training_free(name: str, loaded: methods.Loaded, scoring: PreparedScoring) -> list[Scored]:
    assert loaded.restore is not None
    runs = []
    for mode in scoring.sets:
        contract.check_restore(loaded, CHANNELS[mode], scoring.suite.task.conditions[0])
        attention = loaded.source_sha256 or name  # as `kitbench run` names a reference: one run, whoever made it
        cell = Cell(scoring.suite, mode, name, attention, loaded.source_sha256, {}, None, "cpu", None)
        runs.append(Scored(cell, loaded.restore, None))
    return runs


def score_all(
    runs: Sequence[Scored], records: Mapping[Cell, Run], scoring: PreparedScoring, console: Console
) -> list[RunFolder]:
    """Score every one on the test sets that it has no scores of yet. Returns the folders of the runs.

    Raises InputError where one was imported and lacks scores, RunError where scoring fails, and Interrupted.
    """
    scoring.require_own(records)
    folders = []
    display = Display(console, dict.fromkeys(records, Expected(0.0, 1.0)), 1)
    with interruptible(how_to_go_on) as stop, display.shown():
        stop.idle = False
        for one in runs:
            folder = RunFolder(scoring.options.out / one.cell.folder)
            if folder.origin is not None:  # it has all scores
                folders.append(folder)
                continue
            with folder.lock():
                begin(folder, records[one.cell])
                try:
                    score_cell(scoring, one.cell, one.restore, CellReporter(display, one.cell), stop)
                except (Interrupted, InputError):
                    raise
                except METHOD_ERRORS as error:
                    raise RunError(f"{one.cell.folder}: {describe_error(error)}") from error
            folders.append(folder)
    return folders


def _source(name: str) -> Path:
    """The file of a shipped method."""
    spec = importlib.util.find_spec(methods.shipped()[name])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _fitting(
    loaded: methods.Loaded, settings: Mapping[str, object], scoring: PreparedScoring, state: Mapping[str, Tensor],
    path: Path, console: Console,
) -> dict[Mode, nn.Module]:  # fmt: skip
    """The network with these weights in every mode that they fit; others are named. InputError where they fit none."""
    found: dict[Mode, nn.Module] = {}
    misfits: dict[Mode, str] = {}
    for mode in scoring.sets:
        try:
            network = loaded.build_network(CHANNELS[mode], **settings)
            fit(network, state, path)
        except InputError as error:
            misfits[mode] = str(error)
        else:
            found[mode] = network
    if not found:
        raise InputError(next(iter(misfits.values())))
    for mode, why in misfits.items():
        console.print(f"[bold]without[/bold] {mode}: {escape(why)}", highlight=False, soft_wrap=True)
    return found


def _restorer(network: nn.Module, name: str, mode: Mode, scoring: PreparedScoring) -> methods.Restore:
    """The network as a function of one image and its noise level."""

    def restore(image: np.ndarray, sigma: float | None) -> np.ndarray:
        one_level = at_noise_level(network, sigma, name)
        return evaluate.network(one_level, scoring.device, scoring.protocols[mode], "float32")(image, sigma)

    return restore


def _cost(network: nn.Module, one_level: nn.Module, channels: int) -> Cost:
    """one_level: the network as one of the image alone."""
    closed = network.macs(RESOLUTION, RESOLUTION) if hasattr(network, "macs") else None  # type: ignore[operator]
    macs = state_macs(one_level, channels, RESOLUTION, closed)
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()), attention_parameters=0, resolution=RESOLUTION,
        macs=macs.closed, macs_counted=macs.counted, macs_note=macs.note, train_peak_bytes=None, memory_note=None,
    )  # fmt: skip


def _record(scored: Scored, loaded: methods.Loaded, weights: Weights | None, scoring: PreparedScoring) -> Run:
    cell, suite = scored.cell, scoring.suite
    settings = dict(cell.settings)
    if weights is not None:  # two files of one name must not look alike in a table
        settings["weights"] = f"{weights.path.name}@{cell.identity()['weights_sha256'][:8]}"
    return Run(
        key=cell.key, comparison=cell.comparison, identity=cell.identity(), suite=suite.name, preset=suite.preset,
        mode=cell.mode, method=cell.method, attention=cell.attention, card=loaded.card, settings=settings, seed=None,
        device=cell.device, task=suite.task, backbone=None, recipe=None, train_sets={},
        environment=environment(scoring.device), source=source_digests(cell.attention, trained=False),
        cost=scored.cost,
    )  # fmt: skip
