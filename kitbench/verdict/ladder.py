"""Budget ladders: the same comparison of methods at several lengths of training.

Each training has a learning rate that falls to its end. A difference that long training takes away was one in speed of
learning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from kitbench.spec.fields import digest
from kitbench.store.records import Run
from kitbench.text import counted
from kitbench.verdict.claims import QUESTIONS
from kitbench.verdict.compare import Column, Columns, Compared, adjusted, compare
from kitbench.verdict.contrasts import ComparedRuns
from kitbench.verdict.sheets import Sheet


@dataclass(frozen=True, order=True)
class Budget:
    """A length of training, and what of the recipe goes with it."""

    steps: int
    warmup: int
    ema: float
    """Decay of the averaged weights, whose window is to fit the length; 0: none."""

    def __str__(self) -> str:
        return f"{self.steps:,} steps"


@dataclass(frozen=True)
class Rung:
    """Method a minus method b after one budget."""

    budget: Budget
    compared: Compared


@dataclass(frozen=True)
class LadderLine:
    """The difference between two methods against the budget."""

    a: str
    b: str
    rungs: tuple[Rung, ...]
    """Shortest first; at least two."""

    @property
    def order(self) -> str:
        """Whether the order of the two methods holds at every budget, in words."""
        if any(rung.compared.p_holm is None for rung in self.rungs):
            return "not decided"
        signs = [int(math.copysign(rung.compared.decided, rung.compared.found.mean)) for rung in self.rungs]
        shown = {sign for sign in signs if sign}
        if not shown:
            return "no order shown at any budget"
        better = self.a if signs[-1] > 0 or (not signs[-1] and shown == {1}) else self.b
        if len(shown) > 1:
            return "the order changes with the budget"
        if 0 not in signs:
            return f"holds: {better} is better at every budget"
        budgets = " and ".join(f"{rung.budget.steps:,}" for rung, sign in zip(self.rungs, signs, strict=True) if sign)
        words = f"{better} is better at {budgets} steps, at the others no difference is shown"
        return words if signs[-1] else f"does not last: {words}"


@dataclass(frozen=True)
class Ladder:
    """Comparisons that differ in the budget of training only, with Holm's correction over all their differences."""

    name: str
    """For files: suite, mode, crops of a step, learning rate."""
    title: str
    lines: tuple[LadderLine, ...]
    unlike: tuple[str, ...]
    """Notes on runs that were made differently from most of those at their budget, or by somebody else."""

    @property
    def budgets(self) -> list[Budget]:
        """Shortest first."""
        return sorted({rung.budget for line in self.lines for rung in line.rungs})


def ladders(found: Sequence[ComparedRuns]) -> list[Ladder]:
    """The budget ladders among these comparisons: all that differ in the budget only, where there are two."""
    groups: dict[str, list[ComparedRuns]] = {}
    for block in found:
        groups.setdefault(_without_budget(block.first.run), []).append(block)
    ladders = [_ladder(sorted(group, key=_budget)) for _, group in sorted(groups.items())]
    return [ladder for ladder in ladders if ladder.lines]


def _without_budget(run: Run) -> str:
    """Digest of what the runs of a ladder share."""
    budget = {field.name for field in fields(Budget)}
    recipe = {key: value for key, value in run.identity["recipe"].items() if key not in budget}
    left_out = ("attention", "settings", "seed")
    return digest({k: v for k, v in run.identity.items() if k not in left_out} | {"recipe": recipe})


def _budget(block: ComparedRuns) -> Budget:
    recipe = block.first.run.recipe
    assert recipe is not None
    return Budget(recipe.steps, recipe.warmup, recipe.ema)


def _ladder(group: Sequence[ComparedRuns]) -> Ladder:
    methods = dict.fromkeys(method for block in group for method in block.methods)
    pairs = [(a, b) for a, b, _ in QUESTIONS.values()] + [(method, "conv") for method in methods if method != "conv"]
    measured = {pair: _measured(group, *pair) for pair in pairs}
    places = [(pair, budget) for pair, rungs in measured.items() if len(rungs) > 1 for budget in rungs]
    corrected = dict(zip(places, adjusted([measured[pair][budget] for pair, budget in places]), strict=True))
    lines = tuple(
        LadderLine(*pair, tuple(Rung(budget, corrected[pair, budget]) for budget in measured[pair]))
        for pair in dict.fromkeys(pair for pair, _ in places)
    )
    run = group[0].first.run
    assert run.recipe is not None
    assert run.backbone is not None
    title = (
        f"{run.suite}, {run.mode}, {run.recipe.batch} x {run.recipe.crop} px per step, "
        f"learning rate {run.recipe.lr:g}, width {run.backbone.width}, on {run.device}"
    )
    name = f"{run.suite}-{run.mode}-{run.recipe.batch}x{run.recipe.crop}-lr{run.recipe.lr:g}"
    return Ladder(name, title, lines, tuple(dict.fromkeys(note for block in group for note in block.unlike())))


def _measured(group: Sequence[ComparedRuns], a: str, b: str) -> dict[Budget, Compared]:
    """Method a minus method b by budget, on the same test sets at every budget: on others, a difference could be due to
    the images. The budgets are as many as share a set."""
    of = {_budget(block): (block.methods[a], block.methods[b]) for block in group if {a, b} <= block.methods.keys()}
    budgets: dict[Column, set[Budget]] = {}
    for budget, (one, other) in of.items():
        for column in one.keys() & other.keys():
            budgets.setdefault(column, set()).add(budget)
    most = max(budgets.values(), key=lambda own: (len(own), sorted(own)), default=set())
    columns = [column for column, own in budgets.items() if most <= own]
    found = _on(columns, of, sorted(most), (a, b))
    # What has too few seeds at one budget is left out at all of them.
    left_out = tuple(sorted({column for one in found.values() for column in one.left_out}))
    if left_out:
        found = _on([column for column in columns if column not in left_out], of, sorted(found), (a, b))
    return {budget: replace(one, left_out=left_out) for budget, one in found.items()}


def _on(
    columns: Sequence[Column], of: Mapping[Budget, tuple[Columns, Columns]], budgets: Sequence[Budget],
    names: tuple[str, str],
) -> dict[Budget, Compared]:  # fmt: skip
    """The differences on these columns at these budgets, where there is something to pair."""
    compared = {
        budget: compare(*names, *({column: methods[column] for column in columns} for methods in of[budget]))
        for budget in budgets
    }
    return {budget: one for budget, one in compared.items() if one is not None}


def ladder_sheet(ladder: Ladder) -> Sheet:
    """A budget ladder as a table: a line for each difference, a column for each budget."""
    heads = [_heading(budget, ladder.budgets) for budget in ladder.budgets]
    lines = []
    for line in ladder.lines:
        of = {rung.budget: rung.compared for rung in line.rungs}
        cells = [_difference(of[budget]) if budget in of else "n/a" for budget in ladder.budgets]
        lines.append((f"{line.a} - {line.b}", *cells, line.order))
    compared = [rung.compared.found for line in ladder.lines for rung in line.rungs]
    seeds, images = (_range([getattr(c, f"{name}s") for c in compared], name) for name in ("seed", "image"))
    interval = " and its 95 % interval over seeds and images" if any(c.interval for c in compared) else ""
    tested = sum(c.p is not None for c in compared)
    reasons = "; ".join(dict.fromkeys(c.note for c in compared if c.note))
    notes = [
        f"Mean over the test images that all budgets have{interval}; {seeds}, {images}.",
        f"The order is decided at 5 %, with Holm's correction over {tested} differences of this table; one interval is "
        "not corrected.",
        f"Not decided: {reasons}.",
        "Weights are averaged over a window that goes with the length: ema "
        + ", ".join(f"{budget.ema:g} at {budget}" for budget in ladder.budgets) + ".",
    ]  # fmt: skip
    averaged = len({budget.ema for budget in ladder.budgets}) > 1
    chosen = [note for note, holds in zip(notes, (True, tested, reasons, averaged), strict=True) if holds]
    left_out = dict.fromkeys((f"{line.a} - {line.b}", line.rungs[0].compared.without) for line in ladder.lines)
    chosen += [f"{name}: {without}." for name, without in left_out if without]
    return Sheet(
        f"Budget ladder: {ladder.title}", ("Difference, dB", *heads, "Order"), tuple(lines), (*chosen, *ladder.unlike)
    )


def _heading(budget: Budget, every: Sequence[Budget]) -> str:
    """The steps of a budget, and what else distinguishes it from others of so many steps."""
    alike = [other for other in every if other.steps == budget.steps]
    warmup = f", {budget.warmup:,} of warm-up" if len({other.warmup for other in alike}) > 1 else ""
    return f"{budget}{warmup}" + (f", ema {budget.ema:g}" if len({other.ema for other in alike}) > 1 else "")


def _range(values: Sequence[int], what: str) -> str:
    """`1 seed`, `3 seeds`, `3 to 5 seeds`."""
    low, high = min(values), max(values)
    return f"{counted(low, what)}" if low == high else f"{low} to {high} {what}s"


def _difference(compared: Compared) -> str:
    interval = compared.found.interval
    behind = "" if interval is None else f" [{interval.low:+.3f}, {interval.high:+.3f}]"
    return f"{compared.found.mean:+.3f}{behind}"
