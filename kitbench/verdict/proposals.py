"""Next steps towards what stored runs leave open: commands with the settings of the runs that they add to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from kitbench.errors import InputError
from kitbench.spec.loading import load_suite
from kitbench.spec.shipped import suite_names
from kitbench.spec.suite import SetNames
from kitbench.store.records import Run
from kitbench.verdict.contrasts import ONE, OWN, SMOKE, ComparedRuns, Contrast, Runs
from kitbench.verdict.entries import shipped_methods
from kitbench.verdict.statistics import FEWEST_IMAGES, FEWEST_SEEDS

SEEDS = 5
"""Seeds that a first proposal asks for."""
LONGER = 4
"""How many times as long a second training is."""
WHERE = "--data DIR --out OUT"
CARRIED = ("--set", "--train-set", "--test-set")
"""Options of a run's command that may change what its record does not tell."""


def contrast_command(contrast: Contrast, runs: Runs) -> str:
    """The next step towards a decision: the search of rates, then another length of training, then twice as many seeds.

    Twice is a step and no estimate of what decides. Empty where images are too few: no number of seeds makes up for it;
    and where no shipped suite can train both methods as the stored runs were trained.
    """
    methods = (contrast.a, contrast.b)
    if not contrast.setups:
        return run_command(next(iter(runs.with_methods(*methods)), next(iter(runs.blocks), None)), methods)
    lengths = {
        choice: {setup.steps for setup in contrast.setups if setup.comparison == choice} for choice in (ONE, OWN)
    }
    seeds = max(compared.found.seeds for compared in contrast.setups.values())
    blocks = runs.under_one_recipe(*methods)
    if without := lengths[ONE] - lengths[OWN]:
        return _own_rates(blocks[max(without)], methods, runs, seeds)
    undecided = {
        setup: compared.found.seeds
        for setup, compared in contrast.setups.items()
        if not compared.decided or compared.found.seeds < FEWEST_SEEDS
    }
    if len(lengths[ONE]) < 2 or not undecided:
        return run_command(blocks[max(lengths[ONE])], methods, seeds, longer=LONGER)
    setup = min(undecided, key=lambda setup: (undecided[setup], setup))
    if contrast.setups[setup].found.images < FEWEST_IMAGES:
        return ""
    more = max(SEEDS, 2 * undecided[setup])
    if setup.comparison == OWN:
        return _own_rates(blocks[setup.steps], methods, runs, more)
    return run_command(blocks[setup.steps], methods, more)


def _own_rates(block: ComparedRuns, methods: tuple[str, str], runs: Runs, seeds: int) -> str:
    """The search of both methods' rates; where it is stored, runs at these rates.

    Two searches of one method each lie in two suites: the method with fewer seeds at its rate comes first.
    """
    pair = runs.searched(block, *methods)
    if pair is None:
        return _tune_command(block, methods, runs)
    if pair[0] is pair[1]:
        return run_command(block, methods, seeds, tuned=True)
    found = [runs.at_rate(block, m, search.best[m]) or {} for m, search in zip(methods, pair, strict=True)]
    stored = [len({entry.run.seed for group in columns.values() for entry in group}) for columns in found]
    fewest = methods[stored.index(min(stored))]
    return run_command(block, [fewest], seeds, tuned=True)


def _tune_command(block: ComparedRuns, methods: Sequence[str], runs: Runs) -> str:
    run = _run_of(block, methods)
    if (suite := _suite_for(run, methods, block)) is None:
        return ""
    # A stored search keeps the rates of all its methods only where they are named again.
    place = suite, run.preset, run.mode, block.steps
    stored = [s for s in runs.searches.records if (s.suite, s.preset, s.mode, s.steps) == place]
    every = tuple(dict.fromkeys((*methods, *(method for search in stored for method in search.best))))
    return f"python -m kitbench tune{_settings(run, suite)}{_chosen(every)} {_place(block)}"


def run_command(
    block: ComparedRuns | None,
    methods: Sequence[str],
    seeds: int = SEEDS,
    *,
    task: str = "denoise",
    longer: int = 1,
    tuned: bool = False,
) -> str:
    """The command that trains these methods as those of a comparison were trained, or else by the full recipe.

    longer: so many times as long. tuned: each method at its own best rate. Empty where no suite trains all of them so.
    """
    if block is None:
        suite = next((name for name in (task, *suite_names()) if _names(name, "full", task, methods)), None)
        settings = f" --suite {suite} --preset full"
    else:
        run = _run_of(block, methods)
        suite = _suite_for(run, methods, block)
        settings = "" if suite is None else _settings(run, suite, longer, tuned)
    if suite is None:
        return ""
    numbers = ",".join(map(str, range(seeds)))
    return f"python -m kitbench run{settings}{_chosen(methods)}{' --tuned' * tuned} --seeds {numbers} {_place(block)}"


def _chosen(methods: Sequence[str]) -> str:
    """The options that choose these methods; a label that is no method's name is left out."""
    return "".join(f" --method {name}" for name in methods if " " not in name)


def _run_of(block: ComparedRuns, methods: Sequence[str]) -> Run:
    """A run of a comparison whose suite trains all these methods, if there is one: its settings are those to add to."""
    every = [block.first.run, *(block.run_of(method) for method in methods if method in block.methods)]
    shipped = [run for run in every if run.suite in suite_names()]
    return next((run for run in shipped if _names(run.suite, run.preset, run.task.kind, methods)), every[0])


def _suite_for(run: Run, methods: Sequence[str], block: ComparedRuns) -> str | None:
    """The suite that trains these methods as a run was trained: its own, or a shipped one of the same degradation,
    images and protocol. None where there is none."""
    if run.suite not in suite_names():
        known = {entry.run.method for entry in block.entries if entry.run.suite == run.suite} | shipped_methods()
        return run.suite if set(methods) <= known else None
    if _names(run.suite, run.preset, run.task.kind, methods):
        return run.suite
    for name in suite_names():
        if not _names(name, run.preset, run.task.kind, methods):
            continue
        suite = load_suite(name, run.preset)
        sources = [getattr(source, run.mode) for source in (suite.data.embedded, suite.data.folder)]
        trained = any(sets is not None and set(sets.train) == run.train_sets.keys() for sets in sources)
        degraded = [task.model_dump(exclude={"sigma_test"}) for task in (suite.task, run.task)]
        if trained and degraded[0] == degraded[1] and block.first.evaluation.stamp in suite.stamps:
            return name
    return None


def _names(suite: str, preset: str, task: str, methods: Sequence[str]) -> bool:
    """Whether a shipped suite of a task has this preset, and trains all these methods: its own, and any shipped one."""
    with suppress(InputError):  # it has no such preset
        loaded = load_suite(suite, preset)
        return loaded.task.kind == task and set(methods) <= loaded.methods.keys() | shipped_methods()
    return False


def _settings(run: Run, suite: str, longer: int = 1, tuned: bool = False) -> str:
    """A suite, the preset of a run, and what `--set` must change of recipe and backbone to be those of the run."""
    assert run.preset != SMOKE
    assert run.recipe is not None
    changed = {"recipe.steps": run.recipe.steps * longer}
    if run.suite in suite_names():
        usual = load_suite(suite, run.preset)
        for part in ("recipe", "backbone"):
            own = getattr(run, part)
            for key in type(own).model_fields.keys() - {"name", "card"}:
                value = getattr(own, key)
                if value is not None and value != getattr(getattr(usual, part), key):
                    changed.setdefault(f"{part}.{key}", value)
        if changed["recipe.steps"] == usual.recipe.steps:
            del changed["recipe.steps"]
    if tuned:
        changed.pop("recipe.lr", None)
    options = [("--set", f"{key}={json.dumps(value)}") for key, value in sorted(changed.items())] + _carried(run, tuned)
    texts = "".join(f" {option} {shlex.quote(value)}" for option, value in options)
    name = suite if suite in suite_names() else _file_of(run)
    return f" --suite {name} --preset {run.preset}{texts}"


def _carried(run: Run, tuned: bool) -> list[tuple[str, str]]:
    """What the run's command changed and its record does not tell: images, noise levels; all of a user's own suite."""
    words: list[str] = []
    for word in run.environment.command:
        words += word.split("=", 1) if word.startswith(tuple(f"{option}=" for option in CARRIED)) else [word]
    left_out = ["methods.", "seeds", "recipe.steps"]  # methods are compared at their default settings
    left_out += ["recipe.lr"] * tuned if run.suite not in suite_names() else ["recipe.", "backbone."]
    pairs = [(option, value) for option, value in pairwise(words) if option in CARRIED]
    return [(o, value) for o, value in pairs if o != "--set" or not value.startswith(tuple(left_out))]


def _place(block: ComparedRuns | None) -> str:
    """Where images and runs lie; what was trained and tested on embedded photographs, or on folders of the user's own
    that the settings name, needs no --data."""
    if block is not None:
        sets = {*block.first.run.train_sets, *(entry.evaluation.data_set for entry in block.entries)}
        if all("/" in name for name in sets):
            return "--out OUT"
    if block is not None and block.first.run.suite in suite_names():
        run = block.first.run
        embedded: SetNames | None = getattr(load_suite(run.suite, run.preset).data.embedded, run.mode)
        if embedded is not None and run.train_sets.keys() == set(embedded.train):
            return "--out OUT"
    return WHERE


def _file_of(run: Run) -> str:
    """The file of the user's own suite, as the run's command named it."""
    files = [word.removeprefix("--suite=") for word in run.environment.command if word.endswith(".toml")]
    return shlex.quote(files[0] if files else f"{run.suite}.toml")
