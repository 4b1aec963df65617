"""`kitbench import`: runs that others made, into a folder of runs, where tables show them marked with who made them.

Refused, and then nothing is written: runs whose records contradict one another, and runs made by another protocol,
recipe or source than this kitbench's, because their numbers would not be comparable. Runs that are already here stay as
they are.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kitbench import NUMERICS
from kitbench.errors import InputError
from kitbench.runs.cell import decisive
from kitbench.runs.source import scoring_digest, source_digests
from kitbench.spec.fields import digest
from kitbench.spec.shipped import builtin
from kitbench.spec.suite import Recipe
from kitbench.store.archive import read_archive, write_archive
from kitbench.store.files import writable
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Evaluation, Origin, Run, now

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
        if (folder.run.seed is not None and not folder.trained) or not folder.evaluations():
            left_out[folder.path.name] = "not complete"
        else:
            chosen[folder] = folder.origin.by if folder.origin else by
    if not chosen:
        raise InputError(f"None of the {len(runs)} runs is complete; let `kitbench run` finish first.")
    if len({folder.path.name for folder in chosen}) < len(chosen):
        raise InputError("Two of these folders contain a run of the same name; export them one folder at a time.")
    writable(path.parent)
    write_archive(path, chosen)
    return Exchanged(tuple(folder.path.name for folder in chosen), left_out)


def import_runs(path: Path, out: Path) -> Exchanged:
    """Add an archive's runs to a folder of runs: all that are not here yet, or none. Raises InputError."""
    manifest, contents = read_archive(path)
    writable(out)
    here = find([out]) if any(out.glob("*/run.json")) else []
    with tempfile.TemporaryDirectory() as place:
        staged = [_unpacked(Path(place) / name, contents) for name in manifest.runs]
        for folder in staged:
            try:
                _check(folder, here)
            except InputError as error:
                text = str(error).replace(f"{place}/", "")
                raise InputError(f"{path}: {text} Nothing was imported.") from error
        keys = [folder.run.key for folder in staged]
        if len(set(keys)) < len(keys):
            raise InputError(f"{path} contains one run twice, under two names. Nothing was imported.")
        own = {folder.run.key for folder in here} | {f.run.key for f in staged if (out / f.path.name).exists()}
        new = [folder for folder in staged if folder.run.key not in own]
        archive_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in new:
            by = manifest.runs[folder.path.name]
            origin = Origin(key=folder.run.key, by=by, archive_sha256=archive_sha256, imported=now())
            folder.write("origin.json", origin)
        _move(new, out)
    kept = {folder.path.name: "already here" for folder in staged if folder not in new}
    return Exchanged(tuple(folder.path.name for folder in new), kept)


def _unpacked(folder: Path, contents: Mapping[str, bytes]) -> RunFolder:
    for name, data in contents.items():
        run, _, rest = name.partition("/")
        if run == folder.name:
            (folder / rest).parent.mkdir(parents=True, exist_ok=True)
            (folder / rest).write_bytes(data)
    return RunFolder(folder)


def _move(new: Sequence[RunFolder], out: Path) -> None:
    """Move whole folders into `out`; none, where one of them fails."""
    created, moved = not out.exists(), []
    out.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".import-", dir=out))
    try:
        for folder in new:
            shutil.copytree(folder.path, staging / folder.path.name)
        for folder in new:
            target = out / folder.path.name
            (staging / folder.path.name).rename(target)  # fails where the folder is there by now: it is not replaced
            moved.append(target)
    except OSError as error:
        for target in moved:
            shutil.rmtree(target)
        shutil.rmtree(staging)
        if created:
            out.rmdir()
        raise InputError(f"The runs cannot be written to {out} ({error.strerror}); nothing was imported.") from error
    staging.rmdir()


def _check(folder: RunFolder, here: Sequence[RunFolder]) -> None:
    """Raises InputError where a run is not what it says, or is not comparable with runs made by this kitbench."""
    run, name, evaluations = folder.run, folder.path.name, folder.evaluations()
    folder.logged()
    if (run.seed is None) == folder.trained or not evaluations:
        raise InputError(f"{name} is not a complete run.")
    _check_identity(run, name)
    _check_source(run, name)
    _check_recipe(run, name, here)
    paths = {folder.evaluation_path(e.data_set, e.sigma, e.stamp) for e in evaluations}
    if paths != set((folder.path / "eval").iterdir()):
        raise InputError(f"{name} contains a record whose name does not say what was scored.")
    versions = {
        (own.mode, e.data_set): e.data_sha256 for other in here for own in [other.run] for e in other.evaluations()
    }
    for evaluation in evaluations:
        _check_evaluation(evaluation, run, folder)
        found, version = evaluation.data_sha256, versions.get((run.mode, evaluation.data_set), evaluation.data_sha256)
        if found != version:
            raise InputError(
                f"{name} was scored on another version of data set {evaluation.data_set}: {found[:10]}, "
                f"the runs here on {version[:10]}."
            )


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


def _check_recipe(run: Run, name: str, here: Sequence[RunFolder]) -> None:
    """The recipe must be the shipped one of its name, or that of a run that is here."""
    if run.recipe is None:
        return
    found = decisive(run.recipe)
    known = [decisive(other.recipe) for other in (folder.run for folder in here) if other.recipe is not None]
    shipped = builtin("recipes").get(run.recipe.name)
    if shipped is not None:
        known.insert(0, decisive(Recipe.model_validate(tomllib.loads(shipped))))
    if not known:
        raise InputError(f"{name} was trained by recipe {run.recipe.name}, which neither kitbench nor a run here has.")
    if found not in known:
        keys = dict.fromkeys([*known[0], *found])
        differing = [f"{k} {found.get(k)}, here {known[0].get(k)}" for k in keys if found.get(k) != known[0].get(k)]
        raise InputError(f"{name} was trained by another recipe {run.recipe.name}: {'; '.join(differing)}.")


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
