"""`kitbench check`: compare runs with a stored reference, for continuous integration.

A reference (JSON, written by `--update`) contains the scores of every seed and the cost of each method. Tolerances:

    PSNR, SSIM    from the spread over seeds in the reference; only a worse score fails
    parameters, GMACs    none: any change fails
    peak memory of a step    a share MEMORY more
    time of a step    a share TIME more, after division by a calibration of the same minute and machine

Seeds that both have are compared in pairs, so that the effect of a seed on all methods cancels from the spread; without
a shared seed the whole spread counts. One-sided, at 5 % over all scores (Bonferroni). Raises InputError for a reference
of another protocol, data version, recipe or device: its numbers are not comparable. The message names the run and the
fields that differ; the reference contains the settings of each comparison for that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from xml.etree import ElementTree

import numpy as np
from pydantic import Field, model_validator
from scipy import stats
from tabulate import tabulate

import kitbench
from kitbench.errors import InputError
from kitbench.spec.fields import Frozen
from kitbench.spec.messages import parse
from kitbench.spec.tasks import condition
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run
from kitbench.verdict.differences import unequal_fields
from kitbench.verdict.entries import Entry, entries, labels

MEMORY = 0.05
TIME = 0.5
FLOOR = {"PSNR": 0.01, "SSIM": 0.0005}
"""Smallest tolerance: differences of rounding between processors."""
ONE_SEED = {"PSNR": 0.1, "SSIM": 0.005}
"""Tolerance where the reference has one seed, hence no spread; the comparison says so."""
FIELDS_SHOWN = 6
"""Most differing fields that a message lists; it states how many more there are."""
Place = tuple[str, str, str, str, str]
"""Comparison, mode, method, data set, condition."""
SeedName = Annotated[str, Field(pattern=r"^(-|0|[1-9][0-9]*)$")]


def _name(place: Place) -> str:
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

    @model_validator(mode="after")
    def _one_row_a_place(self) -> Self:
        if len({row.place for row in self.rows}) < len(self.rows):
            raise ValueError("two rows are of one method, data set and condition")
        return self


@dataclass(frozen=True)
class Comparison:
    """One comparison with the reference."""

    name: str
    quantity: str
    found: float | None
    reference: float | None
    tolerance: str
    failed: bool
    runs: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.quantity} is {_shown(self.found)}, reference {_shown(self.reference)}, "
            f"{self.tolerance} (runs {', '.join(self.runs) or 'none'})"
        )


def _shown(value: float | None) -> str:
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
    shared = {entry.run.comparison: _shared(entry.run) for entry in found if entry.run.comparison}
    return Reference(
        kitbench=kitbench.__version__, protocol=found[0].evaluation.stamp, rows=tuple(rows), costs=tuple(costs),
        shared=dict(sorted(shared.items())),
    )  # fmt: skip


def _shared(run: Run) -> dict[str, Any]:
    """The part of a run's identity that all runs of its comparison have."""
    return {key: value for key, value in run.identity.items() if key not in ("attention", "settings", "seed")}


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


def compare_with_reference(runs: Sequence[RunFolder], reference: Reference, time: float = TIME) -> list[Comparison]:
    """All comparisons of the runs with the reference. Raises InputError where they are not comparable."""
    _same_protocol(runs, reference)
    current = collect(runs, reference.protocol)
    theirs = {row.comparison for row in current.rows}
    for row in reference.rows:
        if row.comparison and row.comparison not in theirs:
            raise InputError(_unlike(row, reference, [folder.run for folder in runs]))
    here = {row.place: row for row in current.rows}
    lines = [line for row in reference.rows for line in _scores(row, here.get(row.place), reference)]
    lines += [line for row in reference.rows for line in _seeds(row, current)]
    costs = {(row.comparison, row.method): row for row in current.costs}
    lines += [line for row in reference.costs for line in _costs(row, costs.get((row.comparison, row.method)), time)]
    return lines


def _seeds(row: Row, current: Reference) -> Iterable[Comparison]:
    """A failure where a row lacks a seed of the reference that others of these runs have: that run did not end."""
    found = next((own for own in current.rows if own.place == row.place), None)
    beside = [set(own.psnr) for own in current.rows if own.comparison == row.comparison]
    if found is not None and (lost := sorted(row.psnr.keys() & set().union(*beside) - found.psnr.keys(), key=int)):
        why = f"seed {', '.join(lost)} is not in these runs, but others of that seed are"
        yield Comparison(_name(row.place), "number of seeds", len(found.psnr), len(row.psnr), why, True, found.runs)


def seeds_left_out(runs: Sequence[RunFolder], reference: Reference) -> list[str]:
    """Seeds of the reference that none of these runs has."""
    theirs = {(row.comparison, seed) for row in collect(runs, reference.protocol).rows for seed in row.psnr}
    absent = {seed for row in reference.rows for seed in row.psnr if (row.comparison, seed) not in theirs}
    return sorted(absent - {"-"}, key=int)


def without_reference(runs: Sequence[RunFolder], reference: Reference) -> list[str]:
    """Names of the rows of these runs, under the reference's protocol, that the reference does not have."""
    known = {row.place for row in reference.rows}
    rows = collect(runs, reference.protocol).rows
    return [f"{_name(row.place)} (run {row.runs[0]})" for row in rows if row.place not in known]


def _same_protocol(runs: Sequence[RunFolder], reference: Reference) -> None:
    """Raises InputError where there are evaluations, and none is under the reference's protocol."""
    stamps = {folder.run.key[:10]: {e.stamp for e in folder.evaluations()} for folder in runs}
    scored = {key: found for key, found in stamps.items() if found}
    if scored and not any(reference.protocol in found for found in scored.values()):
        key, found = next(iter(scored.items()))
        raise InputError(
            f"Run {key} was scored under {', '.join(sorted(found))}, the reference under {reference.protocol}; score "
            f"the runs under that protocol, or write a new reference with --update."
        )


def _unlike(row: Row, reference: Reference, runs: Sequence[Run]) -> str:
    """Why none of these runs can be compared with a row of the reference: the nearest run, and where it differs."""
    name = f"{row.method} of the reference (run {row.runs[0]})"
    advice = "run the suite and preset of the reference, or write a new reference with --update"
    trained = [run for run in runs if run.comparison]
    if not trained:
        return f"{name} was trained, and none of these runs was; {advice}."
    settings = reference.shared.get(row.comparison)
    if settings is None:
        return (
            f"Run {trained[0].key[:10]} ({trained[0].method}) differs from {name}, and the reference does not contain "
            f"its settings, because an earlier version wrote it; {advice}."
        )
    fields = {run.key: unequal_fields(_shared(run), settings) for run in trained}
    nearest = min(trained, key=lambda run: (len(fields[run.key]), run.method != row.method, run.seed or 0, run.key))
    found = fields[nearest.key]
    more = f" and {len(found) - FIELDS_SHOWN} more" if len(found) > FIELDS_SHOWN else ""
    listed = ", ".join(found[:FIELDS_SHOWN]) + more
    return f"Run {nearest.key[:10]} ({nearest.method}) differs from {name} in {listed}; {advice}."


def _scores(row: Row, found: Row | None, reference: Reference) -> Iterable[Comparison]:
    name = _name(row.place)
    if found is None:
        yield Comparison(name, "PSNR", None, float(np.mean(list(row.psnr.values()))), "not in these runs", True, ())
        return
    if found.data_sha256 != row.data_sha256:
        raise InputError(
            f"Run {found.runs[0]} ({row.method}) was scored on other images of {row.data_set} "
            f"({found.data_sha256[:8]}) than the reference ({row.data_sha256[:8]}); restore the set, or write a new "
            f"reference with --update."
        )
    for quantity, old, new in (("PSNR", row.psnr, found.psnr), ("SSIM", row.ssim, found.ssim)):
        shared = sorted(old.keys() & new.keys())
        a = [new[seed] for seed in shared or new]
        b = [old[seed] for seed in shared or old]
        tolerance, why = score_tolerance(row, quantity, len(a), len(b), bool(shared), reference)
        mean, before = float(np.mean(a)), float(np.mean(b))
        worse = not mean >= before - tolerance
        yield Comparison(name, quantity, mean, before, f"tolerance {tolerance:.4f} {why}", worse, found.runs)


def score_tolerance(
    row: Row, quantity: str, new: int, old: int, paired: bool, reference: Reference
) -> tuple[float, str]:
    """How much worse a mean over `new` seeds may be than one over `old`, and the reason."""
    if "-" in row.psnr:
        return FLOOR[quantity], "(training-free)"
    field = "psnr" if quantity == "PSNR" else "ssim"
    peers = [r for r in reference.rows if (r.comparison, *r.place[3:]) == (row.comparison, *row.place[3:])]
    seeds = sorted(set.intersection(*(set(getattr(peer, field)) for peer in peers)))
    scores = np.array([[getattr(peer, field)[seed] for seed in seeds] for peer in peers])  # [methods, seeds]
    scores = scores if np.isfinite(scores).all() else scores[:0]
    count = 2 * len(reference.rows)
    methods = len(scores)
    if len(seeds) < 2 or not methods:
        return ONE_SEED[quantity], "(by default: the reference has no spread over seeds)"
    rest = scores - scores.mean(1, keepdims=True)
    freedom = len(seeds) - 1  # a seed affects all methods alike
    spread = math.sqrt(float(np.square(rest).sum()) / (methods * freedom))
    why = f"from {len(seeds)} seeds"
    if paired and methods > 1:
        rest = rest - rest.mean(0, keepdims=True)
        freedom = (methods - 1) * (len(seeds) - 1)
        spread = math.sqrt(float(np.square(rest).sum()) / freedom)
        why = f"from {len(seeds)} seeds of {methods} methods, pairwise"
    tolerance = float(stats.t.isf(0.05 / count, freedom)) * spread * math.sqrt(1 / new + 1 / old)
    return (tolerance, f"({why})") if tolerance > FLOOR[quantity] else (FLOOR[quantity], f"({why}; at least this)")


def _costs(row: CostRow, found: CostRow | None, time: float) -> Iterable[Comparison]:
    if found is None:
        return  # its scores are missing too, which already fails
    for quantity, new, old in (("parameters", found.parameters, row.parameters), ("MACs", found.macs, row.macs)):
        yield Comparison(row.method, quantity, new, old, "no tolerance", new != old, found.runs)
    for quantity, value, before, share in (
        ("peak memory of a step (bytes)", found.peak_bytes, row.peak_bytes, MEMORY),
        ("time of a step (calibration runs)", found.step, row.step, time),
    ):
        if before is not None:
            worse = value is None or value > before * (1 + share)
            yield Comparison(row.method, quantity, value, before, f"tolerance {share:.0%} more", worse, found.runs)


def changes(old: Reference, new: Reference) -> list[str]:
    """The differences between two references, one line each."""
    changed = [] if old.protocol == new.protocol else [f"protocol: {old.protocol} -> {new.protocol}"]
    rows = [{row.place: row for row in r.rows} for r in (old, new)]
    for place in sorted(rows[0].keys() | rows[1].keys()):
        changed += [f"{_name(place)}: {what}" for what in _row_changes(rows[0].get(place), rows[1].get(place))]
    costs = [{(row.comparison, row.method): row for row in r.costs} for r in (old, new)]
    for key in sorted(costs[0].keys() | costs[1].keys()):
        for field in ("parameters", "macs", "peak_bytes", "step"):
            a, b = (getattr(c.get(key), field, None) for c in costs)
            if a != b:
                changed.append(f"{key[1]}: {field} {_shown(a)} -> {_shown(b)}")
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
            yield f"{quantity} {_shown(a)} -> {_shown(b)}{unit}{moved}"
        elif old is not None and new is not None and getattr(old, field) != getattr(new, field):
            yield f"{quantity} of single seeds, with the same mean"


def junit(lines: Sequence[Comparison]) -> bytes:
    """JUnit XML with one test case for each comparison."""
    failures = str(sum(line.failed for line in lines))
    counts = {"tests": str(len(lines)), "failures": failures, "errors": "0"}
    suite = ElementTree.Element("testsuite", counts, name="kitbench check")
    for line in lines:
        case = ElementTree.SubElement(suite, "testcase", classname=line.name, name=line.quantity)
        if line.failed:
            ElementTree.SubElement(case, "failure", message=str(line))
    text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def junit_error(message: str) -> bytes:
    """JUnit XML of a check that could not be made: one test case with an error."""
    suite = ElementTree.Element("testsuite", name="kitbench check", tests="1", failures="0", errors="1")
    case = ElementTree.SubElement(suite, "testcase", classname="kitbench check", name="can be compared")
    ElementTree.SubElement(case, "error", message=message)
    text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def check_summary(lines: Sequence[Comparison]) -> str:
    """Markdown for a pull request: the result, the failures, and all comparisons."""
    failed = [line for line in lines if line.failed]
    header = ["what", "quantity", "found", "reference", "tolerance", "runs"]

    def grid(some: Sequence[Comparison]) -> str:
        cells = [
            [x.name, x.quantity, _shown(x.found), _shown(x.reference), x.tolerance, ", ".join(x.runs)] for x in some
        ]
        return tabulate(cells, header, tablefmt="pipe", disable_numparse=True)

    result = f"{len(failed)} of {len(lines)} comparisons failed" if failed else f"all {len(lines)} comparisons passed"
    parts = [f"## kitbench check: {result}", *([grid(failed)] if failed else [])]
    parts.append(f"<details><summary>all comparisons</summary>\n\n{grid(lines)}\n\n</details>")
    return "\n\n".join(parts) + "\n"
