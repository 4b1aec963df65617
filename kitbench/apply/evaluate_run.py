"""`kitbench eval --run`: a stored run scored on other test sets, without training; its folder keeps the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from kitbench.apply.stored_suite import suite_of
from kitbench.apply.trained import load_trained, trained_method
from kitbench.data.locate import check_root, locate
from kitbench.data.overlap import assert_disjoint
from kitbench.data.own import card_of_set
from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.model.methods import Restore
from kitbench.runs.cell import Cell
from kitbench.runs.given_weights import Scored, score_all
from kitbench.runs.initial import seen_images
from kitbench.runs.prepare import Options, PreparedScoring, prepare_scoring
from kitbench.scoring import evaluate
from kitbench.spec.suite import Protocol
from kitbench.store.folder import RunFolder


@dataclass(frozen=True)
class Wanted:
    """What a stored run is scored on."""

    test_sets: Sequence[str]
    """Names of sets, or paths of folders of pictures."""
    protocol: Protocol | None
    """None: the one that all stored scores of the run have."""
    method_file: Path | None
    """The Python file of a method that is not shipped."""


def score_run(folder: RunFolder, wanted: Wanted, options: Options, console: Console) -> list[RunFolder]:
    """Score a stored run on every set that it has no scores of yet, and store them in its folder.

    Raises InputError before anything is written, RunError where scoring fails, Interrupted on Ctrl-C or SIGTERM.
    """
    record = folder.run
    if "weights_sha256" in record.identity:
        raise InputError(
            f"{folder.path} was scored with given weights; score them again with --method and --weights, on a suite."
        )
    if record.seed is not None:
        trained_method(folder, wanted.method_file)  # refuses a run whose weights or method are not here
    _require_present(wanted.test_sets, options.data)
    protocol = wanted.protocol or _protocol_of(folder)
    sigmas = [evaluation.sigma for evaluation in folder.evaluations()]
    suite = suite_of(record, wanted.test_sets, sigmas, protocol, wanted.method_file)
    scoring = prepare_scoring(suite, replace(options, out=folder.path.parent))
    seen = seen_images(folder, options.data, partial(console.print, markup=False, highlight=False, soft_wrap=True))
    assert_disjoint(seen, scoring.sets[record.mode].test)
    cell = Cell(
        suite, record.mode, record.method, record.attention, None, dict(record.settings), record.seed, record.device,
        record.identity.get("train_sha256"), init_sha256=record.identity.get("init_sha256"),
    )  # fmt: skip
    if cell.key != record.key:
        raise InputError(
            f"{folder.path} was made by a kitbench whose numbers differ from this one's (numerics "
            f"{record.identity.get('numerics')}); score it with that version, or train it again."
        )
    if cell.folder != folder.path.name:
        raise InputError(f"{folder.path} was renamed; name it {cell.folder} again, so that its scores stay together.")
    scored = Scored(cell, _restore(folder, wanted.method_file, scoring), None)
    return score_all([scored], {cell: record}, scoring, console)


def _require_present(names: Sequence[str], root: Path | None) -> None:
    check_root(root)
    for name in names:
        card = card_of_set(name)
        if locate(card, root) is None:
            place = root or "any data folder: give one with --data"
            raise InputError(f"Test set {name} is not in {place}; get it from {card.home}.")


def _protocol_of(folder: RunFolder) -> Protocol:
    """The protocol of all stored scores of a run."""
    found = {evaluation.stamp: evaluation.protocol for evaluation in folder.evaluations()}
    if len(found) != 1:
        under = f"scores under {' and '.join(found)}" if found else "no scores"
        raise InputError(f"{folder.path} has {under}; choose with --protocol.")
    return next(iter(found.values()))


def _restore(folder: RunFolder, method_file: Path | None, scoring: PreparedScoring) -> Restore:
    """The run's method as a function of one image, with the arithmetic of `kitbench run`."""
    record = folder.run
    if record.recipe is None:
        name = record.attention if record.attention in methods.shipped() else str(method_file)
        restore = methods.load_method(name).restore
        assert restore is not None
        return restore
    model, _ = load_trained(folder, method_file, scoring.device)
    model.lay_out(torch.channels_last if record.recipe.channels_last else torch.contiguous_format)
    return evaluate.network(model, scoring.device, scoring.protocols[record.mode], record.recipe.precision)
