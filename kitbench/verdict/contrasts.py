"""Contrasts: differences between two methods that were chosen before any score was seen, and what decides them.

A contrast is measured under up to four setups: under one recipe for all methods and with each method at its own best
learning rate (from `kitbench tune`), at the longest training that was run, and the longest shorter one that was run
with FEWEST_SEEDS seeds of both methods. It is decided where every setup decides it: its p value is the largest of its
setups', and those of all contrasts of a page are corrected together by Holm's method, so that a page holds a false
decision in at most 5 % of cases, whatever is true in which setup.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from kitbench.spec.fields import digest
from kitbench.spec.shipped import suite_names
from kitbench.store.records import Run, Tuning
from kitbench.verdict.compare import Column, Compared, compare, paired_scores, with_correction
from kitbench.verdict.entries import Entry, bare_label, labels
from kitbench.verdict.provenance import unlike_notes
from kitbench.verdict.searches import Searches
from kitbench.verdict.statistics import ALPHA, FEWEST_SEEDS, holm

Verdict = Literal["supported", "not supported", "depends on the learning rate", "not decided"]
UNDECIDED: Verdict = "not decided"
RateChoice = Literal["one recipe", "each at its own best rate"]
ONE: RateChoice = "one recipe"
OWN: RateChoice = "each at its own best rate"
SMOKE = "smoke"
"""The preset that only proves that everything works: its runs settle no claim."""
K = TypeVar("K")


@dataclass(frozen=True, order=True)
class Setup:
    """How both methods of a contrast were trained."""

    comparison: RateChoice
    steps: int

    def __str__(self) -> str:
        return f"{self.comparison}, {self.steps:,} steps"


def decide(signs: Mapping[Setup, int], few: Collection[Setup] = ()) -> tuple[Verdict, str]:
    """The verdict on "a restores better than b", and why it is not decided.

    signs: by setup, +1 where a is better by more than noise, -1 where b is, 0 where neither is shown. few: the setups
    with fewer than FEWEST_SEEDS seeds, which decide nothing.
    """
    steps = sorted({setup.steps for setup in signs})
    missing = []
    if not any(setup.comparison == OWN for setup in signs):
        missing.append("only one recipe was compared (run `kitbench tune`)")
    else:
        absent = [Setup(OWN, n) for n in steps if Setup(OWN, n) not in signs]
        missing += [f"no runs of {setup} (run `kitbench tune`)" for setup in absent]
    if len(steps) < 2:
        missing.append("only one length of training was run")
    if missing:
        return UNDECIDED, " and ".join(missing)
    short = [str(setup) for setup in sorted(few)]
    alike = [str(setup) for setup in sorted(signs) if signs[setup] == 0 and setup not in few]
    reasons = [f"no difference is shown by {' and '.join(alike)}"] if alike else []
    reasons += [f"fewer than {FEWEST_SEEDS} seeds were run of {' and '.join(short)}"] if short else []
    if reasons:
        return UNDECIDED, "; ".join(reasons)
    if len(set(signs.values())) == 1:
        return ("supported" if min(signs.values()) > 0 else "not supported"), ""
    if all(len({signs[Setup(comparison, n)] for n in steps}) == 1 for comparison in (ONE, OWN)):
        return "depends on the learning rate", ""
    return UNDECIDED, "the order changes with the length of training"


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of a statement whose parts must all hold: the worst of theirs, in the order of `order`."""
    found = set(verdicts)
    order: tuple[Verdict, ...] = ("not supported", "depends on the learning rate", UNDECIDED)
    return next((verdict for verdict in order if verdict in found), "supported")


@dataclass(frozen=True)
class ComparedRuns:
    """The runs of one comparison by method, then by data set and condition."""

    methods: dict[str, dict[Column, list[Entry]]]

    @property
    def first(self) -> Entry:
        return next(group[0] for columns in self.methods.values() for group in columns.values())

    @property
    def entries(self) -> list[Entry]:
        """All of them."""
        return [entry for columns in self.methods.values() for group in columns.values() for entry in group]

    def unlike(self) -> tuple[str, ...]:
        """Notes on the runs that were made differently from most of the block, or by somebody else."""
        return unlike_notes(self.entries, labels(self.entries))

    def run_of(self, method: str) -> Run:
        """Any run of a method."""
        return next(iter(self.methods[method].values()))[0].run

    @property
    def suites(self) -> set[str]:
        return {entry.run.suite for entry in self.entries}

    @property
    def steps(self) -> int:
        recipe = self.first.run.recipe
        assert recipe is not None
        return recipe.steps

    @property
    def lr(self) -> float:
        recipe = self.first.run.recipe
        assert recipe is not None
        return recipe.lr

    @property
    def weight(self) -> tuple[int, bool, int, int]:
        """Longest training first, then colour, then most methods, then most results."""
        recipe = self.first.run.recipe
        assert recipe is not None
        return (
            recipe.steps * recipe.batch * recipe.crop**2, self.first.run.mode == "colour", len(self.methods),
            len(self.entries),
        )  # fmt: skip

    def identity(self, *left_out: str) -> str:
        """Digest of what all runs of the block share, without some of it; "lr" means the recipe's."""
        identity = dict(self.first.run.identity)
        if "lr" in left_out:
            identity["recipe"] = {key: value for key, value in identity["recipe"].items() if key != "lr"}
        return digest({k: v for k, v in identity.items() if k not in ("attention", "settings", "seed", *left_out)})


def blocks(found: Sequence[Entry]) -> list[ComparedRuns]:
    """The comparisons among these entries, the weightiest first; methods without training are in none."""
    names = labels(found)
    grouped: dict[str, dict[str, dict[Column, list[Entry]]]] = {}
    for entry in sorted(found, key=lambda e: (names[e.run.key, e.run.method], e.run.seed or 0)):
        if entry.run.comparison:
            columns = grouped.setdefault(entry.run.comparison, {}).setdefault(
                names[entry.run.key, entry.run.method], {}
            )
            columns.setdefault((entry.evaluation.data_set, entry.evaluation.condition), []).append(entry)
    return sorted(
        (ComparedRuns(methods) for _, methods in sorted(grouped.items())), key=lambda b: b.weight, reverse=True
    )


def compare_methods(block: ComparedRuns, a: str, b: str) -> Compared | None:
    """Method a against b over all images of a comparison; None where there is nothing to pair."""
    if a not in block.methods or b not in block.methods:
        return None
    return compare(a, b, block.methods[a], block.methods[b])


@dataclass(frozen=True)
class Runs:
    """The comparisons of one task that differ in the recipe only, the weightiest first."""

    blocks: tuple[ComparedRuns, ...]
    searches: Searches = field(default_factory=Searches)
    left_out: tuple[str, ...] = ()
    """Variants with other than the default settings."""
    smoke: bool = False
    """Whether there were smoke runs, which are left out."""
    others: tuple[Runs, ...] = ()
    """Comparisons of the task that differ from these in more than the recipe: no part of a verdict."""

    def with_methods(self, *methods: str) -> list[ComparedRuns]:
        return [block for block in self.blocks if set(methods) <= block.methods.keys()]

    def searched(self, block: ComparedRuns, a: str, b: str) -> tuple[Tuning, Tuning] | None:
        """The searches of rates that hold for the runs of a and b in a comparison: one of both, or two made alike."""
        return self.searches.of_both(block.run_of(a), block.run_of(b))

    def under_one_recipe(self, a: str, b: str) -> dict[int, ComparedRuns]:
        """By steps, the comparisons that measure the contrast a - b under one recipe: the longest training, and the
        longest shorter one with FEWEST_SEEDS seeds of both, else the next shorter one.

        Of several of one length, that at the recipe's own rate, else the weightiest.
        """
        found: dict[int, list[ComparedRuns]] = {}
        seeds: dict[int, int] = {}
        for block in self.with_methods(a, b):
            if (scores := paired_scores([block.methods[a], block.methods[b]])) is not None:
                found.setdefault(block.steps, []).append(block)
                seeds[block.steps] = max(seeds.get(block.steps, 0), len(scores.seeds))
        lengths = sorted(found, reverse=True)
        shorter = [steps for steps in lengths[1:] if seeds[steps] >= FEWEST_SEEDS] or lengths[1:]
        return {
            steps: next((block for block in found[steps] if self._at_usual_rate(block, a, b)), found[steps][0])
            for steps in (*shorter[:1], *lengths[:1])
        }

    def compare(self, a: str, b: str) -> dict[Setup, Compared]:
        """The contrast a - b under every setup that was run, at the two lengths of `under_one_recipe`."""
        found: dict[Setup, Compared | None] = {}
        for steps, one in self.under_one_recipe(a, b).items():
            found[Setup(ONE, steps)] = compare_methods(one, a, b)
            pair = self.searched(one, a, b)
            if pair is None:
                continue
            groups = [
                self.at_rate(one, method, search.best[method]) for method, search in zip((a, b), pair, strict=True)
            ]
            if groups[0] is not None and groups[1] is not None:
                found[Setup(OWN, steps)] = compare_methods(ComparedRuns({a: groups[0], b: groups[1]}), a, b)
        return {setup: compared for setup, compared in found.items() if compared is not None}

    def _at_usual_rate(self, block: ComparedRuns, a: str, b: str) -> bool:
        """Whether a block was trained at the recipe's own rate, as far as searches of the rates of a or b say it."""
        pair = self.searched(block, a, b)
        known = [search for method in (a, b) for search in self.searches.of(block.run_of(method))][:1]
        return bool(known) and all(math.isclose(block.lr, search.lr) for search in pair or known)

    def at_rate(self, one: ComparedRuns, method: str, rate: float) -> dict[Column, list[Entry]] | None:
        """The runs of a method at a rate, everything else as in `one`; None where there are none."""
        return next(
            (
                block.methods[method]
                for block in self.with_methods(method)
                if block.identity("lr") == one.identity("lr") and math.isclose(block.lr, rate)
            ),
            None,
        )


def select(found: Sequence[Entry], searches: Searches) -> Runs:
    """The runs among these entries, of one task, that claims are put to.

    Left out: smoke runs; trials of a search of learning rates and scores on its validation set; variants of a method
    that do not have the default settings. Of several groups that differ in more than the recipe (training images,
    backbone, colour mode) the one with the weightiest comparison is taken; the rest are its `others`.
    """
    trained = [entry for entry in found if entry.run.comparison]
    kept = [entry for entry in trained if not _smoke(entry.run) and not searches.decided_by(entry)]
    defaults, left_out = _default_variants(kept)
    groups: dict[str, list[ComparedRuns]] = {}
    for block in blocks(defaults):
        groups.setdefault(block.identity("recipe", "device"), []).append(block)
    chosen, *others = [tuple(group) for group in groups.values()] or [()]
    smoke = any(_smoke(entry.run) for entry in trained)
    return Runs(chosen, searches, tuple(left_out), smoke, tuple(Runs(group) for group in others))


def _smoke(run: Run) -> bool:
    return run.preset == SMOKE or (run.recipe is not None and run.recipe.name == SMOKE)


def _default_variants(found: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Of each method in each comparison the entries of one variant, and the names of the others.

    The variant is one whose settings `--set` did not change; where several suites of the user's own define such, that
    of a shipped suite, then that with the most results.
    """
    variants: dict[tuple[str, str], dict[str, list[Entry]]] = {}
    for entry in found:
        variant = json.dumps([entry.run.attention, entry.run.settings], sort_keys=True)
        variants.setdefault((entry.run.comparison, bare_label(entry.run)), {}).setdefault(variant, []).append(entry)

    def order(group: Sequence[Entry]) -> tuple[bool, bool, int]:
        unchanged = any(not entry.run.changed for entry in group)
        return unchanged, any(entry.run.suite in suite_names() for entry in group), len(group)

    names = labels(found)
    kept, left_out = [], []
    for (_, label), groups in variants.items():
        default = max(groups, key=lambda variant: (*order(groups[variant]), variant))
        for variant, group in groups.items():
            if variant == default and order(group)[0]:
                kept += group
                continue
            run = group[0].run
            changed = ", ".join(f"{key} {run.settings[key]}" for key in run.changed)
            left_out.append(f"{label} ({changed})" if changed else names[run.key, run.method])
    return kept, list(dict.fromkeys(left_out))


@dataclass(frozen=True)
class Contrast:
    """A contrast a - b, measured and decided."""

    a: str
    b: str
    setups: dict[Setup, Compared]
    verdict: Verdict
    reason: str
    """Why it is not decided."""
    p_holm: float | None = None
    """The largest p of its setups, adjusted over all contrasts of the page; None where a setup has none."""
    family: int = 0
    """Over how many contrasts: all that were run."""


def decide_contrasts(contrasts: Mapping[K, tuple[str, str, Mapping[Setup, Compared]]]) -> dict[K, Contrast]:
    """Contrasts (a, b, differences by setup) of one page, corrected together.

    A setup's own p_holm says whether that setup shows a difference: by Bonferroni's correction over the contrasts, or
    because Holm's decides the contrast, and so all of its setups. All contrasts that were run count, with or without a
    p value, so that no correction shrinks where a longer training has one seed so far.
    """
    largest = np.array([_largest_p(setups) for _, _, setups in contrasts.values()])
    run = np.array([bool(setups) for _, _, setups in contrasts.values()], dtype=bool)
    # A contrast without a p value was looked at too: it counts, as one that shows nothing.
    adjusted = np.where(np.isfinite(largest), holm(np.where(run & np.isnan(largest), 1.0, largest)), math.nan)
    joint = dict(zip(contrasts, (float(p) for p in adjusted), strict=True))
    family = int(run.sum())
    decided = {}
    for key, (a, b, setups) in contrasts.items():
        found = {
            setup: with_correction(compared, _of_setup(compared.found.p, joint[key], family), family)
            for setup, compared in setups.items()
        }
        if found:
            # Where one setup has no p, the contrast has none; the reason is to name that setup and not the others.
            known = math.isfinite(joint[key])
            p = {setup: compared.p_holm if known else compared.found.p for setup, compared in found.items()}
            few = [setup for setup, compared in found.items() if compared.found.seeds < FEWEST_SEEDS]
            verdict, reason = decide({setup: _sign(p[setup], compared) for setup, compared in found.items()}, few)
        else:
            verdict, reason = UNDECIDED, f"no stored runs of both {a} and {b} under one recipe"
        p_holm = joint[key] if math.isfinite(joint[key]) else None
        decided[key] = Contrast(a, b, found, verdict, reason, p_holm, family)
    return decided


def _largest_p(setups: Mapping[Setup, Compared]) -> float:
    """NaN where a setup has no p, or there is none."""
    values = [compared.found.p for compared in setups.values()]
    return math.nan if not values or None in values else max(value for value in values if value is not None)


def _of_setup(p: float | None, joint: float, family: int) -> float:
    return math.nan if p is None or not math.isfinite(joint) else min(p * family, joint)


def _sign(p: float | None, compared: Compared) -> int:
    return 0 if p is None or p >= ALPHA else int(math.copysign(1, compared.found.mean))
