"""`kitbench tune`: the same search for a learning rate for every method, on images neither trained on nor tested.

Every method is trained at every rate of one grid, at the recipe's full length, with a seed that no comparison uses, and
scored on the validation sets. Where one method's best rate is the lowest or the highest, the grid is widened for all.
Trials are ordinary stored runs, in OUT/tuning; the choice is a record with its evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kitbench.errors import InputError, RunError
from kitbench.model.methods import load_method
from kitbench.runs.cell import decisive
from kitbench.runs.initial import initial_weights
from kitbench.runs.prepare import Options
from kitbench.runs.queue import planned_cells, run_suite
from kitbench.runs.sets import choose_sets
from kitbench.spec.fields import Mode, digest
from kitbench.spec.suite import Data, SetNames, Source, Suite
from kitbench.spec.tasks import Denoise
from kitbench.store.folder import TRIALS, RunFolder
from kitbench.store.records import Evaluation, Run, Trial, Tuning, read_record, shared_with_search
from kitbench.system.processes import leads
from kitbench.text import counted

FACTOR = 2.0
"""Between two neighbouring rates of the grid."""
HIGHEST = 1.0
"""What a recipe's learning rate may be at most: the record of a run with a higher one could not be read back."""
WIDENINGS = 3
"""How often the grid is widened, at most."""


class NothingEnded(RunError):
    """Every trial of a method diverged: the same search would end alike."""


@dataclass(frozen=True)
class Search:
    """What is tried."""

    rates: tuple[float, ...]
    """Ascending."""
    seed: int


def rate_grid(rate: float, count: int) -> tuple[float, ...]:
    """`count` rates, each FACTOR times the one before, with `rate` in the middle."""
    return tuple(rounded(rate * FACTOR ** (place - count // 2)) for place in range(count))


def rounded(rate: float) -> float:
    """To six significant digits: a widened grid must meet the rates that are stored."""
    return float(f"{rate:.6g}")


def tune(suite: Suite, options: Options, search: Search, console: Console) -> list[Tuning]:
    """Search the best rate of every method of a suite, and store the choice; a record for each mode.

    A trial whose training diverges has no score. Raises InputError where the suite names no validation sets, its
    comparison uses the search's seed, or the stored record holds methods or rates that this search leaves out, or is of
    another seed; NothingEnded where no trial of a method ended well, another RunError where one failed in another way
    than by diverging; Interrupted on Ctrl-C, after which the same search goes on.
    """
    suite = _checked(suite, options, search)
    rates, scored, widened = search.rates, dict[Mode, list[Trial]](), 0
    shared: dict[Mode, dict[str, Any]] = {}
    modes, _ = choose_sets(trial_suite(suite, _source(suite, options), search.seed), options.data)
    todo: Sequence[float] = rates
    while todo:
        console.print(f"[bold]{'rates':<10}[/bold]{', '.join(f'{rate:g}' for rate in todo)}", highlight=False)
        for run, trial in _trials(suite, options, todo, search.seed, console):
            scored.setdefault(run.mode, []).append(trial)
            shared[run.mode] = shared_with_search(run.identity)
        trials = {mode: with_diverged(scored.get(mode, ()), list(suite.methods), rates) for mode in modes}
        best = {mode: best_rates(own, mode) for mode, own in trials.items()}
        edges = [rate for own in best.values() for rate in own.values()]
        todo = beyond(rates, edges, suite.recipe.lr_min) if widened < WIDENINGS else ()
        rates, widened = tuple(sorted((*rates, *todo))), widened + bool(todo)
    records = []
    for mode, own in trials.items():
        record = Tuning(
            suite=suite.name, preset=suite.preset, mode=mode, steps=suite.recipe.steps, seed=search.seed,
            lr=suite.recipe.lr, rates=rates, widened=widened > 0,
            validation=", ".join(_source(suite, options)[mode].validation),
            trials=tuple(sorted(own, key=lambda trial: (trial.method, trial.lr))), best=best[mode],
            shared=shared[mode],
        )  # fmt: skip
        if leads():
            RunFolder(options.out).write(record_name(suite, mode), record)
        records.append(record)
    return records


def planned_trials(suite: Suite, options: Options, search: Search, console: Console) -> list[tuple[float, str]]:
    """Rate and cell of each trial of the grid that is not stored yet, without those of a widened grid.

    Raises InputError as `tune` does; writes and runs nothing.
    """
    suite = _checked(suite, options, search)
    cells = planned_cells(*_asked(suite, options, search.rates, search.seed), console)
    return sorted((cell.recipe.lr, cell.label) for cell in cells)


def _checked(suite: Suite, options: Options, search: Search) -> Suite:
    """The suite with its initial weights found, which trials, in a folder of their own, would not find by a hash."""
    if search.seed in suite.seeds:
        raise InputError(f"--seed {search.seed} is one of the suite's seeds, whose runs are compared; give another.")
    if not suite.methods:
        raise InputError(
            f"Nothing is to be tuned: of the methods of suite {suite.name!r} none that is trained was chosen; name one "
            "with --method."
        )
    if search.rates[-1] > HIGHEST:
        raise InputError(
            f"The learning rates go up to {search.rates[-1]:g}, and a recipe's may be {HIGHEST:g} at most; give lower "
            "--rates."
        )
    if search.rates[0] < suite.recipe.lr_min:
        raise InputError(
            f"The learning rate {search.rates[0]:g} of --rates is below recipe.lr_min ({suite.recipe.lr_min:g}), to "
            "which rates fall; give higher rates, or set recipe.lr_min lower."
        )
    for path in (options.out / record_name(suite, mode) for mode in _source(suite, options)):
        if path.is_file():
            _keep(read_record(Tuning, path), suite, search, path)
    return initial_weights(suite, options.out)[0]


def _asked(suite: Suite, options: Options, rates: Sequence[float], seed: int) -> tuple[Suite, Options]:
    """What the trials of every method at these rates run, and where."""
    source = _source(suite, options)
    of_method = dict.fromkeys(suite.methods, tuple(rates))
    chosen = replace(options, out=options.out / TRIALS, rates=dict.fromkeys(source, of_method))
    return trial_suite(suite, source, seed), chosen


def _keep(record: Tuning, suite: Suite, search: Search, path: Path) -> None:
    """Raises InputError where a stored record, which this search would replace, has what this one leaves out."""
    if lost := [name for name in record.best if name not in suite.methods]:
        both = ",".join([*record.best, *(name for name in suite.methods if name not in record.best)])
        raise InputError(
            f"{path} has a rate of {', '.join(lost)} too, which a search without it would lose. Search all with "
            f"--method {both} (stored trials are not run again), or give another --out."
        )
    if record.seed != search.seed:
        raise InputError(
            f"{path} is a search with seed {record.seed}, which one with seed {search.seed} would replace; give "
            f"--seed {record.seed}, or another --out."
        )
    # A grid that was widened is widened again by the same search.
    again = record.widened and set(search.rates) <= set(record.rates)
    if not again and (left := sorted(set(record.rates) - set(search.rates))):
        both = ",".join(f"{rate:g}" for rate in sorted({*record.rates, *search.rates}))
        raise InputError(
            f"{path} has the learning rate{'s' * (len(left) > 1)} {', '.join(f'{rate:g}' for rate in left)} too, which "
            f"a search without would lose. Search all with --rates {both} (stored trials are not run again), or give "
            "another --out."
        )


def beyond(rates: Sequence[float], best: Sequence[float], least: float) -> tuple[float, ...]:
    """The rates to be added to the grid where a best one lies at its edge, none below `least` nor above HIGHEST."""
    low = (rounded(rates[0] / FACTOR),) if rates[0] in best else ()
    high = (rounded(rates[-1] * FACTOR),) if rates[-1] in best else ()
    return tuple(rate for rate in (*low, *high) if least <= rate <= HIGHEST)


def with_diverged(scored: Sequence[Trial], methods: Sequence[str], rates: Sequence[float]) -> list[Trial]:
    """These trials of one mode and, without a score, those of all other methods and rates: their training diverged."""
    known = {(trial.method, trial.lr) for trial in scored}
    absent = [(method, rate) for method in methods for rate in rates if (method, rate) not in known]
    return [*scored, *(Trial(method=method, lr=rate, psnr_db=None, key="") for method, rate in absent)]


def best_rates(trials: Sequence[Trial], mode: Mode) -> dict[str, float]:
    """By method, the rate with the highest PSNR, the lower of two equal ones, of the trials of one mode.

    Raises NothingEnded where a method has none.
    """
    best = {}
    for method in dict.fromkeys(trial.method for trial in trials):
        scored = [trial for trial in trials if trial.method == method and trial.psnr_db is not None]
        if not scored:
            raise NothingEnded(f"every trial of {method} diverged in mode {mode}; give lower --rates")
        best[method] = max(scored, key=lambda trial: (trial.psnr_db, -trial.lr)).lr
    return best


def _trials(
    suite: Suite, options: Options, rates: Sequence[float], seed: int, console: Console
) -> list[tuple[Run, Trial]]:
    """Every method trained at these rates, as far as its training did not diverge."""
    chosen, where = _asked(suite, options, rates, seed)
    complete, failed = run_suite(chosen, where, console)
    other = [sentence for sentence in failed if "training diverged" not in sentence]
    if other:
        raise RunError(f"{counted(len(other), 'trial')} failed: " + "; ".join(other))
    found = []
    for folder in complete:
        record = folder.run
        assert record.recipe is not None
        scored = [e for e in folder.evaluations() if _of_search(e, chosen, record.mode)]
        means = [evaluation.mean_psnr for evaluation in scored]
        psnr = math.fsum(means) / len(means)
        variant = digest([record.attention, record.settings])
        trial = Trial(method=record.method, lr=record.recipe.lr, psnr_db=psnr, key=record.key, variant=variant)
        found.append((record, trial))
    return found


def _of_search(evaluation: Evaluation, trial: Suite, mode: Mode) -> bool:
    """Whether an evaluation belongs to this search: its folder may hold those of other validation sets."""
    sigmas = trial.task.sigma_test if isinstance(trial.task, Denoise) else (None,)
    sets: SetNames = getattr(trial.data.folder, mode)
    protocol = sets.protocol or trial.protocol
    return evaluation.data_set in sets.test and evaluation.sigma in sigmas and evaluation.stamp == protocol.stamp


def _source(suite: Suite, options: Options) -> dict[Mode, SetNames]:
    """The sets of every mode. Raises InputError where there is none to validate on."""
    name = "folder" if options.data is not None else "embedded"
    source: Source = getattr(suite.data, name)
    sets: dict[Mode, SetNames] = {mode: getattr(source, mode) for mode in source.modes}
    for mode, own in sets.items():
        if not own.validation:
            raise InputError(
                f"Suite {suite.name!r} names no validation sets for mode {mode}; name some in "
                f"data.{name}.{mode}.validation, of images that are in neither training nor test sets."
            )
    return sets


def trial_suite(suite: Suite, sets: Mapping[Mode, SetNames], seed: int) -> Suite:
    """The suite whose methods are trained with one seed, and scored on the validation sets alone.

    Gaussian denoising is scored at the middle one of the suite's noise levels.
    """
    validated = {mode: own.model_copy(update={"test": own.validation, "validation": ()}) for mode, own in sets.items()}
    source = Source.model_validate({"modes": tuple(sets), **validated})
    task = suite.task
    if isinstance(task, Denoise):
        task = task.model_copy(update={"sigma_test": (task.sigma_test[len(task.sigma_test) // 2],)})
    changes = {
        "task": task, "data": Data(embedded=source, folder=source), "seeds": (seed,), "references": (),
    }  # fmt: skip
    return suite.model_copy(update=changes)


def record_name(suite: Suite, mode: Mode) -> str:
    """Searches at several lengths of training lie side by side: claims need those of two."""
    return f"tuning-{suite.name}-{suite.preset}-{mode}-{suite.recipe.steps}.json"


def _stored(suite: Suite, mode: Mode, out: Path) -> tuple[Path, Tuning] | None:
    """The search of this suite, preset, mode and length, whatever its file is called; None where there is none.

    Raises InputError where all searches there are of other lengths.
    """
    read = [(path, read_record(Tuning, path)) for path in sorted(out.glob("tuning*.json"))]
    own = [(path, r) for path, r in read if (r.suite, r.preset, r.mode) == (suite.name, suite.preset, mode)]
    found = [(path, record) for path, record in own if record.steps == suite.recipe.steps]
    if own and not found:
        path, record = own[0]
        raise InputError(
            f"{path} was made with {counted(record.steps, 'step')}, this recipe has {suite.recipe.steps}; run "
            f"`kitbench tune` with the same recipe."
        )
    return next(iter(found), None)


def _check_shared(suite: Suite, record: Tuning, path: Path) -> None:
    """Raises InputError where a search was made with another recipe or backbone; earlier records do not say."""
    parts = shared_with_search({"recipe": decisive(suite.recipe), "backbone": suite.backbone.model_dump(mode="json")})
    differing = [
        f"{part}.{key}"
        for part, ours in parts.items()
        for theirs in [record.shared.get(part, ours)]
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise InputError(
            f"{path} was made with another {', '.join(differing)}; run `kitbench tune` with the same recipe and "
            f"backbone."
        )


def _check_variants(suite: Suite, record: Tuning, path: Path) -> None:
    """Raises InputError where a method's file or settings are not those that were searched."""
    for name, method in suite.methods.items():
        searched = {trial.variant for trial in record.trials if trial.method == name and trial.variant}
        loaded = load_method(method.attention, name)
        ours = digest([loaded.source_sha256 or method.attention, loaded.resolve(method.settings)])
        if searched and ours not in searched:
            raise InputError(
                f"{path} has the learning rate of {name} with another file or other settings; run `kitbench tune` "
                "again (the stored trials of other methods are not run again)."
            )


def best_of_search(suite: Suite, out: Path, root: Path | None) -> dict[Mode, dict[str, tuple[float, ...]]]:
    """By mode, every method's own best rate.

    root: the data folder, as of the run. Raises InputError where no search of a mode is stored in `out`, it was made
    with another recipe or backbone, or with a seed of these runs, or a method is not in it.
    """
    source = suite.data.embedded if root is None else suite.data.folder
    found: dict[Mode, dict[str, tuple[float, ...]]] = {}
    if not suite.methods:
        raise InputError("--tuned trains methods, and none that is trained was chosen; name one with --method.")
    for mode in source.modes:
        if (search := _stored(suite, mode, out)) is None:
            left = [other for other in source.modes if _stored(suite, other, out) is not None]
            alone = f"; or run {left[0]} alone with --set data.modes={left[0]}" if left else ""
            raise InputError(
                f"No search of learning rates for suite {suite.name!r}, preset {suite.preset!r}, mode {mode} is in "
                f"{out}; run `kitbench tune` first, with the same --suite, --preset, --data and --out{alone}."
            )
        path, record = search
        if record.seed in suite.seeds:
            raise InputError(
                f"{path} chose the rates by runs of seed {record.seed}, which cannot be compared at them; give other "
                "--seeds."
            )
        _check_shared(suite, record, path)
        _check_variants(suite, record, path)
        lacking = suite.methods.keys() - record.best.keys()
        if lacking:
            raise InputError(f"{path} holds no rate of {', '.join(sorted(lacking))}; run `kitbench tune` again.")
        found[mode] = {name: (record.best[name],) for name in suite.methods}
    return found
