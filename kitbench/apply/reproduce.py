"""`kitbench reproduce`: a stored run made again from its own record alone, and what became of its numbers.

bit-identical            weights, losses and the scores of every image are equal to the last bit
within the seed spread   mean PSNR and SSIM of every evaluation lie within WIDTH standard deviations over the seeds
                         that are stored beside the run
different                the first thing that differs is named: data, code, setting, device, version, flag, ...
"""

from __future__ import annotations

import math
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

from kitbench.errors import InputError, RunError
from kitbench.model import methods
from kitbench.runs.prepare import Job, Options
from kitbench.runs.queue import run
from kitbench.spec.loading import load
from kitbench.spec.suite import Data, Method, Sets, Source, Suite
from kitbench.spec.tasks import Denoise
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Run
from kitbench.system.environment import commit, device_name
from kitbench.verdict.differences import Difference, differences, shared
from kitbench.verdict.reference import FLOOR, ONE_SEED

WIDTH = 2.0
Verdict = Literal["bit-identical", "within the seed spread", "different"]


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    verdict: Verdict
    why: str
    first: Difference | None
    """What may explain it; None where nothing that is recorded differs."""
    notes: tuple[str, ...]


def reproduce(
    stored: RunFolder, siblings: Sequence[RunFolder], options: Options, method_file: Path | None, console: Console
) -> Outcome:
    """Run a stored cell again in `options.out`. `siblings`: runs among which those of other seeds tell the spread.

    options.device: `auto` for the device of the record, where it is here. Raises InputError where the record is not
    complete or needs a file or data that are not here, RunError where the run fails, Interrupted on Ctrl-C.
    """
    record = stored.run
    evaluations = stored.evaluations()
    if not evaluations or (record.seed is not None and stored.training is None):
        raise InputError(f"{stored.path} is not complete, so that there is nothing to compare with; finish it first.")
    if "weights_sha256" in record.identity:
        raise InputError(
            f"{stored.path} was scored with given weights: score them again with "
            f"`{shlex.join(record.environment.command)}` and compare the two with `kitbench diff`."
        )
    options, notes = _place(record, options)
    suites = [_suite(record, group, method_file) for group in _by_protocol(evaluations)]
    parted = _data(record, evaluations, Job(suites[0], options))
    if parted is not None:
        return Outcome("different", "other data: nothing was run", parted, tuple(notes))
    with _threads(record, options.device) as told:
        for suite in suites:
            complete, failed = run(suite, options, console)
            if failed:
                raise RunError("; ".join(failed))
    return judge(stored, complete[0], siblings, [*notes, *told])


def judge(stored: RunFolder, made: RunFolder, siblings: Sequence[RunFolder], notes: Sequence[str] = ()) -> Outcome:
    """Compare a run with the one it was made after."""
    found = differences(stored, made)
    parted = [difference for difference in found if difference.kind == "numbers"]
    pairs = shared(stored, made)
    if len(pairs) < len(stored.evaluations()):
        raise RunError(f"{made.path} lacks evaluations that {stored.path} has")
    first = next((d for d in found if d.kind not in ("numbers", "host")), found[0] if found else None)
    if not parted:
        images = sum(len(evaluation.scores) for evaluation, _ in pairs)
        what = "weights, losses and " if stored.trained else ""
        return Outcome("bit-identical", f"{what}the scores of {images} images", None, tuple(notes))
    beyond, told = [], []
    for old, new in pairs:
        means = (("PSNR", " dB", _psnr(old), _psnr(new)), ("SSIM", "", _ssim(old), _ssim(new)))
        for name, unit, before, after in means:
            tolerance, basis = _spread(name, stored, siblings, old)
            where = f"{old.data_set} {old.condition}".strip()
            moved = 0.0 if after == before else after - before  # both may be infinite
            line = f"{name} on {where} moved by {moved:+.2g}{unit}, {basis}"
            told.append((abs(moved) / tolerance, line))
            if abs(moved) > tolerance:
                beyond.append(line)
    same = stored.trained and not any(d.what == "weights" or d.what.startswith("loss at") for d in parted)
    why = f"{'weights and losses are bit-identical; ' if same else ''}{max(told)[1]}; the numbers part at {parted[0]}"
    return Outcome("different" if beyond else "within the seed spread", why, first, tuple(notes))


def _spread(name: str, stored: RunFolder, siblings: Sequence[RunFolder], evaluation: Evaluation) -> tuple[float, str]:
    """How far a mean may move, and why."""
    mean, record, values = {"PSNR": _psnr, "SSIM": _ssim}[name], stored.run, {}
    for folder in (stored, *siblings):
        other = folder.run
        cell = ("comparison", "attention", "settings")
        if all(getattr(other, key) == getattr(record, key) for key in cell):
            for own in folder.evaluations():
                same = ("data_set", "data_sha256", "sigma", "stamp")
                if all(getattr(own, key) == getattr(evaluation, key) for key in same):
                    values[other.seed] = mean(own)
    if record.seed is None:
        return FLOOR[name], f"where {FLOOR[name]:g} is allowed without training"
    if len(values) < 2:
        return ONE_SEED[name], f"where {ONE_SEED[name]:g} is allowed, since one seed shows no spread"
    spread = statistics.stdev(values.values())
    allowed = max(WIDTH * spread, FLOOR[name])
    return allowed, f"where {len(values)} seeds spread by {spread:.2g} and {allowed:.2g} is allowed"


def _psnr(evaluation: Evaluation) -> float:
    return math.fsum(math.inf if s.psnr is None else s.psnr for s in evaluation.scores) / len(evaluation.scores)


def _ssim(evaluation: Evaluation) -> float:
    return math.fsum(score.ssim for score in evaluation.scores) / len(evaluation.scores)


def _place(record: Run, options: Options) -> tuple[Options, list[str]]:
    """On which device the run is made again, and what is to be said of code and device before it."""
    notes, here = [], commit()
    made = record.environment.commit
    if made is None or here is None:
        notes.append(f"made from commit {made or 'unknown'}, this is {here or 'unknown'}")
    elif made != here or "+dirty" in made:
        dirty = "; the stored run was made from code that no commit holds" if "+dirty" in made else ""
        notes.append(f"made from commit {made[:10]}, this is {here[:10]}{'+dirty' if '+dirty' in here else ''}{dirty}")
    if options.device != "auto":
        return options, notes
    cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    match = [name for name in ["cpu", *cuda] if device_name(torch.device(name)) == record.environment.device]
    if not match:
        notes.append(f"made on {record.environment.device}, which is not here")
    return replace(options, device=match[0] if match else "auto"), notes


@contextmanager
def _threads(record: Run, device: str) -> Iterator[list[str]]:
    """As many threads as the record states while the block runs: the order of a sum depends on them. Yields notes."""
    before, wanted = torch.get_num_threads(), record.environment.threads
    # Setting the number that stands already would still switch MKL's own choice of threads off, and move last bits.
    if device != "cpu" or before == wanted:
        yield []
        return
    torch.set_num_threads(wanted)
    try:
        yield [f"made with {wanted} threads, here by default {before}: for the last bit set OMP_NUM_THREADS={wanted}"]
    finally:
        torch.set_num_threads(before)


def _by_protocol(evaluations: Sequence[Evaluation]) -> list[list[Evaluation]]:
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.stamp, []).append(evaluation)
    return list(groups.values())


def _suite(record: Run, evaluations: Sequence[Evaluation], method_file: Path | None) -> Suite:
    """The suite that holds nothing but the record's cell, scored under one protocol."""
    blank = load("denoise", "smoke")
    task = record.task
    if isinstance(task, Denoise):
        task = task.model_copy(update={"sigma_test": tuple(dict.fromkeys(e.sigma for e in evaluations))})
    # A training-free method trains on nothing, but a suite names what the others would train on.
    train = tuple(record.train_sets) or blank.data.embedded.colour.train  # type: ignore[union-attr]
    sets = Sets(train=train, test=tuple(dict.fromkeys(e.data_set for e in evaluations)))
    source = Source.model_validate({"modes": (record.mode,), record.mode: sets})
    changes = {
        "name": record.suite, "preset": record.preset, "title": "one run again", "task": task,
        "data": Data(embedded=source, folder=source), "protocol": evaluations[0].protocol,
    }  # fmt: skip
    if record.seed is None:
        return blank.model_copy(update=changes | {"methods": {}, "references": (record.method,)})
    attention = record.attention
    if attention not in methods.shipped():
        if method_file is None:
            raise InputError(f"{record.method} is no shipped method; name its Python file with --method FILE.")
        if methods.load(str(method_file)).source_sha256 != attention:
            raise InputError(f"{method_file} is not the file that the run was made with; give that version.")
        attention = str(method_file)
    own = {key: value for key, value in record.settings.items() if key not in record.changed}
    method = Method(attention=attention, settings=record.settings, own=own)
    return blank.model_copy(
        update=changes
        | {
            "methods": {record.method: method}, "references": (), "seeds": (record.seed,),
            "backbone": record.backbone, "recipe": record.recipe,
        }
    )  # fmt: skip


def _data(record: Run, evaluations: Sequence[Evaluation], job: Job) -> Difference | None:
    """The first set whose images are not those of the record."""
    from kitbench.runs.prepare import set_sha256

    sets = job.sets[record.mode]
    for name, photographs in sets.train.items():
        if name in record.train_sets and set_sha256(photographs) != record.train_sets[name]:
            return Difference("data", f"training set {name}", record.train_sets[name], set_sha256(photographs))
    for evaluation in evaluations:
        if evaluation.data_set not in sets.test:
            raise InputError(f"Test set {evaluation.data_set} is not here; name the data folder with --data.")
        found = job.test_sha256(record.mode, evaluation.data_set)
        if found != evaluation.data_sha256:
            return Difference("data", f"test set {evaluation.data_set}", evaluation.data_sha256, found)
    return None


@contextmanager
def folder_for(out: Path | None) -> Iterator[Path]:
    """The folder that the runs are made in: one that is kept, or one that goes with the block."""
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="kitbench-") as place:
        yield Path(place)
