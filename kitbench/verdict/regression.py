"""`kitbench check`: compare runs with a stored reference (reference.py), for continuous integration. Tolerances:

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

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
from scipy import stats
from tabulate import tabulate

from kitbench.errors import InputError
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run
from kitbench.text import counted
from kitbench.verdict.differences import unequal_fields
from kitbench.verdict.reference import (
    COSTS,
    CostRow,
    Reference,
    Row,
    collect,
    made_with,
    name_of,
    shared_settings,
    shown,
)

MEMORY = 0.05
TIME = 0.5
FLOOR = {"PSNR": 0.01, "SSIM": 0.0005}
"""Smallest tolerance: differences of rounding between processors."""
ONE_SEED = {"PSNR": 0.1, "SSIM": 0.005}
"""Tolerance where the reference has one seed, hence no spread; the comparison says so."""
FIELDS_SHOWN = 6
"""Most differing fields that a message lists; it states how many more there are."""


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
            f"{self.name}: {self.quantity} is {shown(self.found)}, reference {shown(self.reference)}, "
            f"{self.tolerance} (runs {', '.join(self.runs) or 'none'})"
        )


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
    lines += [line for row in reference.rows for line in _seeds(row, here.get(row.place), current)]
    costs = {(row.comparison, row.method): row for row in current.costs}
    lines += [line for row in reference.costs for line in _costs(row, costs.get((row.comparison, row.method)), time)]
    return lines


def _seeds(row: Row, found: Row | None, current: Reference) -> Iterable[Comparison]:
    """A failure where a row lacks a seed of the reference that others of these runs have: that run did not end."""
    beside = [set(own.psnr) for own in current.rows if own.comparison == row.comparison]
    if found is not None and (lost := sorted(row.psnr.keys() & set().union(*beside) - found.psnr.keys(), key=int)):
        why = f"seed {', '.join(lost)} is not in these runs, but others of that seed are"
        yield Comparison(name_of(row.place), "number of seeds", len(found.psnr), len(row.psnr), why, True, found.runs)


def not_compared(runs: Sequence[RunFolder], reference: Reference) -> tuple[list[str], list[str]]:
    """Seeds of the reference that none of these runs has, and names of their rows that the reference does not have.

    Of the runs' rows, those under the reference's protocol.
    """
    rows, known = collect(runs, reference.protocol).rows, {row.place for row in reference.rows}
    theirs = {(row.comparison, seed) for row in rows for seed in row.psnr}
    absent = {seed for row in reference.rows for seed in row.psnr if (row.comparison, seed) not in theirs}
    others = [f"{name_of(row.place)} (run {row.runs[0]})" for row in rows if row.place not in known]
    return sorted(absent - {"-"}, key=int), others


def made_differently(runs: Sequence[RunFolder], reference: Reference) -> str:
    """`torch 2.14.1, reference 2.13.0`, of what may move scores; empty where nothing differs, or is not known."""
    here = made_with([folder.run for folder in runs])
    found = [(what, here.get(what, ()), values) for what, values in reference.made_with.items()]
    return "; ".join(
        f"{what} {' and '.join(own) or 'not recorded'}, reference {' and '.join(values)}"
        for what, own, values in found
        if own != values
    )


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
    fields = {run.key: unequal_fields(shared_settings(run), settings) for run in trained}
    nearest = min(trained, key=lambda run: (len(fields[run.key]), run.method != row.method, run.seed or 0, run.key))
    found = fields[nearest.key]
    more = f" and {len(found) - FIELDS_SHOWN} more" if len(found) > FIELDS_SHOWN else ""
    listed = ", ".join(found[:FIELDS_SHOWN]) + more
    return f"Run {nearest.key[:10]} ({nearest.method}) differs from {name} in {listed}; {advice}."


def _scores(row: Row, found: Row | None, reference: Reference) -> Iterable[Comparison]:
    name = name_of(row.place)
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
    why = f"from {counted(len(seeds), 'seed')}"
    if paired and methods > 1:
        rest = rest - rest.mean(0, keepdims=True)
        freedom = (methods - 1) * (len(seeds) - 1)
        spread = math.sqrt(float(np.square(rest).sum()) / freedom)
        why = f"from {counted(len(seeds), 'seed')} of {methods} methods, pairwise"
    tolerance = float(stats.t.isf(0.05 / count, freedom)) * spread * math.sqrt(1 / new + 1 / old)
    return (tolerance, f"({why})") if tolerance > FLOOR[quantity] else (FLOOR[quantity], f"({why}; at least this)")


def _costs(row: CostRow, found: CostRow | None, time: float) -> Iterable[Comparison]:
    if found is None:
        return  # its scores are missing too, which already fails
    for field in ("parameters", "macs"):
        new, old = getattr(found, field), getattr(row, field)
        yield Comparison(row.method, COSTS[field], new, old, "no tolerance", new != old, found.runs)
    for field, share in (("peak_bytes", MEMORY), ("step", time)):
        value, before = getattr(found, field), getattr(row, field)
        if before is not None:
            worse = value is None or value > before * (1 + share)
            yield Comparison(row.method, COSTS[field], value, before, f"tolerance {share:.0%} more", worse, found.runs)


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


def check_summary(lines: Sequence[Comparison], unlike: str = "") -> str:
    """Markdown for a pull request: the result, the failures, what made_differently says, and all comparisons."""
    failed = [line for line in lines if line.failed]
    header = ["what", "quantity", "found", "reference", "tolerance", "runs"]

    def grid(some: Sequence[Comparison]) -> str:
        cells = [[x.name, x.quantity, shown(x.found), shown(x.reference), x.tolerance, ", ".join(x.runs)] for x in some]
        return tabulate(cells, header, tablefmt="pipe", disable_numparse=True)

    result = f"{len(failed)} of {len(lines)} comparisons failed" if failed else f"all {len(lines)} comparisons passed"
    parts = [f"## kitbench check: {result}", *([grid(failed)] if failed else [])]
    parts += [f"Made differently from the reference: {unlike}."] if unlike else []
    parts.append(f"<details><summary>all comparisons</summary>\n\n{grid(lines)}\n\n</details>")
    return "\n\n".join(parts) + "\n"
