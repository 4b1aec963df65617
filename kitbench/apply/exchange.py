"""`kitbench import`: runs that others made, into a folder of runs, where tables show them marked with who made them.

Refused, and then nothing is written: runs whose records contradict one another, and runs made by another protocol,
recipe or source than this kitbench's, because their numbers would not be comparable. Runs that are already here stay as
they are.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from kitbench import NUMERICS
from kitbench.errors import InputError
from kitbench.runs.cell import decisive
from kitbench.runs.source import scoring_digest, source_digests
from kitbench.spec.fields import digest
from kitbench.spec.loading import load_suite, read_toml
from kitbench.spec.shipped import builtin, suite_names
from kitbench.spec.suite import Recipe
from kitbench.spec.tasks import Denoise
from kitbench.store.archive import read_archive, write_archive
from kitbench.store.files import writable, writable_file, write_atomic
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Evaluation, Origin, Run, now

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that no record needs. Tables print its texts as they are."""
NOT_IN_A_COMPARISON = ("attention", "settings", "seed")
"""Keys of a run's identity in which runs of one comparison differ."""


@dataclass(frozen=True)
class Exchanged:
    """What an export or an import did, by names of the runs' folders."""

    done: tuple[str, ...]
    left_out: dict[str, str]
    """With the reason."""


def export_runs(runs: Sequence[RunFolder], path: Path, by: str) -> Exchanged:
    """Write complete runs into an archive; imported ones keep who made them. Raises InputError where there is none."""
    chosen: dict[RunFolder, str] = {}
    left_out = {}
    for folder in runs:
        untrained = folder.run.seed is not None and not folder.trained
        at_work = any((folder.path / name).is_file() for name in ("progress.json", "failed.json"))
        if untrained or at_work or not folder.evaluations():
            left_out[folder.path.name] = "not complete"
        else:
            chosen[folder] = folder.origin.by if folder.origin else by
    if not chosen:
        raise InputError(f"None of the {len(runs)} runs is complete; let `kitbench run` finish first.")
    if len({folder.path.name for folder in chosen}) < len(chosen):
        raise InputError("Two of these folders contain a run of the same name; export them one folder at a time.")
    writable_file(path)
    write_archive(path, chosen)
    return Exchanged(tuple(folder.path.name for folder in chosen), left_out)


def import_runs(path: Path, out: Path) -> Exchanged:
    """Add an archive's runs to a folder of runs: all that are not here yet, or none. Raises InputError."""
    manifest, contents = read_archive(path)
    writable(out)
    if (out / "run.json").is_file():
        raise InputError(f"{out} is the folder of a run; give the folder of runs that it lies in.")
    here = _Here.read(find([out]) if any(out.glob("*/run.json")) else [])
    with tempfile.TemporaryDirectory() as place:
        for name, data in contents.items():
            file = Path(place) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        staged = [RunFolder(Path(place) / name) for name in manifest.runs]
        for folder in staged:
            try:
                _check(folder, here)
            except InputError as error:
                text = str(error).replace(f"{place}/", "")
                raise InputError(f"{path}: {text} Nothing was imported.") from error
        keys = [folder.run.key for folder in staged]
        if len(set(keys)) < len(keys):
            raise InputError(f"{path} contains one run twice, under two names. Nothing was imported.")
        new = [folder for folder in staged if folder.run.key not in here.keys and not (out / folder.path.name).exists()]
        archive_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in new:
            by = manifest.runs[folder.path.name]
            origin = Origin(key=folder.run.key, by=by, archive_sha256=archive_sha256, imported=now())
            folder.write("origin.json", origin)
        _move(new, out)
    kept = {folder.path.name: "already here" for folder in staged if folder not in new}
    return Exchanged(tuple(folder.path.name for folder in new), kept)


@dataclass(frozen=True)
class _Here:
    """What the runs of a folder say that imported ones must agree with."""

    keys: frozenset[str]
    recipes: tuple[dict[str, Any], ...]
    """The keys of each that decide numbers."""
    data: Mapping[tuple[str, ...], str]
    """Digest of each test set, by `_scored_on`."""

    @classmethod
    def read(cls, folders: Sequence[RunFolder]) -> Self:
        runs = [(folder, folder.run) for folder in folders]
        return cls(
            keys=frozenset(run.key for _, run in runs),
            recipes=tuple(decisive(run.recipe) for _, run in runs if run.recipe is not None),
            data={_scored_on(run, e): e.data_sha256 for folder, run in runs for e in folder.evaluations()},
        )


def _scored_on(run: Run, evaluation: Evaluation) -> tuple[str, ...]:
    """What the digest of a test set follows from: colour mode, name, and the degradation, which is part of the digest
    where the task makes the inputs (Gaussian noise is not: `PreparedScoring.test_sha256`).
    """
    task = "" if isinstance(run.task, Denoise) else digest(run.task.model_dump(mode="json"))
    return run.mode, evaluation.data_set, task


def _move(new: Sequence[RunFolder], out: Path) -> None:
    """Write whole folders into `out`; none, where one of them fails or Ctrl-C comes."""
    created, moved = not out.exists(), []
    out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".import-", dir=out))
    try:
        for folder in new:
            for file in sorted(path for path in folder.path.rglob("*") if path.is_file()):
                write_atomic(staging / file.relative_to(folder.path.parent), file.read_bytes())
        for folder in new:
            target = out / folder.path.name
            (staging / folder.path.name).rename(target)  # fails where the folder is there by now: it is not replaced
            moved.append(target)
    except BaseException as error:
        for target in (*moved, staging):
            shutil.rmtree(target)
        if created:
            out.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"Runs cannot be written to {out} ({error.strerror}); nothing was imported.") from error
        raise
    staging.rmdir()


def _check(folder: RunFolder, here: _Here) -> None:
    """Raises InputError where a run is not what it says, or is not comparable with runs made by this kitbench."""
    run, name, evaluations = folder.run, folder.path.name, folder.evaluations()
    folder.logged()
    of_training = {folder.trained, run.recipe is not None, run.backbone is not None}
    if of_training != {run.seed is not None} or not evaluations:
        raise InputError(f"{name} is not a complete run.")
    for record in (run, folder.training, *evaluations):
        for text in _texts(record.model_dump(mode="json") if record else None):
            if CONTROL.search(text):
                raise InputError(f"{name} contains characters that control a terminal, in {text[:40]!r}.")
    _check_identity(run, name)
    _check_source(run, name)
    _check_recipe(run, name, here)
    paths = {folder.evaluation_path(e.data_set, e.sigma, e.stamp) for e in evaluations}
    if paths != set((folder.path / "eval").iterdir()):
        raise InputError(f"{name} contains a record whose name does not say what was scored.")
    for evaluation in evaluations:
        _check_evaluation(evaluation, run, folder)
        found = evaluation.data_sha256
        version = here.data.get(_scored_on(run, evaluation), found)
        if found != version:
            raise InputError(
                f"{name} was scored on another version of data set {evaluation.data_set}: {found[:10]}, "
                f"the runs here on {version[:10]}."
            )


def _texts(value: object) -> Iterator[str]:
    """All texts of a tree of JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(each)


def _check_identity(run: Run, name: str) -> None:
    """The key must be that of the identity, and the identity that of the record."""
    seed = "" if run.seed is None else f"-s{run.seed}"
    stated: dict[str, object] = {"mode": run.mode, "attention": run.attention}
    if run.seed is not None:
        backbone, recipe = run.backbone, run.recipe
        stated |= {
            "settings": run.settings, "seed": run.seed, "device": run.device,
            "task": run.task.model_dump(mode="json", exclude={"sigma_test"}),
            "backbone": backbone.model_dump(mode="json") if backbone else None,
            "recipe": decisive(recipe) if recipe else None,
        }  # fmt: skip
    comparison = {key: value for key, value in run.identity.items() if key not in NOT_IN_A_COMPARISON}
    facts = {
        "key": (run.key, digest(run.identity)),
        "name of the folder": (name, f"{run.task.kind}-{run.mode}-{run.method}{seed}-{run.key[:10]}"),
        "comparison": (run.comparison, "" if run.seed is None else digest(comparison)),
        **{what: (value, run.identity.get(what)) for what, value in stated.items()},
    }
    for what, (found, expected) in facts.items():
        if found != expected:
            raise InputError(f"{name} contradicts itself: its {what} does not follow from what its key is made of.")
    if run.identity.get("numerics") != NUMERICS:
        raise InputError(
            f"{name} has version {run.identity.get('numerics')} of the numerics, this kitbench has {NUMERICS}."
        )


def _check_source(run: Run, name: str) -> None:
    if run.source is None:
        raise InputError(f"{name} does not record the source that determined its numbers.")
    _same_source(run.source, source_digests(run.attention, run.seed is not None), name, run.environment.commit)


def _same_source(found: Mapping[str, str], expected: Mapping[str, str], name: str, commit: str | None) -> None:
    for part, value in expected.items():
        if found.get(part) != value:
            raise InputError(
                f"{name} was made by another source of the {part} (digest {found.get(part, 'not recorded')[:10]}, "
                f"here {value[:10]}), at commit {(commit or 'unknown')[:10]}."
            )


def _check_recipe(run: Run, name: str, here: _Here) -> None:
    """The recipe must be a shipped one of its name, or that of a run that is here."""
    if run.recipe is None or (found := decisive(run.recipe)) in here.recipes:
        return
    known = _shipped_recipes(run.recipe.name) or here.recipes
    if not known:
        raise InputError(f"{name} was trained by recipe {run.recipe.name}, which neither kitbench nor a run here has.")
    if found not in known:
        keys = dict.fromkeys([*known[0], *found])
        differing = [f"{k} {found.get(k)}, here {known[0].get(k)}" for k in keys if found.get(k) != known[0].get(k)]
        raise InputError(f"{name} was trained by another recipe {run.recipe.name}: {'; '.join(differing)}.")


@cache
def _shipped_recipes(name: str) -> tuple[dict[str, Any], ...]:
    """What decides numbers in the shipped recipe of a name, and in what presets of shipped suites make of it."""
    if name not in builtin("recipes"):
        return ()
    presets = [(suite, preset) for suite in suite_names() for preset in read_toml(suite, "suites", Path())["presets"]]
    made = [recipe for recipe in (load_suite(*one).recipe for one in presets) if recipe.name == name]
    return tuple(map(decisive, [Recipe.model_validate(tomllib.loads(builtin("recipes")[name])), *made]))


def _check_evaluation(evaluation: Evaluation, run: Run, folder: RunFolder) -> None:
    name, protocol = folder.path.name, evaluation.protocol
    if evaluation.key != run.key:
        raise InputError(f"{name} contains scores of another run.")
    if evaluation.stamp != protocol.stamp:
        raise InputError(
            f"{name} was scored by another protocol {evaluation.stamp}, which this kitbench calls {protocol.stamp}."
        )
    if not evaluation.scores:
        raise InputError(f"{name} contains an evaluation without any image.")
    if evaluation.numerics is None:
        raise InputError(f"{name} does not record the source that scored it.")
    _same_source(evaluation.numerics.source, scoring_digest(), name, run.environment.commit)
