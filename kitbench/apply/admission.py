"""What `kitbench import` demands of every run before any is written: that its records agree with one another, with this
kitbench, and with the runs that are there.

Checksums show damage, not fraud: somebody who computes them anew can state any score. What is refused here is what
could not stand in a table: a run whose records contradict one another, numbers that no image has, and runs by another
protocol, recipe or source.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from kitbench import NUMERICS
from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.runs.cell import Cell, decisive
from kitbench.runs.source import scoring_digest, source_digests
from kitbench.spec.fields import digest
from kitbench.spec.loading import load_suite, read_toml
from kitbench.spec.shipped import builtin, suite_names
from kitbench.spec.suite import LONGEST_NAME, NAME, Recipe, Suite
from kitbench.spec.tasks import Denoise
from kitbench.store.archive import ASK
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Run
from kitbench.text import counted

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that end a line, control a terminal or change the direction of the text, which tables print as it is."""
IN_A_CARD = re.compile(CONTROL.pattern.replace(r"\x00-\x1f", r"\x00-\x08\x0b-\x1f"))
"""Likewise for the card of a method, which has lines."""
NOT_IN_A_COMPARISON = ("attention", "settings", "seed")
"""Keys of a run's identity in which runs of one comparison differ."""
MAY_DIFFER = ("lr", "steps")
"""Keys in which a recipe may differ from the shipped one of its name: the captions of tables name both."""
PSNR, SSIM, LPIPS = (0.0, 200.0), (-1.000001, 1.000001), (0.0, 10.0)
"""Lowest and highest score of an image. Restored images are clipped to the range of clean ones, so 0 dB is the least;
one level of one value in 10^9 that is wrong makes 138 dB."""
Twin = tuple[object, ...]


@dataclass
class Known:
    """What the runs of a folder say that imported ones must agree with; it grows by every run that is admitted."""

    runs: dict[str, RunFolder] = field(default_factory=dict)
    """Those in the folder, by key."""
    recipes: list[dict[str, Any]] = field(default_factory=list)
    """Of these: the keys of each that decide numbers."""
    twins: dict[Twin, str] = field(default_factory=dict)
    """Key of each run, by `_twin`."""
    data: dict[tuple[str, ...], str] = field(default_factory=dict)
    """Digest of each test set, by `_scored_on`."""
    images: dict[str, set[str]] = field(default_factory=dict)
    """Names of the images of each test set, by its digest."""

    @classmethod
    def of(cls, folders: Iterable[RunFolder]) -> Self:
        """What these runs say. Raises InputError for a damaged one."""
        known = cls()
        for folder in folders:
            run = folder.run
            known.runs[run.key] = folder
            known.recipes += [] if run.recipe is None else [decisive(run.recipe)]
            known.add(run, folder.evaluations())
        return known

    def add(self, run: Run, evaluations: Sequence[Evaluation]) -> None:
        """Runs that follow must agree with this one as well."""
        self.twins[_twin(run)] = run.key
        for evaluation in evaluations:
            self.data[_scored_on(run, evaluation)] = evaluation.data_sha256
            self.images[evaluation.data_sha256] = {score.image for score in evaluation.scores}


def _scored_on(run: Run, evaluation: Evaluation) -> tuple[str, ...]:
    """What the digest of a test set follows from: colour mode, name, and the degradation, which is part of the digest
    where the task makes the inputs (Gaussian noise is not: `PreparedScoring.test_sha256`).
    """
    task = "" if isinstance(run.task, Denoise) else digest(run.task.model_dump(mode="json"))
    return run.mode, evaluation.data_set, task


def _twin(run: Run) -> Twin:
    """Equal for runs that would stand in one row as one seed, whatever their keys: 4 and 4.0 are equal here."""
    rest = {key: value for key, value in run.identity.items() if key not in NOT_IN_A_COMPARISON}
    return digest(rest), run.attention, frozenset(run.settings.items()), run.seed


def admit(folder: RunFolder, known: Known) -> None:
    """Check a run of an archive, and add it to what is known. Raises InputError where it is not what it says, or is not
    comparable with runs made by this kitbench, saying what can be done.
    """
    run, name, evaluations = folder.run, folder.path.name, folder.evaluations()
    of_training = {folder.trained, run.recipe is not None, run.backbone is not None}
    if of_training != {run.seed is not None} or not evaluations:
        raise InputError(f"{name} is not a complete run; ask its author to finish it and export it again.")
    _check_texts(folder)
    _check_source(run, name)
    _check_identity(run, name)
    _check_suite(run, name)
    _check_training(folder, run)
    _check_recipe(run, name, known)
    paths = {folder.evaluation_path(e.data_set, e.sigma, e.stamp) for e in evaluations}
    if paths != set((folder.path / "eval").iterdir()):
        raise InputError(f"{name} contains a record whose name does not say what was scored; {ASK}.")
    for evaluation in evaluations:
        _check_evaluation(evaluation, run, name)
        _check_data(evaluation, run, name, known)
    twin = known.twins.get(_twin(run), run.key)
    if twin != run.key:
        raise InputError(
            f"{name} has the attention, settings and seed of run {twin[:10]} but another key, so the two cannot stand "
            f"in one table; {ASK}."
        )
    known.add(run, evaluations)


def _check_texts(folder: RunFolder) -> None:
    """No text controls what is printed around it, and every record states its checksum."""
    for path in sorted(folder.path.rglob("*.json")):
        name, raw = path.relative_to(folder.path.parent), json.loads(path.read_bytes())
        if "sha256" not in raw:
            raise InputError(f"{name} does not state its own checksum; {ASK}.")
        card = raw.pop("card", "")  # a method's, in run.json
        for text, pattern in ((card, IN_A_CARD), *((text, CONTROL) for text in _texts(raw))):
            if pattern.search(text):
                raise InputError(
                    f"{name} contains characters that end lines or control a terminal, in {text[:40]!r}; {ASK}."
                )


def _texts(value: object) -> Iterator[str]:
    """All texts of a tree of JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(each)


def _check_identity(run: Run, name: str) -> None:
    """The identity must be what this kitbench makes of the record, value by value and type by type; and the key, the
    comparison and the folder's name what follows from it.
    """
    found = run.identity
    if run.attention not in methods.shipped() and not re.fullmatch("[0-9a-f]{64}", run.attention):
        raise InputError(f"{name} has attention {run.attention[:40]!r}, which kitbench does not ship; {ASK}.")
    cell = _cell(run)
    expected = cell.identity()
    initial = run.recipe is not None and run.recipe.init is not None
    facts: dict[str, tuple[object, object]] = {
        "key": (run.key, digest(found)),
        **{key: (found.get(key), expected.get(key)) for key in dict.fromkeys([*expected, *found])},
        "set of keys": (sorted(found), sorted(expected)),
        "initial weights": ("init_sha256" in found, initial),
        "comparison": (run.comparison, cell.comparison),
        "name of the folder": (name, cell.folder),
    }
    for what, (one, other) in facts.items():
        if digest(one) != digest(other):
            raise InputError(f"{name} contradicts itself: its {what} and what its key is made of do not agree; {ASK}.")
    if digest(run.settings) != digest(_settings(run, name)):
        raise InputError(f"{name} has other settings than its method {run.attention[:40]} makes of them; {ASK}.")


def _check_suite(run: Run, name: str) -> None:
    """The names of suite and preset must be such as a suite can have; a shipped suite must have the task and preset."""
    kind = run.task.kind
    if run.suite in suite_names():
        raw = read_toml(run.suite, "suites", Path())
        if raw["task"]["kind"] != kind or run.preset not in raw["presets"]:
            raise InputError(
                f"{name} has suite {run.suite}, preset {run.preset[:40]} and task {kind}, which the suite of that name "
                f"does not have; {ASK}."
            )
    elif not NAME.fullmatch(run.suite) or len(run.preset) > LONGEST_NAME:
        raise InputError(f"{name} has a name of its suite or preset that no suite can have; {ASK}.")


def _cell(run: Run) -> Cell:
    """The cell that the record describes. What the identity alone states is taken from there, where it is text."""
    stated = {key: value for key, value in run.identity.items() if isinstance(value, str)}
    given = {"task": run.task, "backbone": run.backbone, "recipe": run.recipe}
    weights = stated.get("weights_sha256")
    settings = {key: value for key, value in run.settings.items() if weights is None or key != "weights"}
    return Cell(
        _any_suite().model_copy(update={key: value for key, value in given.items() if value is not None}), run.mode,
        run.method, run.attention, None, settings, run.seed, run.device, stated.get("train_sha256"), weights,
        stated.get("weights_key"), stated.get("init_sha256"),
    )  # fmt: skip


@cache
def _any_suite() -> Suite:
    return load_suite("denoise", "smoke")


def _settings(run: Run, name: str) -> dict[str, Any]:
    """The settings that the run's method makes of those of the record: all of them, with its types."""
    if run.attention not in methods.shipped():
        # Of a network with given weights they are in the identity; a training-free method has none.
        return dict(run.settings) if run.seed is not None or "weights_sha256" in run.identity else {}
    loaded = methods.load_method(run.attention)
    if (loaded.attention is None) != (run.seed is None):
        how = "without training" if run.seed is None else "trained"
        raise InputError(f"{name} was run {how}, which is not what its method {run.attention} is made for; {ASK}.")
    try:
        return loaded.resolve(run.settings)
    except InputError as error:
        said = str(error).removesuffix(".")
        raise InputError(f"{name} has settings that its method does not take ({said}); {ASK}.") from error


def _check_source(run: Run, name: str) -> None:
    found = json.dumps(run.identity.get("numerics"))
    if found != json.dumps(NUMERICS):
        raise InputError(
            f"{name} has version {found[:20]} of the numerics, this kitbench has {NUMERICS}; ask its author to run it "
            f"again at your version."
        )
    if run.source is None:
        raise InputError(
            f"{name} does not record the source that determined its numbers; ask its author to run it again at your "
            f"version."
        )
    _same_source(run.source, source_digests(run.attention, run.seed is not None), name, run.environment.commit)


def _same_source(found: Mapping[str, str], expected: Mapping[str, str], name: str, commit: str | None) -> None:
    clean = commit is not None and "+" not in commit
    theirs = "import it at that commit of kitbench into a folder of its own, or " if clean else ""
    for part, value in expected.items():
        if found.get(part) != value:
            raise InputError(
                f"{name} was made by another source of the {part} (digest {found.get(part, 'not recorded')[:10]}, "
                f"here {value[:10]}), at commit {(commit or 'unknown')[:10]}; {theirs}ask its author to run it again "
                f"at yours."
            )


def _check_training(folder: RunFolder, run: Run) -> None:
    """The training must be that of the recipe, and its log there, as training.json states it."""
    training, name, lines = folder.training, folder.path.name, folder.logged()
    if training is None or run.recipe is None:
        return
    steps = run.recipe.steps
    if training.steps != steps:
        raise InputError(f"{name} was trained for {counted(training.steps, 'step')}, its recipe has {steps}; {ASK}.")
    if training.log_sha256 is None or not lines:
        raise InputError(f"{name} lacks its training log, or the log's checksum; {ASK}.")
    if lines[-1].step != steps or not all(math.isfinite(line.loss) for line in lines):
        raise InputError(f"{name} has a training log that is not one of {counted(steps, 'step')}; {ASK}.")


def _check_recipe(run: Run, name: str, known: Known) -> None:
    """The recipe must be a shipped one of its name but for MAY_DIFFER, or that of a run that is here.

    A refusal compares it with the nearest of these.
    """
    if run.recipe is None or (found := decisive(run.recipe)) in known.recipes:
        return
    shipped = _shipped_recipes(run.recipe.name)
    others: list[tuple[dict[str, Any], tuple[str, ...]]] = [(other, MAY_DIFFER) for other in shipped]
    others += [(other, ()) for other in known.recipes]
    if not others:
        raise InputError(
            f"{name} was trained by recipe {run.recipe.name}, which neither kitbench nor a run here has; run a method "
            f"by it into this folder first."
        )
    parted = [
        [key for key in dict.fromkeys([*other, *found]) if found.get(key) != other.get(key) and key not in allowed]
        for other, allowed in others
    ]
    nearest = min(range(len(others)), key=lambda number: len(parted[number]))
    if parted[nearest]:
        listed = "; ".join(f"{key} {found.get(key)}, here {others[nearest][0].get(key)}" for key in parted[nearest])
        raise InputError(
            f"{name} was trained by another recipe {run.recipe.name}: {listed}; run a method by that recipe into this "
            f"folder first, or ask its author for runs by yours."
        )


@cache
def _shipped_recipes(name: str) -> tuple[dict[str, Any], ...]:
    """What decides numbers in the shipped recipe of a name, and in what presets of shipped suites make of it."""
    if name not in builtin("recipes"):
        return ()
    presets = [(suite, preset) for suite in suite_names() for preset in read_toml(suite, "suites", Path())["presets"]]
    made = [recipe for recipe in (load_suite(*one).recipe for one in presets) if recipe.name == name]
    return tuple(map(decisive, [Recipe.model_validate(tomllib.loads(builtin("recipes")[name])), *made]))


def _check_evaluation(evaluation: Evaluation, run: Run, name: str) -> None:
    protocol, sigma, data_set = evaluation.protocol, evaluation.sigma, evaluation.data_set
    if evaluation.key != run.key:
        raise InputError(f"{name} contains scores of another run; {ASK}.")
    if evaluation.stamp != protocol.stamp:
        raise InputError(
            f"{name} was scored by another protocol {evaluation.stamp}, which this kitbench calls {protocol.stamp}; "
            f"update the older one of the two kitbenches, and have it scored again."
        )
    if evaluation.numerics is None:
        raise InputError(
            f"{name} does not record the source that scored it; ask its author to score it again at your version."
        )
    _same_source(evaluation.numerics.source, scoring_digest(), name, run.environment.commit)
    # A task's own levels are not binding: a run is scored at others later, which its run.json does not tell.
    if (sigma is not None) != isinstance(run.task, Denoise) or not (sigma is None or 0 < sigma <= 255):
        raise InputError(f"{name} was scored on {data_set} at sigma {sigma}, which its task does not have; {ASK}.")
    for score in evaluation.scores:
        values = (("PSNR", score.psnr, PSNR), ("SSIM", score.ssim, SSIM), ("LPIPS", score.lpips, LPIPS))
        for what, value, (low, high) in values:
            if value is not None and not low <= value <= high:
                raise InputError(
                    f"{name} has {what} {value:g} on image {score.image} of {data_set}, which no image has; {ASK}."
                )


def _check_data(evaluation: Evaluation, run: Run, name: str, known: Known) -> None:
    """The images must be those that the other runs were scored on, each of them once."""
    found, data_set, images = evaluation.data_sha256, evaluation.data_set, [s.image for s in evaluation.scores]
    if len(set(images)) < len(images):
        raise InputError(f"{name} has an image of {data_set} twice; {ASK}.")
    version = known.data.get(_scored_on(run, evaluation), found)
    if found != version:
        raise InputError(
            f"{name} was scored on another version of data set {data_set}: {found[:10]}, the others on {version[:10]}; "
            f"get one version on both sides (`kitbench data check {data_set}` tells whose is the published one), or "
            f"import it into another --out."
        )
    expected = known.images.get(found, set(images))
    if set(images) != expected:
        lacking, more = sorted(expected - set(images)), sorted(set(images) - expected)
        parts = [f"{words} {', '.join(own[:3])}" for words, own in (("without", lacking), ("with", more)) if own]
        raise InputError(
            f"{name} was scored on {counted(len(images), 'image')} of {data_set} ({' and '.join(parts)}), the others "
            f"on {len(expected)}; {ASK}."
        )
