"""Which searches of learning rates (`kitbench tune`) hold for which stored runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kitbench.spec.fields import digest
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run, Tuning, shared_with_search
from kitbench.verdict.entries import Entry

ScoredOn = tuple[str, str, str]
"""Data set, condition, protocol; no two versions of a set meet."""


@dataclass(frozen=True)
class Searches:
    """Stored searches, and the trials that are stored beside them."""

    records: tuple[Tuning, ...] = ()
    trials: Mapping[str, frozenset[ScoredOn]] = field(default_factory=dict)
    """By the key of a trial, what it was scored on; empty where the trial is not stored."""

    @classmethod
    def read(cls, records: Sequence[Tuning], folders: Sequence[RunFolder]) -> Searches:
        """Searches, and what the trials of theirs that lie in these folders were scored on. Raises InputError."""
        trials: dict[str, frozenset[ScoredOn]] = {trial.key: frozenset() for one in records for trial in one.trials}
        for folder in folders:
            if trials and folder.run.key in trials:
                scored = {(one.data_set, one.condition, one.stamp) for one in folder.evaluations()}
                trials[folder.run.key] |= scored
        return cls(tuple(records), trials)

    def decided_by(self, entry: Entry) -> bool:
        """Whether a search chose a rate by this entry, or by the images of its test set: it is then no test."""
        return entry.run.key in self.trials or any(_validates(search, entry) for search in self.records)

    def of(self, run: Run) -> list[Tuning]:
        """The searches of a method's rate whose task, images, backbone, recipe and settings are those of this run.

        A record of an earlier version does not state all of these: it holds for its own suite, preset, mode and length.
        Searches of the run's own suite come first, then those of more rates.
        """
        assert run.recipe is not None
        place = run.suite, run.preset, run.mode, run.recipe.steps
        shared, variant = shared_with_search(run.identity), digest([run.attention, run.settings])

        def own(search: Tuning) -> bool:
            return (search.suite, search.preset, search.mode, search.steps) == place

        def holds(search: Tuning) -> bool:
            stated = {trial.variant for trial in search.trials if trial.method == run.method} - {""}
            alike = search.shared == shared or (own(search) and not search.shared)
            return run.method in search.best and alike and (stated == {variant} or (own(search) and not stated))

        def order(search: Tuning) -> tuple[bool, int, str]:
            return not own(search), -len(search.rates), digest(search.model_dump(mode="json"))

        return sorted(filter(holds, self.records), key=order)

    def of_both(self, a: Run, b: Run) -> tuple[Tuning, Tuning] | None:
        """One search that holds for both runs, or two that were made alike; None where there are no such.

        Two searches are alike if rates and seed are the same, and the images, noise levels and protocol that all
        their trials were scored on.
        """
        of_a, of_b = self.of(a), self.of(b)
        both = [(one, one) for one in of_a if one in of_b]
        alike = [(one, other) for one in of_a for other in of_b if self._alike(one, other)]
        return next(iter(both + alike), None)

    def _alike(self, one: Tuning, other: Tuning) -> bool:
        columns = self._scored_on(one)
        same = (one.rates, one.seed, one.validation) == (other.rates, other.seed, other.validation)
        return same and bool(columns) and columns == self._scored_on(other)

    def _scored_on(self, search: Tuning) -> frozenset[ScoredOn]:
        """What all trials of a search were scored on; empty where one is not stored."""
        known = [self.trials[trial.key] for trial in search.trials if trial.psnr_db is not None]
        return frozenset.intersection(*known) if known else frozenset()


NONE_SEARCHED = Searches()


def _validates(search: Tuning, entry: Entry) -> bool:
    """Whether a search for runs of this task was decided on the images that an entry was scored on."""
    kind = search.shared["task"]["kind"] if search.shared else None
    like = search.suite == entry.run.suite or kind == entry.run.task.kind
    return like and entry.evaluation.data_set in search.validation.split(", ")
