"""The search of learning rates: what it makes of its trials."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from kitbench.runs.prepare import Options
from kitbench.runs.tune import Search, tune
from kitbench.spec.loading import load_suite
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder
from tests.stored import store


def test_a_rate_at_which_all_trainings_of_one_mode_diverge_has_trials_without_a_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(suite: Suite, options: Options, console: Console) -> tuple[list[RunFolder], list[str]]:
        lr, found = suite.recipe.lr, []
        for mode in ("colour", "gray"):
            if mode == "gray" and lr > 1e-3:
                return found, ["denoise-gray-kit-s1000: training diverged at step 3"]
            folder = store(options.out / mode / f"{lr}", "kit", 30 - 1000 * abs(lr - 1e-3), 1000, lr=lr)
            folder.write("run.json", folder.run.model_copy(update={"mode": mode}))
            found.append(folder)
        return found, []

    monkeypatch.setattr("kitbench.runs.tune.run_suite", trained)
    suite = load_suite("denoise", "smoke", ["data.modes=colour,gray"], ["kit"])
    rates = (5e-4, 1e-3, 2e-3)
    records = tune(suite, Options(tmp_path, None, "cpu", 0, None), Search(rates, 1000), Console(quiet=True))
    scores = {record.mode: {trial.lr: trial.psnr_db for trial in record.trials} for record in records}
    assert scores["colour"] == pytest.approx({5e-4: 29.5, 1e-3: 30, 2e-3: 29})
    assert scores["gray"] == {5e-4: pytest.approx(29.5), 1e-3: 30, 2e-3: None}
    assert [record.best for record in records] == [{"kit": 1e-3}] * 2
