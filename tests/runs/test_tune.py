"""The search for learning rates, with scores that are given in place of training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from skimage import data as photographs

from kitbench.cli.main import cli
from kitbench.errors import ExitCode, InputError, RunError
from kitbench.model.methods import load_method
from kitbench.runs import tune
from kitbench.runs.cell import Cell, Rates, axes, decisive
from kitbench.runs.failure import record_failure
from kitbench.runs.plan import Planned
from kitbench.runs.prepare import Options
from kitbench.runs.sets import choose_sets
from kitbench.spec import loading
from kitbench.spec.shipped import suite_names
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Trial, Tuning, read_record
from kitbench.verdict.tuning import tuning_caption
from tests.conftest import TINY, Kitbench

LOW, MIDDLE, HIGH = RATES = (1e-3, 2e-3, 4e-3)
Scores = Mapping[str, Mapping[float, float]]
"""By mode: the PSNR of every method at a rate; training diverges at the others."""
Search = Callable[[Scores, int], list[Tuning]]
FINE = {LOW: 29.0, MIDDLE: 30.0, HIGH: 29.5}


rates_of = tune.best_of_search


def suite_of(steps: int) -> Suite:
    return loading.load_suite("denoise", "quick", [f"recipe.steps={steps}"], ["kit", "local"])


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    def of(scores: Scores, steps: int = 700) -> list[Tuning]:
        def run(chosen: Suite, options: Options, console: Console) -> tuple[list[Any], list[str]]:
            complete, failed = [], []
            identity = {"recipe": decisive(chosen.recipe), "backbone": chosen.backbone.model_dump(mode="json")}
            for mode, own in scores.items():
                trials = [(name, rate) for name in chosen.methods for rate in options.rates[mode][name]]
                for method, rate in trials:
                    if rate in own:
                        [name] = getattr(chosen.data.folder, mode).test
                        asked = {"data_set": name, "sigma": 25, "stamp": chosen.protocol.stamp}
                        # The second, third and fourth were made by searches on other sets, sigmas and protocols.
                        others = ({}, {"data_set": "Kodak24"}, {"sigma": 50}, {"stamp": "awgn8.v1"})
                        evaluations = [
                            SimpleNamespace(mean_psnr=own[rate] - 9 * bool(other), **asked | other) for other in others
                        ]
                        key = f"{mode}-{method}-{rate}"
                        settings = load_method(method).resolve(chosen.methods[method].settings)
                        record = SimpleNamespace(
                            method=method, mode=mode, key=key, identity=identity | {"seed": 1000}, attention=method,
                            settings=settings, recipe=chosen.recipe.model_copy(update={"lr": rate}),
                        )  # fmt: skip
                        complete.append(SimpleNamespace(run=record, evaluations=lambda found=evaluations: found))
                    else:
                        failed.append(f"{mode}-{method}-s1000: training diverged: loss nan at step 9; stopped")
            return complete, failed

        monkeypatch.setattr(tune, "run_suite", run)
        monkeypatch.setattr(tune, "choose_sets", lambda chosen, root: (dict.fromkeys(scores), {}))
        options = Options(tmp_path, tmp_path, "cpu", 0, None)  # of the set's folder: modes colour and gray
        return tune.tune(suite_of(steps), options, tune.Search(RATES, 1000), Console(quiet=True))

    return of


def scored(record: Tuning) -> dict[tuple[str, float], float | None]:
    return {(trial.method, trial.lr): trial.psnr_db for trial in record.trials}


def test_a_rate_at_which_everything_diverges_is_recorded_of_the_modes_that_were_trained(search: Search) -> None:
    [record] = search({"colour": {LOW: 29.0, MIDDLE: 30.0}})
    assert record.mode == "colour"
    assert record.best == {"kit": MIDDLE, "local": MIDDLE}
    assert scored(record)["kit", HIGH] is scored(record)["local", HIGH] is None
    assert len(record.trials) == 6


def test_a_mode_that_diverges_alone_still_has_a_trial_at_every_rate(search: Search) -> None:
    colour, gray = search({"colour": FINE, "gray": {LOW: 29.0, MIDDLE: 30.0}})
    assert (colour.mode, gray.mode) == ("colour", "gray")
    assert scored(colour)["kit", HIGH] == 29.5
    assert scored(gray)["kit", HIGH] is None
    assert gray.best["kit"] == MIDDLE


def test_a_search_of_which_nothing_ended_is_refused(search: Search) -> None:
    with pytest.raises(RunError, match="every trial of kit diverged in mode colour; give lower --rates"):
        search({"colour": {}})
    with pytest.raises(RunError, match="every trial of kit diverged in mode gray; give lower --rates"):
        search({"colour": FINE, "gray": {}})  # not left out, as a mode is whose test sets are missing


def test_the_grid_is_widened_for_all_where_a_best_rate_lies_at_its_edge(search: Search) -> None:
    [record] = search({"colour": {LOW: 31.0, MIDDLE: 30.0, HIGH: 29.0, LOW / 2: 30.5}})
    assert record.rates == (LOW / 2, LOW, MIDDLE, HIGH)
    assert record.widened
    assert record.best["kit"] == LOW


def test_searches_of_two_lengths_lie_side_by_side(search: Search, tmp_path: Path) -> None:
    search({"colour": FINE}, 700)
    search({"colour": {LOW: 29.0, MIDDLE: 30.0, HIGH: 31.0, 2 * HIGH: 30.0}}, 2800)
    assert {record.steps: record.best["kit"] for record in load_tunings(tmp_path)} == {700: MIDDLE, 2800: HIGH}
    for steps, rate in ((700, MIDDLE), (2800, HIGH)):
        assert rates_of(suite_of(steps), tmp_path, None) == {"colour": dict.fromkeys(("kit", "local"), (rate,))}
    with pytest.raises(InputError, match="this recipe has 1400; run `kitbench tune` with the same recipe"):
        rates_of(suite_of(1400), tmp_path, None)


def test_rates_that_were_searched_with_another_recipe_or_backbone_are_refused(search: Search, tmp_path: Path) -> None:
    search({"colour": FINE}, 700)
    for change in ("recipe.batch=2", "backbone.width=24"):
        chosen = loading.load_suite("denoise", "quick", ["recipe.steps=700", change], ["kit", "local"])
        with pytest.raises(InputError, match=rf"was made with another {change.partition('=')[0]}; run `kitbench tune`"):
            rates_of(chosen, tmp_path, None)


def test_rates_that_were_searched_with_other_settings_of_a_method_are_refused(search: Search, tmp_path: Path) -> None:
    search({"colour": FINE})
    changed = loading.load_suite("denoise", "quick", ["recipe.steps=700", "methods.kit.k=2"], ["kit", "local"])
    with pytest.raises(InputError, match="has the learning rate of kit with another file or other settings"):
        rates_of(changed, tmp_path, None)
    assert rates_of(suite_of(700), tmp_path, None)


def test_no_mode_is_trained_at_the_rate_of_another_nor_left_out_in_silence(search: Search, tmp_path: Path) -> None:
    """Colour is the one mode of the embedded sets, colour and gray are those of a data folder."""
    search({"colour": FINE, "gray": {LOW: 31.0, MIDDLE: 30.0, LOW / 2: 30.5}})
    colour = dict.fromkeys(("kit", "local"), (MIDDLE,))
    assert rates_of(suite_of(700), tmp_path, None) == {"colour": colour}
    assert rates_of(suite_of(700), tmp_path, tmp_path) == {"colour": colour, "gray": dict.fromkeys(colour, (LOW,))}
    (tmp_path / tune.record_name(suite_of(700), "gray")).unlink()
    with pytest.raises(InputError, match=r"mode gray is in .* or run colour alone with --set data.modes=colour"):
        rates_of(suite_of(700), tmp_path, tmp_path)


def test_a_grid_is_not_widened_to_rates_that_no_recipe_may_have() -> None:
    assert tune.beyond((1e-3, 2e-3), [1e-3, 2e-3], 1e-6) == (5e-4, 4e-3)
    assert tune.beyond((1e-3, 2e-3), [1e-3], 8e-4) == ()
    assert tune.beyond((0.4, 0.8), [0.8], 1e-6) == ()


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    options, console = Options(tmp_path, None, "cpu", 0, None), Console(quiet=True)
    with pytest.raises(InputError, match="rates go up to 2, and a recipe's may be 1 at most"):
        tune.tune(suite_of(700), options, tune.Search(tune.rate_grid(0.5, 5), 1000), console)
    free = loading.load_suite("denoise", "quick", [], ["nlm"], (), {"nlm": "training-free"})
    with pytest.raises(InputError, match="Nothing is to be tuned"):
        tune.tune(free, options, tune.Search(RATES, 1000), console)
    seed = CliRunner().invoke(cli, ["tune", "--suite", "denoise", "--seed", str(2**31), "--dry-run"])
    assert (seed.exit_code, "0<=x<=2147483647" in seed.output) == (ExitCode.BAD_INPUT, True)  # as of a suite's seeds


def test_rates_below_the_last_of_the_schedule_are_refused(tmp_path: Path) -> None:
    search = tune.Search((1e-7, 1e-3), 1000)
    with pytest.raises(InputError, match="1e-07 of --rates is below recipe.lr_min"):
        tune.tune(suite_of(700), Options(tmp_path, None, "cpu", 0, None), search, Console(quiet=True))


def test_a_record_under_another_name_is_found_by_what_it_says(search: Search, tmp_path: Path) -> None:
    search({"colour": FINE}, 700)
    [file] = tmp_path.glob("tuning*.json")
    file.rename(tmp_path / "tuning-denoise-quick-colour.json")  # as earlier versions called it
    assert rates_of(suite_of(700), tmp_path, None)["colour"]["kit"] == (MIDDLE,)


def load_tunings(out: Path) -> list[Tuning]:
    return [read_record(Tuning, path) for path in sorted(out.glob("tuning*.json"))]


def test_a_best_rate_at_the_edge_of_the_last_grid_is_said(search: Search) -> None:
    rising = {LOW * 2**n: 29.0 + n for n in range(6)}
    [record] = search({"colour": rising})
    assert record.rates[-1] == record.best["kit"] == 8 * HIGH
    assert "a rate beyond the grid may be better for kit, local" in tuning_caption(record)
    [inside] = search({"colour": FINE})
    assert "beyond" not in tuning_caption(inside)


def test_a_search_of_fewer_methods_does_not_drop_the_rates_of_the_others(search: Search, tmp_path: Path) -> None:
    search({"colour": FINE, "gray": FINE})
    path = tmp_path / tune.record_name(suite_of(700), "colour")
    stored = path.read_bytes()
    fewer = loading.load_suite("denoise", "quick", ["recipe.steps=700"], ["kit", "window"])
    options = Options(tmp_path, tmp_path, "cpu", 0, None)
    with pytest.raises(InputError, match=r"has a rate of local too.*--method kit,local,window"):
        tune.tune(fewer, options, tune.Search(RATES, 1000), Console(quiet=True))
    assert path.read_bytes() == stored


def test_a_search_of_fewer_rates_or_with_another_seed_does_not_replace_the_stored_one(
    search: Search, tmp_path: Path
) -> None:
    search({"colour": FINE})
    path = tmp_path / tune.record_name(suite_of(700), "colour")
    stored = path.read_bytes()
    options = Options(tmp_path, tmp_path, "cpu", 0, None)
    with pytest.raises(InputError, match=r"rates 0\.001, 0\.004 too.*--rates 0\.001,0\.002,0\.003,0\.004 \("):
        tune.tune(suite_of(700), options, tune.Search((MIDDLE, 3e-3), 1000), Console(quiet=True))
    with pytest.raises(InputError, match="is a search with seed 1000, which one with seed 7 would replace"):
        tune.tune(suite_of(700), options, tune.Search(RATES, 7), Console(quiet=True))
    assert path.read_bytes() == stored


def test_the_grid_that_was_widened_can_be_searched_again(search: Search) -> None:
    scores = {"colour": {LOW: 31.0, MIDDLE: 30.0, HIGH: 29.0, LOW / 2: 30.5}}
    assert search(scores) == search(scores)


def test_runs_of_the_search_s_own_seed_are_not_compared_at_its_rates(search: Search, tmp_path: Path) -> None:
    search({"colour": FINE})
    chosen = suite_of(700).model_copy(update={"seeds": (0, 1000)})
    with pytest.raises(InputError, match="chose the rates by runs of seed 1000, .* give other --seeds"):
        rates_of(chosen, tmp_path, None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("run", "--suite", "denoise", "--tuned", "--set", "recipe.lr=1e-3"), "recipe.lr of --set would not be used"),
        (("run", "--suite", "denoise", "--seeds", ""), "--seeds takes whole numbers like 0,1,2; found ''"),
        (("tune", "--suite", "denoise", "--rates", ""), "--rates takes two or more learning rates in (0, 1]"),
    ],
)
def test_an_option_that_says_nothing_or_is_not_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, [*arguments, "--dry-run"])
    assert done.exit_code == ExitCode.BAD_INPUT
    assert expected in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_search_of_which_nothing_ended_is_not_to_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(chosen: Suite, options: Options, console: Console) -> tuple[list[Any], list[str]]:
        return [], ["denoise-colour-kit-s1000: training diverged: loss nan at step 9; stopped"]

    monkeypatch.setattr(tune, "run_suite", nothing)
    done = CliRunner().invoke(cli, ["tune", "--suite", "denoise", "--method", "kit", "--out", str(tmp_path)])
    assert done.exit_code == ExitCode.RUN_FAILED
    assert done.stderr.strip() == "kitbench: every trial of kit diverged in mode colour; give lower --rates"


def test_the_commands_plan_search_and_use_what_they_found(kitbench: Kitbench, tmp_path: Path) -> None:
    for folder, photograph in (("tested", photographs.astronaut()), ("validated", photographs.chelsea())):
        (tmp_path / folder).mkdir()
        Image.fromarray(photograph[100:164, 200:264]).save(tmp_path / folder / "a.png")
    # The mode has a protocol of its own, as the gray images of `deblur` have.
    sets = 'test = ["./tested/"], validation = ["./validated/"], protocol = "awgn8-seed0"'
    (tmp_path / "tiny.toml").write_text(TINY.replace('test = ["skimage-test"]', sets))
    recipe = ("--suite", "tiny.toml", "--method", "conv", "--set", "recipe.steps=3")
    search = ("tune", *recipe, "--rates", "1e-3,2e-3")
    planned = kitbench(*search, "--dry-run").stdout
    assert "2 trials to be run" in planned
    assert re.findall(r"learning rate (\S+) +colour/conv/1000", planned) == ["0.001", "0.002"]
    assert not (tmp_path / "results").exists()
    found = kitbench(*search).stdout
    assert len(set(re.findall(r"\[\d/2\] colour conv seed 1000 lr 0\.00[12] ", found))) == 2  # both at a time
    path = tmp_path / "results" / "tuning-tiny-only-colour-3.json"
    record = read_record(Tuning, path)
    assert record.widened  # the best of two rates is at an edge
    assert {f"{rate:g}" for rate in record.rates} <= set(found.split())
    assert max(record.trials, key=lambda trial: (trial.psnr_db or 0, -trial.lr)).lr == record.best["conv"]
    assert "all trials are stored" in kitbench(*search, "--dry-run").stdout
    shown = kitbench("status", "results").stdout  # which holds the trials alone
    assert len(re.findall(r"denoise-colour-conv-s1000-\w{10} lr 0\.00", shown)) == len(record.rates), shown
    kitbench("run", *recipe, "--tuned")
    assert rates_in(tmp_path / "results") == {"conv": record.best["conv"]}


def test_methods_with_other_best_rates_are_trained_side_by_side(kitbench: Kitbench, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    suite = loading.load_suite(str(tmp_path / "tiny.toml"), overrides=["recipe.steps=3"])
    best = {"conv": 1e-3, "kit": 2e-3}
    trials = [
        Trial(method=method, lr=lr, psnr_db=20 + (lr == best[method]), key="")
        for method in best
        for lr in best.values()
    ]
    record = Tuning(
        suite="tiny", preset="only", mode="colour", steps=3, seed=1000, lr=suite.recipe.lr, rates=(1e-3, 2e-3),
        widened=False, validation="none", trials=tuple(trials), best=best,
    )  # fmt: skip
    (tmp_path / "results").mkdir()
    RunFolder(tmp_path / "results").write("tuning.json", record)
    recipe = ("--suite", "tiny.toml", "--set", "recipe.steps=3", "--tuned")
    planned = kitbench("run", *recipe, "--dry-run").stdout
    assert "3 cells to be run" in planned
    kitbench("run", *recipe, "--only", "colour/kit/0")
    assert rates_in(tmp_path / "results") == {"kit": 2e-3}
    said = kitbench("run", *recipe, "--jobs", "2").stdout
    assert "colour conv seed 0 lr 0.001" in said
    assert rates_in(tmp_path / "results") == best


def test_a_rate_of_its_own_gives_a_cell_the_key_of_the_recipe_with_that_rate() -> None:
    def cell(suite: Suite, lr: float | None = None) -> Cell:
        return Cell(suite, "colour", "kit", "kit", None, {}, 1000, "cpu", "00", lr=lr)

    suite = suite_of(700)
    usual = suite.recipe.lr
    assert cell(suite, usual).key == cell(suite).key
    changed = suite.model_copy(update={"recipe": suite.recipe.model_copy(update={"lr": LOW})})
    assert cell(suite, LOW).key == cell(changed).key != cell(suite).key
    assert Planned.of(cell(suite, LOW)).name == "denoise-colour-kit-s1000 lr 0.001"
    assert Planned.of(cell(suite)).name == "denoise-colour-kit-s1000"


def test_a_mode_without_a_searched_rate_is_refused() -> None:
    rates: Rates = {"colour": {"kit": (LOW,), "local": (HIGH,)}}
    assert [(cell.label, cell.lr) for cell in axes(suite_of(700), ["colour"], rates) if cell.seed == 0] == [
        ("colour/kit/0", LOW), ("colour/local/0", HIGH)
    ]  # fmt: skip
    with pytest.raises(InputError, match="No learning rate of kit in mode gray was searched; run `kitbench tune`"):
        axes(suite_of(700), ["colour", "gray"], rates)


def test_a_failed_trial_is_named_with_its_rate(tmp_path: Path) -> None:
    (tmp_path / "origin.json").touch()  # of an imported run, in which nothing is noted
    prepared: Any = SimpleNamespace(folder=lambda cell: SimpleNamespace(path=tmp_path))
    cell = Cell(suite_of(700), "colour", "kit", "kit", None, {}, 1000, "cpu", "00", lr=HIGH)
    sentence = record_failure(prepared, cell, RunError("training diverged"))
    assert sentence == f"{cell.folder} (learning rate 0.004): training diverged"


def rates_in(out: Path) -> dict[str, float]:
    """By method, the learning rate of its only stored run."""
    runs = [folder.run for folder in find([out]) if folder.run.recipe is not None]
    assert len({run.method for run in runs}) == len(runs)
    return {run.method: run.recipe.lr for run in runs if run.recipe is not None}


@pytest.mark.parametrize("name", suite_names())
def test_the_validation_images_of_a_shipped_suite_will_do_for_its_trials(tmp_path: Path, name: str) -> None:
    """They are clean photographs, which the model of the suite's own task degrades."""
    (tmp_path / "BSDS500").mkdir()
    suite = loading.load_suite(name)
    sets = tune._source(suite, Options(tmp_path, tmp_path, "cpu", 0, None))
    names, _ = choose_sets(tune.trial_suite(suite, sets, 1000), tmp_path)
    assert {mode: chosen.test for mode, chosen in names.items()} == {mode: own.validation for mode, own in sets.items()}
