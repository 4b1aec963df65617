"""Stored evaluations with the runs they belong to, of one protocol and one version of each data set."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from kitbench.errors import InputError
from kitbench.spec.shipped import builtin
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Run, Training


@dataclass(frozen=True)
class Entry:
    """One evaluation with the run it belongs to."""

    run: Run
    training: Training | None
    evaluation: Evaluation
    by: str | None = None
    """Who made an imported run; None where it was made here."""


def entries(runs: Sequence[RunFolder], protocol: str | None) -> list[Entry]:
    """All stored evaluations, of one protocol, each once though its run be in two folders.

    Raises InputError where there are two protocols and none was chosen, two versions of a data set, two copies of a
    run with unequal scores, or two runs that say they are the same one.
    """
    found = [
        Entry(record, folder.training, evaluation, origin.by if origin else None)
        for folder in runs
        for record, origin in [(folder.run, folder.origin)]
        for evaluation in folder.evaluations()
    ]
    stamps = sorted({entry.evaluation.stamp for entry in found})
    if protocol is not None:
        chosen = [entry for entry in found if scored_under(entry.evaluation, protocol)]
        if not chosen:
            raise InputError(f"No row was scored under protocol {protocol!r}; found: {', '.join(stamps) or 'none'}.")
        found = chosen
        stamps = sorted({entry.evaluation.stamp for entry in found})
    if len(stamps) > 1:
        raise InputError(
            f"Rows of different protocols cannot be in one table: found {' and '.join(stamps)}; "
            f"choose one, for example with --protocol {stamps[0]}."
        )
    if not found and not runs:
        raise InputError("There are no runs in these folders; give a folder of runs.")
    if not found:
        raise InputError("These runs have no evaluation yet; let `kitbench run` finish first.")
    contents: dict[str, str] = {}
    for entry in found:
        name, content = f"{entry.evaluation.data_set} ({entry.run.mode})", entry.evaluation.data_sha256
        if contents.setdefault(name, content) != content:
            raise InputError(
                f"Two versions of data set {name} ({contents[name][:8]}, {content[:8]}) cannot be in one table; "
                f"give fewer runs."
            )
    found = _each_once(found)
    _refuse_twins(found)
    return found


def _refuse_twins(found: Sequence[Entry]) -> None:
    """A comparison, an attention, its settings and a seed decide a run's key: two keys of one run are a forgery."""
    keys: dict[str, str] = {}
    for entry in found:
        run = entry.run
        what = json.dumps([run.comparison, run.method, run.attention, run.settings, run.seed], sort_keys=True)
        if run.comparison and keys.setdefault(what, run.key) != run.key:
            raise InputError(
                f"Runs {keys[what][:10]} and {run.key[:10]} both say that they are {run.method}, seed {run.seed}, of "
                f"one comparison, but have different keys: one is not what it says; leave it out."
            )


def _each_once(found: Sequence[Entry]) -> list[Entry]:
    """Without further copies of a run: a seed that counts twice makes an interval too narrow."""
    kept: dict[tuple[str, str, str, float | None], Entry] = {}
    for entry in found:
        run, evaluation = entry.run, entry.evaluation
        first = kept.setdefault((run.key, run.method, evaluation.data_set, evaluation.sigma), entry)
        if first.evaluation is not evaluation and not first.evaluation.same_scores(evaluation):
            raise InputError(
                f"Run {run.key[:10]} is in two of these folders, with unequal scores on {evaluation.data_set}; give "
                f"one of them, and compare them with `kitbench diff`."
            )
    return list(kept.values())


def scored_under(evaluation: Evaluation, protocol: str) -> bool:
    """Whether a result was scored under a protocol, named by its stamp or its id; a shipped id is that of the shipped
    keys alone.
    """
    name = evaluation.protocol.id
    own = "+" in evaluation.stamp
    return protocol == evaluation.stamp or (protocol == name and not (own and name in builtin("protocols")))


def mean_psnr(entry: Entry) -> float:
    """Mean over images, dB; infinite where an image was restored exactly."""
    return entry.evaluation.mean_psnr


def mean_ssim(entry: Entry) -> float:
    """Mean over images."""
    return entry.evaluation.mean_ssim


def mean_lpips(evaluation: Evaluation) -> float | None:
    """Mean over images; None where an image has none."""
    known = [score.lpips for score in evaluation.scores if score.lpips is not None]
    return math.fsum(known) / len(known) if len(known) == len(evaluation.scores) else None


def suites_by_comparison(found: Sequence[Entry]) -> dict[str, set[str]]:
    """The suites that the runs of each comparison were made by."""
    suites: dict[str, set[str]] = {}
    for entry in found:
        suites.setdefault(entry.run.comparison, set()).add(entry.run.suite)
    return suites


@cache
def shipped_methods() -> frozenset[str]:
    """The names of the shipped methods, which any suite takes."""
    files = [file.name for file in resources.files("kitbench.baselines").iterdir() if file.name.endswith(".py")]
    return frozenset(("kit", *(name.removesuffix(".py").rstrip("_").replace("_", "-") for name in files)))


@cache
def _attentions() -> dict[str, set[str]]:
    """The attentions behind each name of a method in the shipped suites and in the shipped files of methods."""
    found = {name: {name} for name in shipped_methods()}
    for text in builtin("suites").values():
        for name, method in tomllib.loads(text)["methods"].items():
            found.setdefault(name, set()).add(method.get("attention", name))
    return found


def from_file(run: Run) -> bool:
    """Whether the attention is a file of the user's own: then `attention` is the SHA-256 of its text.

    A whole network with given weights is no attention: its text is always named so, and its weights tell it apart.
    """
    return "weights" not in run.settings and re.fullmatch("[0-9a-f]{64}", run.attention) is not None


def bare_label(run: Run) -> str:
    """The method's name, with what is behind it where that is not the attention that a shipped name stands for."""
    shipped = _attentions().get(run.method)
    if shipped is None or run.seed is None or "weights" in run.settings or run.attention in shipped:
        return run.method
    return f"{run.method} ({'file' if from_file(run) else 'attention'} {run.attention[:8]})"


def labels(found: Sequence[Entry]) -> dict[tuple[str, str], str]:
    """What each run, by key and method, is called: its method, with the settings behind it where two runs of a
    comparison differ by these only."""
    by_name: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for entry in found:
        run = entry.run
        variants = by_name.setdefault((run.comparison, bare_label(run)), {})
        variants[json.dumps([run.attention, run.settings], sort_keys=True)] = {
            "attention": run.attention[:8],
            **run.settings,
        }
    named = {}
    for entry in found:
        run, label = entry.run, bare_label(entry.run)
        variants = by_name[run.comparison, label]
        own = {"attention": run.attention[:8], **run.settings}
        differing = [key for key in own if len({str(variant.get(key)) for variant in variants.values()}) > 1]
        behind = ", ".join(f"{key} {own[key]}" for key in differing)
        named[run.key, run.method] = f"{label} ({behind})" if behind else label
    return named
