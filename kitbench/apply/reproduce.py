"""`kitbench reproduce`: run a stored cell again from its record alone, and compare the numbers.

bit-identical            weights, losses and the scores of every image are equal to the last bit
within the seed spread   mean PSNR and SSIM of every evaluation are within WIDTH standard deviations over the seeds of
                         the same cell that are stored in the same folder; imported runs do not count. Where weights
                         and losses are bit-identical only rounding is allowed.
different                anything else; the first difference in data, code, settings, device, versions, ... is named
"""

from __future__ import annotations

import shlex
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from kitbench.apply.stored_suite import suite_of
from kitbench.errors import InputError, RunError
from kitbench.model import methods
from kitbench.runs.prepare import Options, PreparedSuite, prepare
from kitbench.runs.queue import run_suite
from kitbench.runs.sets import set_sha256
from kitbench.spec.fields import digest
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder, find, without_imported
from kitbench.store.records import Evaluation, Run
from kitbench.system.environment import commit, device_name
from kitbench.text import counted
from kitbench.verdict.differences import RunDifference, differences, shared
from kitbench.verdict.regression import FLOOR, ONE_SEED

WIDTH = 2.0
Verdict = Literal["bit-identical", "within the seed spread", "different"]


@dataclass(frozen=True)
class Outcome:
    """The result of running one stored cell again."""

    verdict: Verdict
    why: str
    first: RunDifference | None
    """The first recorded difference, which may explain the result; None where there is none."""
    notes: tuple[str, ...]


def groups(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """Runs that can be made again side by side, as methods and seeds of one suite: all else is the same, and each of
    the methods has each of the seeds.
    """
    of_seed: dict[tuple[str, int | None], list[RunFolder]] = {}
    for folder in runs:
        record = folder.run
        scored = [[e.data_set, e.data_sha256, e.sigma, e.stamp] for e in folder.evaluations()]
        one_protocol = len({stamp for *_, stamp in scored}) == 1
        shared = [record.comparison, record.mode, record.environment.threads, scored]
        alone = record.seed is None or not one_protocol or record.attention not in methods.shipped()
        same = of_seed.setdefault((digest([*shared, str(folder.path) if alone else ""]), record.seed), [])
        if any(other.run.method == record.method for other in same):
            same = of_seed.setdefault((digest([*shared, str(folder.path)]), record.seed), [])
        same.append(folder)
    found: dict[str, list[RunFolder]] = {}
    for (key, _), same in of_seed.items():
        of_methods = {one.run.method: [one.run.attention, one.run.settings] for one in same}
        found.setdefault(digest([key, of_methods]), []).extend(same)
    return list(found.values())


def reproduce(
    group: Sequence[RunFolder], options: Options, method_file: Path | None, console: Console
) -> list[Outcome]:
    """Run the cells of one of `groups` again in `options.out`, and compare the results with what is stored.

    Runs stored beside them determine the spread over seeds. options.device: `auto` for the device of the record, where
    this machine has it. Raises InputError where a record is incomplete or needs a file or data that are missing,
    RunError where a run fails, Interrupted on Ctrl-C.
    """
    for stored in group:
        _require_complete(stored)
    record, evaluations = group[0].run, group[0].evaluations()
    options, _ = _place(record, options if len(group) > 1 else replace(options, jobs=1))
    suites = [_suite(record, own, method_file) for own in _by_protocol(evaluations)]
    for stored in group[1:]:
        other = _suite(stored.run, evaluations, method_file)
        suites = [
            suite.model_copy(
                update={
                    "methods": suite.methods | other.methods,
                    "seeds": tuple(dict.fromkeys((*suite.seeds, *other.seeds))),
                }
            )
            for suite in suites
        ]
    notes = [_place(stored.run, options)[1] for stored in group]
    try:
        prepared = prepare(suites[0], options)
    except InputError as error:
        named = (*record.train_sets, *(evaluation.data_set for evaluation in evaluations))
        if relative := next((name for name in named if "/" in name and not Path(name).is_absolute()), None):
            raise InputError(
                f"{error} Give the command in the folder in which the run on {relative} was made."
            ) from error
        raise
    parted = _data(record, evaluations, prepared)
    if parted is not None:
        return [Outcome("different", "the data differ, so nothing was run", parted, tuple(own)) for own in notes]
    with _threads(record, options.device) as thread_notes:
        for suite in suites:
            complete, failed = run_suite(suite, options, console)
            if failed:
                raise RunError("; ".join(failed))
    made = {(folder.run.method, folder.run.seed): folder for folder in complete}
    return [
        compare_runs(stored, made[stored.run.method, stored.run.seed], _siblings(stored), [*own, *thread_notes])
        for stored, own in zip(group, notes, strict=True)
    ]


def _require_complete(stored: RunFolder) -> None:
    record = stored.run
    if not stored.evaluations():
        raise InputError(f"{stored.path} is not complete, so there is nothing to compare with; finish it first.")
    given_weights = "weights_sha256" in record.identity
    if given_weights or (record.seed is None and record.attention not in methods.shipped()):
        what = "with given weights" if given_weights else "by a user's own training-free method"
        raise InputError(
            f"{stored.path} was scored {what}: score them again with "
            f"`{shlex.join(record.environment.command)}` and compare the two with `kitbench diff`."
        )


def _siblings(stored: RunFolder) -> list[RunFolder]:
    """The runs stored beside a run."""
    return [other for other in find([stored.path.absolute().parent]) if other.path.name != stored.path.name]


def compare_runs(
    stored: RunFolder, made: RunFolder, siblings: Sequence[RunFolder], notes: Sequence[str] = ()
) -> Outcome:
    """Compare a repeated run with the stored one."""
    found = differences(stored, made)
    parted = [difference for difference in found if difference.kind == "numbers"]
    pairs = shared(stored, made)
    if len(pairs) < len(stored.evaluations()):
        raise RunError(f"{made.path} lacks evaluations that {stored.path} has")
    first = next((d for d in found if d.kind not in ("numbers", "host")), found[0] if found else None)
    if not parted:
        images = sum(len(evaluation.scores) for evaluation, _ in pairs)
        what = "weights, losses and " if stored.trained else ""
        return Outcome("bit-identical", f"{what}the scores of {counted(images, 'image')}", None, tuple(notes))
    beyond, moves = [], []
    same = stored.trained and not any(d.what == "weights" or d.what.startswith("loss at") for d in parted)
    for old, new in pairs:
        means = (("PSNR", " dB", old.mean_psnr, new.mean_psnr), ("SSIM", "", old.mean_ssim, new.mean_ssim))
        for name, unit, before, after in means:
            rounding = FLOOR[name], f"allowed: {FLOOR[name]:g}, by the same weights"
            tolerance, basis = rounding if same else _spread(name, stored, siblings, old)
            where = f"{old.data_set} {old.condition}".strip()
            moved = 0.0 if after == before else after - before  # both may be infinite
            line = f"{name} on {where} changed by {moved:+.2g}{unit} ({basis})"
            moves.append((abs(moved) / tolerance, line))
            if abs(moved) > tolerance:
                beyond.append(line)
    why = f"{'weights and losses are bit-identical; ' if same else ''}{max(moves)[1]}; first difference: {parted[0]}"
    return Outcome("different" if beyond else "within the seed spread", why, first, tuple(notes))


def _spread(name: str, stored: RunFolder, siblings: Sequence[RunFolder], evaluation: Evaluation) -> tuple[float, str]:
    """How much a mean may change, and why."""
    record, values = stored.run, {}
    for folder in without_imported([stored, *siblings])[0]:
        other = folder.run
        cell = ("comparison", "attention", "settings")
        if all(getattr(other, key) == getattr(record, key) for key in cell):
            for own in folder.evaluations():
                same = ("data_set", "data_sha256", "sigma", "stamp")
                if all(getattr(own, key) == getattr(evaluation, key) for key in same):
                    values[other.seed] = own.mean_psnr if name == "PSNR" else own.mean_ssim
    if record.seed is None:
        return FLOOR[name], f"allowed: {FLOOR[name]:g}, without training"
    if len(values) < 2:
        why = "one seed has no spread" if values else "no run that was made here shows a spread"
        return ONE_SEED[name], f"allowed: {ONE_SEED[name]:g}, because {why}"
    spread = statistics.stdev(values.values())
    allowed = max(WIDTH * spread, FLOOR[name])
    return allowed, f"allowed: {allowed:.2g}, from a standard deviation of {spread:.2g} over {len(values)} seeds"


def _place(record: Run, options: Options) -> tuple[Options, list[str]]:
    """The device to run on, and notes on differences of code and device."""
    notes, here = [], commit()
    made = record.environment.commit
    if made is None or here is None:
        notes.append(f"made from commit {made or 'unknown'}, this is {here or 'unknown'}")
    elif made != here or "+dirty" in made:
        dirty = "; the stored run was made from uncommitted code" if "+dirty" in made else ""
        notes.append(f"made from commit {made[:10]}, this is {here[:10]}{'+dirty' if '+dirty' in here else ''}{dirty}")
    if options.device != "auto":
        return options, notes
    cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    match = [name for name in ["cpu", *cuda] if device_name(torch.device(name)) == record.environment.device]
    if not match:
        notes.append(f"made on {record.environment.device}, which this machine does not have")
    return replace(options, device=match[0] if match else "auto"), notes


@contextmanager
def _threads(record: Run, device: str) -> Iterator[list[str]]:
    """Set the number of threads of the record for the block: the order of summation depends on it. Yields notes."""
    before, wanted = torch.get_num_threads(), record.environment.threads
    # Even setting the current number would disable MKL's own choice of threads, and change the last bits.
    if device != "cpu" or before == wanted:
        yield []
        return
    torch.set_num_threads(wanted)
    try:
        yield [f"made with {wanted} threads, default here {before}: for identical bits set OMP_NUM_THREADS={wanted}"]
    finally:
        torch.set_num_threads(before)


def _by_protocol(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.stamp, []).append(evaluation)
    return list(groups.values())


def _suite(record: Run, evaluations: Sequence[Evaluation], method_file: Path | None) -> Suite:
    """A suite of the record's cell alone, scored under one protocol."""
    names, sigmas = [e.data_set for e in evaluations], [e.sigma for e in evaluations]
    return suite_of(record, names, sigmas, evaluations[0].protocol, method_file)


def _data(record: Run, evaluations: Sequence[Evaluation], prepared: PreparedSuite) -> RunDifference | None:
    """The first set whose images are not those of the record."""
    sets = prepared.sets[record.mode]
    for name, photographs in sets.train.items():
        if name in record.train_sets and set_sha256(photographs) != record.train_sets[name]:
            return RunDifference("data", f"training set {name}", record.train_sets[name], set_sha256(photographs))
    first, now = record.identity.get("init_sha256"), prepared.initial.sha256 if prepared.initial else None
    if first != now:
        return RunDifference("data", "weights that training starts from", first, now)
    for evaluation in evaluations:
        if evaluation.data_set not in sets.test:
            raise InputError(f"Test set {evaluation.data_set} was not found; give the data folder with --data.")
        found = prepared.test_sha256(record.mode, evaluation.data_set)
        if found != evaluation.data_sha256:
            return RunDifference("data", f"test set {evaluation.data_set}", evaluation.data_sha256, found)
    return None


@contextmanager
def folder_for(out: Path | None) -> Iterator[Path]:
    """The folder for the repeated runs: the given one, or a temporary one that is deleted after the block."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="kitbench-") as place:
        yield Path(place)
