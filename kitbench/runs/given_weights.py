"""`kitbench eval`: score a network with given weights, or a training-free method, on a suite's test sets. No training.

A network is a Python file with a class `Network(channels, *, settings)`, [B, C, H, W] to the same, blind to the noise
level. Its weights decide in which of the suite's modes (gray, colour) it is scored: those whose channels they fit. The
stored run is like all others; file, weights, settings, mode and task decide its key.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from kitbench.cost.agreement import state_macs
from kitbench.errors import InputError, RunError, describe_error
from kitbench.model import methods
from kitbench.model.weights import fit, given_file_sha256, read_state
from kitbench.runs.cell import Cell
from kitbench.runs.one_cell import begin, score
from kitbench.runs.prepare import Options, Scoring
from kitbench.runs.probe import RESOLUTION
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


def run(
    suite: str, preset: str | None, overrides: Sequence[str], method: str, weights: Weights | None, options: Options,
    console: Console,
) -> tuple[Suite, list[RunFolder]]:  # fmt: skip
    """Score a method (a name, or the path of a file) on every test set of the suite that is not scored yet.

    Returns the resolved suite and the folders of the runs. Raises InputError before anything is written, RunError where
    scoring fails, and Interrupted on Ctrl-C or SIGTERM.
    """
    loaded = methods.load_method(method)
    if loaded.attention is not None:
        raise InputError(
            f"Method {method!r} is an attention inside the shared backbone, trained and scored by `kitbench run`; "
            "eval takes a file with a class Network, or a training-free method."
        )
    if loaded.network is None and weights is not None:
        raise InputError(f"Method {method!r} is training-free and takes no weights; leave --weights out.")
    if loaded.network is not None and weights is None:
        raise InputError(f"Method {method!r} is a network that needs its weights; name their file with --weights.")
    source = Path(method) if method.endswith(".py") else _source(method)
    resolved = load_suite(suite, preset, overrides, [str(source)])
    [(name, described)] = resolved.methods.items()
    settings = loaded.resolve(described.settings)
    state = read_state(weights.path, weights.key) if weights is not None else None
    scoring = Scoring(resolved, options)
    for absent, why in scoring.absent.items():
        console.print(f"[bold]without[/bold] {absent}: {escape(why)}", highlight=False, soft_wrap=True)

    runs = []
    if weights is None or state is None:
        assert loaded.restore is not None
        for mode in scoring.sets:
            methods.check_restore(loaded, CHANNELS[mode], resolved.task.conditions[0])
            attention = loaded.source_sha256 or name  # as `kitbench run` names a reference: one run, whoever made it
            cell = Cell(resolved, mode, name, attention, loaded.source_sha256, {}, None, "cpu", None)
            runs.append(Scored(cell, loaded.restore, None))
    else:
        sha256 = loaded.source_sha256 or given_file_sha256(source)
        for mode, network in _fitting(loaded, settings, scoring, state, weights.path, console).items():
            cost = _cost(network.eval(), CHANNELS[mode])  # on the CPU: counted on fake tensors
            methods.check_network(loaded, network.to(scoring.device), CHANNELS[mode], scoring.device)
            cell = Cell(
                resolved, mode, name, sha256, sha256, settings, None, device_name(scoring.device), None,
                weights_sha256=given_file_sha256(weights.path), weights_key=weights.key,
            )  # fmt: skip
            restore = evaluate.network(network, scoring.device, scoring.protocols[mode], "float32")
            runs.append(Scored(cell, restore, cost))

    folders = []
    with interruptible(how_to_go_on) as stop:
        stop.idle = False
        for scored in runs:
            cell = scored.cell
            folder = RunFolder(options.out / cell.folder)
            with folder.lock():
                begin(folder, _record(scored, loaded, weights, scoring))
                try:
                    score(scoring, cell, folder, scored.restore, f"{cell.mode} {name}", console, stop)
                except (RunError, InputError):
                    raise
                except Exception as error:  # a network may be a stranger's code, and raise anything
                    raise RunError(f"{cell.folder}: {describe_error(error)}") from error
            folders.append(folder)
    return resolved, folders


def _source(name: str) -> Path:
    """The file of a shipped method."""
    spec = importlib.util.find_spec(methods.shipped()[name])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _fitting(
    loaded: methods.Loaded, settings: Mapping[str, object], scoring: Scoring, state: Mapping[str, Tensor], path: Path,
    console: Console,
) -> dict[Mode, nn.Module]:  # fmt: skip
    """The network with these weights in every mode that they fit; others are told. InputError where they fit none."""
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


def _cost(network: nn.Module, channels: int) -> Cost:
    closed = network.macs(RESOLUTION, RESOLUTION) if hasattr(network, "macs") else None  # type: ignore[operator]
    macs = state_macs(network.eval(), channels, RESOLUTION, closed)
    return Cost(
        parameters=sum(p.numel() for p in network.parameters()), attention_parameters=0, resolution=RESOLUTION,
        macs=macs.closed, macs_counted=macs.counted, macs_note=macs.note, train_peak_bytes=None, memory_note=None,
    )  # fmt: skip


def _record(scored: Scored, loaded: methods.Loaded, weights: Weights | None, scoring: Scoring) -> Run:
    cell, suite = scored.cell, scoring.suite
    settings = dict(cell.settings)
    if weights is not None:  # two files of one name must not look alike in a table
        settings["weights"] = f"{weights.path.name}@{cell.identity()['weights_sha256'][:8]}"
    return Run(
        key=cell.key, comparison=cell.comparison, identity=cell.identity(), suite=suite.name, preset=suite.preset,
        mode=cell.mode, method=cell.method, attention=cell.attention, card=loaded.card, settings=settings, seed=None,
        device=cell.device, task=suite.task, backbone=None, recipe=None, train_sets={},
        environment=environment(scoring.device), cost=scored.cost,
    )  # fmt: skip
