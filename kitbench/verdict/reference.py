"""A reference of `kitbench check`: a JSON file, written by `--update`, of scores of all seeds and costs of methods.

It also contains the settings of each comparison, so that a message can say where runs differ from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

import kitbench
from kitbench.errors import InputError
from kitbench.spec.fields import Frozen
from kitbench.spec.messages import parse
from kitbench.spec.tasks import condition
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run
from kitbench.verdict.entries import Entry, entries, labels

Place = tuple[str, str, str, str, str]
"""Comparison, mode, method, data set, condition."""
RELEASES = ("torch", "numpy")
"""Libraries whose release may move scores, and which a reference therefore states."""
SeedName = Annotated[str, Field(pattern=r"^(-|0|[1-9][0-9]*)$")]


def name_of(place: Place) -> str:
    return f"{place[2]} on {place[3]} ({place[1]}) {place[4]}".strip()


class Row(Frozen):
    """The scores of one method on one data set under one condition, by seed ('-' for a training-free method)."""

    comparison: str
    mode: str
    method: str
    data_set: str
    data_sha256: str
    sigma: float | None
    psnr: Annotated[dict[SeedName, float], Field(min_length=1)]
    ssim: Annotated[dict[SeedName, Annotated[float, Field(ge=-1, le=1)]], Field(min_length=1)]
    runs: tuple[str, ...]

    @property
    def place(self) -> Place:
        return self.comparison, self.mode, self.method, self.data_set, condition(self.sigma)


class CostRow(Frozen):
    """Cost of one method, over its runs: mean memory, median time of a step in units of the calibration."""

    comparison: str
    method: str
    parameters: int
    macs: int | None
    peak_bytes: float | None
    step: float | None
    runs: tuple[str, ...]


class Reference(Frozen):
    """A reference file."""

    schema_version: Literal[1] = 1
    kitbench: str
    protocol: str
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    costs: tuple[CostRow, ...]
    shared: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By comparison: what its runs share (task, backbone, recipe, training images, device, NUMERICS). Empty in
    references that were written before it was kept."""
    made_with: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """`torch`, `numpy`, `machine`: all that its runs were made with. Empty likewise."""

    @model_validator(mode="after")
    def _one_row_a_place(self) -> Self:
        if len({row.place for row in self.rows}) < len(self.rows):
            raise ValueError("two rows are of one method, data set and condition")
        return self


COSTS = {
    "parameters": "parameters", "macs": "MACs", "peak_bytes": "peak memory of a step (bytes)",
    "step": "time of a step (calibration runs)",
}  # fmt: skip
"""What messages call the fields of `CostRow`."""


def shown(value: float | None) -> str:
    return "missing" if value is None else f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"


def collect(runs: Sequence[RunFolder], protocol: str | None) -> Reference:
    """What these runs reach. Raises InputError for rows of two protocols or of two versions of a data set."""
    found = entries(runs, protocol)
    names = labels(found)
    groups: dict[Place, list[Entry]] = {}
    trained: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in sorted(found, key=lambda e: (e.run.seed or 0, e.run.key)):
        name = names[entry.run.key, entry.run.method]
        if not math.isfinite(entry.evaluation.mean_psnr):
            raise InputError(f"{name} restored an image of {entry.evaluation.data_set} exactly: no PSNR to compare.")
        place = (entry.run.comparison, entry.run.mode, name, entry.evaluation.data_set, entry.evaluation.condition)
        groups.setdefault(place, []).append(entry)
        if entry.training:
            trained.setdefault((entry.run.comparison, name), {})[entry.run.key] = entry
    rows = [
        Row(
            comparison=place[0], mode=place[1], method=place[2], data_set=place[3], sigma=group[0].evaluation.sigma,
            data_sha256=group[0].evaluation.data_sha256,
            psnr={_seed(e): e.evaluation.mean_psnr for e in group},
            ssim={_seed(e): e.evaluation.mean_ssim for e in group},
            runs=tuple(e.run.key[:10] for e in group),
        )
        for place, group in sorted(groups.items())
    ]  # fmt: skip
    costs = [_cost(*place, list(group.values())) for place, group in sorted(trained.items())]
    shared = {entry.run.comparison: shared_settings(entry.run) for entry in found if entry.run.comparison}
    return Reference(
        kitbench=kitbench.__version__, protocol=found[0].evaluation.stamp, rows=tuple(rows), costs=tuple(costs),
        shared=dict(sorted(shared.items())), made_with=made_with([entry.run for entry in found]),
    )  # fmt: skip


def shared_settings(run: Run) -> dict[str, Any]:
    """The part of a run's identity that all runs of its comparison have."""
    return {key: value for key, value in run.identity.items() if key not in ("attention", "settings", "seed")}


def made_with(runs: Iterable[Run]) -> dict[str, tuple[str, ...]]:
    """The releases and the machines of the runs, each once."""
    found: dict[str, set[str]] = {}
    for environment in (run.environment for run in runs):
        versions = {what: environment.versions[what] for what in RELEASES if what in environment.versions}
        for what, value in {**versions, "machine": environment.host}.items():
            found.setdefault(what, set()).add(value)
    return {what: tuple(sorted(values)) for what, values in found.items()}


def _seed(entry: Entry) -> str:
    return "-" if entry.run.seed is None else str(entry.run.seed)


def _cost(comparison: str, method: str, group: list[Entry]) -> CostRow:
    trainings = [entry.training for entry in group if entry.training]
    first = trainings[0].cost
    steps = [
        (t.cost.step_seconds or t.seconds_per_step) / t.cost.calibration_seconds
        for t in trainings
        if t.cost.calibration_seconds
    ]
    peaks = [t.cost.train_peak_bytes for t in trainings if t.cost.train_peak_bytes is not None]
    return CostRow(
        comparison=comparison, method=method, parameters=first.parameters,
        macs=first.stated_macs,
        peak_bytes=float(np.mean(peaks)) if peaks else None,
        step=float(np.median(steps)) if len(steps) == len(trainings) else None,
        runs=tuple(entry.run.key[:10] for entry in group),
    )  # fmt: skip


def read_reference(path: Path) -> Reference:
    """A stored reference. Raises InputError."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"Reference {path} cannot be read ({error.strerror}); write one with `kitbench check ... --update`."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged, or no reference ({error}). Take it from version control again, or give another file."
        ) from error
    try:
        return parse(Reference, raw, f"{path}, which is no reference of this version of kitbench")
    except InputError as error:
        raise InputError(
            f"{error} If it was one, take it from version control again; `kitbench check ... --update` writes a new "
            "one into another file."
        ) from error


def changes(old: Reference, new: Reference) -> list[str]:
    """The differences between two references, one line each."""
    changed = [] if old.protocol == new.protocol else [f"protocol: {old.protocol} -> {new.protocol}"]
    for what in sorted(old.made_with.keys() | new.made_with.keys()):
        before, now = (" and ".join(r.made_with.get(what, ())) or "not recorded" for r in (old, new))
        changed += [] if before == now else [f"{what}: {before} -> {now}"]
    rows = [{row.place: row for row in r.rows} for r in (old, new)]
    for place in sorted(rows[0].keys() | rows[1].keys()):
        changed += [f"{name_of(place)}: {what}" for what in _row_changes(rows[0].get(place), rows[1].get(place))]
    costs = [{(row.comparison, row.method): row for row in r.costs} for r in (old, new)]
    for key in sorted(costs[0].keys() | costs[1].keys()):
        for field, what in COSTS.items():
            a, b = (getattr(c.get(key), field, None) for c in costs)
            if a != b:
                changed.append(f"{key[1]}: {what} {shown(a)} -> {shown(b)}")
    return changed


def _row_changes(old: Row | None, new: Row | None) -> Iterable[str]:
    """What differs between two rows of one place; None where a reference does not have it."""
    if old is not None and new is not None:
        if old.psnr.keys() != new.psnr.keys():
            seeds = [", ".join(sorted(row.psnr, key=lambda seed: (len(seed), seed))) for row in (old, new)]
            yield f"seeds {seeds[0]} -> {seeds[1]}, which the tolerances depend on"
        if old.data_sha256 != new.data_sha256:
            yield f"images {old.data_sha256[:8]} -> {new.data_sha256[:8]}"
    for quantity, field, unit in (("PSNR", "psnr", " dB"), ("SSIM", "ssim", "")):
        a, b = (None if row is None else float(np.mean(list(getattr(row, field).values()))) for row in (old, new))
        if a != b:
            moved = "" if a is None or b is None else f" ({b - a:+.4f})"
            yield f"{quantity} {shown(a)} -> {shown(b)}{'' if b is None else unit}{moved}"
        elif old is not None and new is not None and getattr(old, field) != getattr(new, field):
            yield f"{quantity} of single seeds, with the same mean"
