"""Which searches of learning rates hold for which runs: task, recipe, settings, and what their trials were scored on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kitbench.errors import InputError
from kitbench.spec.fields import digest
from kitbench.store.folder import find
from kitbench.store.records import Trial, Tuning, shared_with_search
from kitbench.verdict.claims import load
from kitbench.verdict.compare import Compared
from kitbench.verdict.contrasts import Runs, Setup, select
from kitbench.verdict.curves import curves_markdown
from kitbench.verdict.entries import entries
from kitbench.verdict.page.report import figures, report
from kitbench.verdict.searches import Searches
from tests.stored import rewrite
from tests.verdict.test_contrasts import (
    BEST,
    BETTER,
    LR,
    ONE_SHORT,
    OWN_SHORT,
    WORSE,
    runs,
    tuned,
    tunings,
)


def selected(out: Path, searches: list[Tuning]) -> Runs:
    return select(entries(find([out]), None), Searches.read(searches, find([out])))


def compared(out: Path, searches: list[Tuning]) -> dict[Setup, Compared]:
    return selected(out, searches).compare("kit", "local")


def shared(out: Path) -> dict[str, Any]:
    """What a search of this version states that it shares with the runs."""
    return shared_with_search(entries(find([out]), None)[0].run.identity)


def searched(record: Tuning, method: str, settings: dict[str, Any] | None = None, **changes: Any) -> Tuning:
    """A search of one method's rate alone; `settings` as its trials state them."""
    stated = {} if settings is None else {"variant": digest([method, settings])}
    trials = tuple(t.model_copy(update=stated) for t in record.trials if t.method == method)
    return record.model_copy(update={"trials": trials, "best": {method: record.best[method]}} | changes)


@pytest.fixture
def record(tmp_path: Path) -> Tuning:
    """Of a search of both methods, beside its trials and runs under one recipe and at the best rate."""
    [found] = tunings(tuned(runs(tmp_path, BETTER), BETTER))
    return found


@pytest.mark.parametrize(
    ("other", "setups"),
    [
        ({}, 2),
        ({"preset": "standard"}, 2),
        ({"settings": {"window": 8}}, 1),
        ({"settings": None}, 1),
        ({"shared": {}}, 1),
        ({"rates": (LR, BEST, 2 * BEST)}, 1),
        ({"seed": 98}, 1),
        ({"validation": "others"}, 1),
    ],
)
def test_searches_of_two_suites_hold_side_by_side_where_they_were_made_alike(
    tmp_path: Path, record: Tuning, other: dict[str, Any], setups: int
) -> None:
    changes = {"suite": "ablate", "settings": {}, "shared": shared(tmp_path)} | other
    assert len(compared(tmp_path, [searched(record, "kit"), searched(record, "local", **changes)])) == setups


def test_trials_that_were_scored_at_another_noise_level_or_are_not_stored_are_not_alike(
    tmp_path: Path, record: Tuning
) -> None:
    both = [searched(record, "kit"), searched(record, "local")]
    assert len(compared(tmp_path, both)) == 2
    for file in tmp_path.glob("*-local-s99-*/eval/*.json"):
        rewrite(file, lambda raw: raw.update(sigma=50))
    assert len(compared(tmp_path, both)) == 1
    for folder in list(tmp_path.glob("*-s99-*")):
        shutil.rmtree(folder)
    assert len(compared(tmp_path, both)) == 1
    assert len(compared(tmp_path, [record])) == 2  # one search compares like with like


@pytest.mark.parametrize("suite", ["denoise", "ablate"])
def test_a_search_of_a_variant_says_nothing_of_the_default(tmp_path: Path, record: Tuning, suite: str) -> None:
    local = searched(record, "local")
    for settings, setups in (({"k": 16}, 1), ({}, 2)):
        kit = searched(record, "kit", settings, suite=suite, shared=shared(tmp_path))
        assert len(compared(tmp_path, [local, kit])) == setups


def test_the_order_of_the_searches_decides_nothing(tmp_path: Path, record: Tuning) -> None:
    runs(tmp_path, WORSE, lr=2 * BEST)
    rates = {LR: LR, BEST: 2 * BEST}
    trials = tuple(trial.model_copy(update={"lr": rates[trial.lr]}) for trial in record.trials)
    other = record.model_copy(
        update={"rates": tuple(rates.values()), "trials": trials, "best": dict.fromkeys(BETTER, 2 * BEST)}
    )
    both = [record, other]
    assert len({compared(tmp_path, searches)[OWN_SHORT].found.mean for searches in (both, both[::-1])}) == 1


def test_a_search_of_neither_method_does_not_say_which_rate_is_the_recipes(tmp_path: Path, record: Tuning) -> None:
    runs(tmp_path, WORSE | {"window": 0.0, "conv": 0.0}, lr=2 * BEST)
    window = {"best": {"window": BEST}, "trials": (Trial(method="window", lr=BEST, psnr_db=30, key="w"),)}
    other = record.model_copy(update=window | {"lr": 2 * BEST})
    assert compared(tmp_path, [other, record])[ONE_SHORT].found.mean > 0


def test_no_search_of_the_task_was_decided_on_the_images_of_a_comparison(tmp_path: Path, record: Tuning) -> None:
    runs(tmp_path, WORSE, data_set="validation")
    for suite, stated in (("denoise", {}), ("ablate", shared(tmp_path))):
        chosen = selected(tmp_path, [record.model_copy(update={"suite": suite, "shared": stated})])
        assert {column[0] for block in chosen.blocks for of in block.methods.values() for column in of} == {"Set_A"}


def test_trials_are_read_where_tune_stores_them(tmp_path: Path, record: Tuning) -> None:
    """In a folder beside the record, which no table reads."""
    (tmp_path / "tuning").mkdir()
    for folder in list(tmp_path.glob("*-s99-*")):
        folder.rename(tmp_path / "tuning" / folder.name)
    runs, _, searches = load([tmp_path])
    assert not any(folder.run.seed == 99 for folder in runs)
    assert {scored for trial in record.trials for scored in searches.trials[trial.key]} == {
        ("validation", "σ25", "awgn8.v1")
    }


def test_a_search_may_lie_in_a_folder_without_runs(tmp_path: Path, record: Tuning) -> None:
    """As `tune` leaves it where --out holds nothing else."""
    alone = tmp_path / "search"
    (alone / "tuning").mkdir(parents=True)
    for path in (*tmp_path.glob("*-s99-*"), *tmp_path.glob("tuning-*.json")):
        path.rename(alone / ("tuning" if path.is_dir() else "") / path.name)
    found, _, searches = load([alone])
    assert (found, searches.records) == ([], (record,))
    assert "seed 99" in curves_markdown(found, searches.records)
    assert list(figures(found, [], searches)) == ["rates-denoise-quick-colour-700"]
    with pytest.raises(InputError, match="a report is about runs; of searches and sweeps alone `kitbench figures`"):
        report(found, [], searches)
    runs, _, searches = load([tmp_path, alone])
    assert len(select(entries(runs, None), searches).compare("kit", "local")) == 2
    (alone / "folder" / "run").mkdir(parents=True)
    (alone / "folder" / "run" / "run.json").touch()
    with pytest.raises(InputError, match=r"of its 2 folders of runs, for example .*/folder\."):
        load([alone])
