"""What decides a contrast: setups that agree, variants and trials left out, the correction of a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kitbench.spec import loading
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Tuning, shared_with_search
from kitbench.verdict.claims import in_words
from kitbench.verdict.compare import Compared
from kitbench.verdict.contrasts import ONE, OWN, UNDECIDED, Setup, combined, decide, decide_contrasts, select
from kitbench.verdict.entries import Entry, entries, labels
from kitbench.verdict.proposals import contrast_command
from kitbench.verdict.searches import NONE_SEARCHED, Searches
from tests.conftest import Kitbench
from tests.stored import store

QUICK = loading.load_suite("denoise", "quick")
LR, BEST = 5e-3, 1e-2
"""The recipe's rate, and that of every method in `tuned`."""
ONE_SHORT, ONE_LONG, OWN_SHORT, OWN_LONG = (Setup(c, n) for c in (ONE, OWN) for n in (700, 3000))


@pytest.mark.parametrize(
    ("signs", "verdict", "reason"),
    [
        ({ONE_SHORT: 1, ONE_LONG: 1, OWN_SHORT: 1, OWN_LONG: 1}, "supported", ""),
        ({ONE_SHORT: -1, ONE_LONG: -1, OWN_SHORT: -1, OWN_LONG: -1}, "not supported", ""),
        ({ONE_SHORT: 1, ONE_LONG: 1, OWN_SHORT: -1, OWN_LONG: -1}, "depends on the learning rate", ""),
        ({ONE_SHORT: 1, ONE_LONG: -1, OWN_SHORT: 1, OWN_LONG: -1}, UNDECIDED, "the order changes with the length"),
        ({ONE_SHORT: 1, ONE_LONG: 1, OWN_SHORT: 1, OWN_LONG: -1}, UNDECIDED, "the order changes with the length"),
        (
            {ONE_SHORT: 1, ONE_LONG: 1, OWN_SHORT: 1, OWN_LONG: 0},
            UNDECIDED,
            "no difference is shown by each at its own",
        ),
        (
            {ONE_SHORT: 1, ONE_LONG: 1, OWN_SHORT: -1, OWN_LONG: 0},
            UNDECIDED,
            "no difference is shown by each at its own",
        ),
        ({ONE_SHORT: 1, ONE_LONG: 1}, UNDECIDED, "only one recipe was compared (run `kitbench tune`)"),
        ({ONE_LONG: 1, OWN_LONG: 1}, UNDECIDED, "only one length of training was run"),
        ({ONE_LONG: 1}, UNDECIDED, "only one recipe was compared (run `kitbench tune`) and only one length"),
        ({ONE_SHORT: 1, ONE_LONG: 1, OWN_SHORT: 1}, UNDECIDED, "no runs of each at its own best rate, 3,000 steps"),
        ({ONE_SHORT: 0, ONE_LONG: 0}, UNDECIDED, "only one recipe was compared"),
    ],
)
def test_a_verdict_needs_every_setup_and_one_sign(signs, verdict, reason) -> None:
    found, why = decide(signs)
    assert found == verdict
    assert why.startswith(reason)
    assert bool(why) == (verdict == UNDECIDED)


def test_a_statement_is_as_good_as_its_worst_part() -> None:
    assert combined(["supported", "supported"]) == "supported"
    assert combined(["supported", UNDECIDED]) == UNDECIDED
    assert combined(["supported", UNDECIDED, "depends on the learning rate"]) == "depends on the learning rate"
    assert combined([UNDECIDED, "depends on the learning rate", "not supported"]) == "not supported"


def runs(out: Path, gains: dict[str, float], seeds=range(5), steps: int = 700, lr: float = LR, **stored) -> Path:
    """Methods that differ by known decibels on 12 images, with a spread of 0.02 dB."""
    for number, (method, gain) in enumerate(gains.items()):
        for seed in seeds:
            noise = 0.02 * np.random.default_rng((seed, number, steps)).standard_normal(12)
            psnr = 30 + np.linspace(-3, 3, 12) + gain + noise
            store(out, method, psnr, seed, steps=steps, lr=lr, **({"of": QUICK} | stored))
    return out


def tuned(out: Path, gains: dict[str, float], steps: int = 700, best: float = BEST) -> Path:
    """Runs at a best rate, and the record of the search that found it, whose trials are stored runs too."""
    runs(out, gains, steps=steps, lr=best)
    trials = []
    for method in gains:
        for lr, psnr in ((LR, 20.0), (BEST, 20.0), (best, 21.0)):
            if (method, lr) not in {(trial["method"], trial["lr"]) for trial in trials} or psnr == 21.0:
                trials = [trial for trial in trials if (trial["method"], trial["lr"]) != (method, lr)]
                folder = store(out, method, psnr, 99, steps=steps, lr=lr, of=QUICK, data_set="validation")
                trials.append({"method": method, "lr": lr, "psnr_db": psnr, "key": folder.run.key})
    record = Tuning(
        suite="denoise", preset="quick", mode="colour", steps=steps, seed=99, lr=LR, rates=(LR, BEST), widened=False,
        validation="validation", trials=tuple(trials), best=dict.fromkeys(gains, best),
    )  # fmt: skip
    RunFolder(out).write(f"tuning-{steps}.json", record)
    return out


def tunings(out: Path) -> list[Tuning]:
    from kitbench.verdict.claims import load

    return list(load([out])[2].records)


def searches_in(out: Path) -> Searches:
    return Searches.read(tunings(out), find([out]))


def verdict(out: Path, a: str = "kit", b: str = "local") -> tuple[str, str]:
    chosen = select(entries(find([out]), None), searches_in(out))
    found = decide_contrasts({"it": (a, b, chosen.compare(a, b))})["it"]
    return found.verdict, found.reason


BETTER, WORSE = {"kit": 0.2, "local": 0.0}, {"kit": -0.2, "local": 0.0}


def test_two_recipes_and_two_lengths_that_agree_decide(tmp_path: Path) -> None:
    runs(tmp_path, BETTER)
    assert verdict(tmp_path) == (
        UNDECIDED,
        "only one recipe was compared (run `kitbench tune`) and only one length of training was run",
    )
    tuned(tmp_path, BETTER)
    assert verdict(tmp_path) == (UNDECIDED, "only one length of training was run")
    runs(tmp_path, BETTER, steps=3000)
    assert verdict(tmp_path)[1] == "no runs of each at its own best rate, 3,000 steps (run `kitbench tune`)"
    tuned(tmp_path, BETTER, steps=3000)
    assert verdict(tmp_path) == ("supported", "")
    assert verdict(tmp_path, "local", "kit") == ("not supported", "")
    tuned(runs(tmp_path, {"kit": 0.0, "local": 0.0}, steps=9000), BETTER, steps=9000)
    assert verdict(tmp_path) == (UNDECIDED, "no difference is shown by one recipe, 9,000 steps")  # the longest count


def test_runs_that_cannot_be_paired_are_no_setup(tmp_path: Path) -> None:
    """At 9,000 steps the methods share no seed at the recipe's own rate: another rate is the one recipe there."""
    for steps in (700, 3000):
        tuned(runs(tmp_path, BETTER, steps=steps), BETTER, steps=steps)
    tuned(tmp_path, WORSE, steps=9000)
    runs(tmp_path, {"kit": 0.0}, steps=9000, seeds=(0, 1))
    runs(tmp_path, {"local": 0.0}, steps=9000, seeds=(2, 3))
    assert verdict(tmp_path) == (UNDECIDED, "the order changes with the length of training")


def test_a_length_of_few_seeds_does_not_stand_for_the_shorter_one_where_another_has_enough(tmp_path: Path) -> None:
    for steps in (700, 9000):
        tuned(runs(tmp_path, BETTER, steps=steps), BETTER, steps=steps)
    runs(tmp_path, WORSE, seeds=(0, 1), steps=3000)
    assert verdict(tmp_path) == ("supported", "")
    runs(tmp_path, WORSE, seeds=(2,), steps=3000)
    assert verdict(tmp_path)[1] == "no runs of each at its own best rate, 3,000 steps (run `kitbench tune`)"
    runs(tmp_path, BETTER, seeds=(0,), steps=20_000)  # the longest counts, with any number of seeds
    assert "20,000 steps" in verdict(tmp_path)[1]


def test_the_reason_names_the_setup_that_lacks_seeds_and_no_other(tmp_path: Path) -> None:
    for steps, seeds in ((700, (0,)), (3000, range(5))):
        tuned(runs(tmp_path, BETTER, seeds, steps), BETTER, steps=steps)
    assert verdict(tmp_path) == (UNDECIDED, "fewer than 3 seeds were run of one recipe, 700 steps")


def test_a_set_that_one_seed_was_scored_on_takes_no_seed_from_the_others_and_is_named(tmp_path: Path) -> None:
    """As `kitbench eval --run` leaves it: with that set, the contrast would have one seed, and decide nothing."""
    runs(tmp_path, BETTER)
    runs(tmp_path, WORSE, seeds=(0,), data_set="Set_B")
    [compared] = select(entries(find([tmp_path]), None), NONE_SEARCHED).compare("kit", "local").values()
    assert (compared.found.seeds, compared.found.images) == (5, 12)
    assert "12 images" in in_words(compared)
    assert "; without Set_B σ25, which fewer than 3 of these seeds were scored on" in in_words(compared)
    runs(tmp_path, WORSE, seeds=(1, 2), data_set="Set_B")
    [compared] = select(entries(find([tmp_path]), None), NONE_SEARCHED).compare("kit", "local").values()
    assert (compared.found.seeds, compared.found.images, compared.without) == (3, 24, "")


def test_two_seeds_decide_nothing_however_much_they_agree(tmp_path: Path) -> None:
    """Two of the five seeds of a stored contrast, the first, had the largest differences: with them it was decided."""
    for steps, seeds in ((700, (0, 1)), (3000, range(5))):
        tuned(runs(tmp_path, BETTER, seeds, steps), BETTER, steps=steps)
    chosen = select(entries(find([tmp_path]), None), searches_in(tmp_path))
    contrast = decide_contrasts({"it": ("kit", "local", chosen.compare("kit", "local"))})["it"]
    assert all(compared.decided for compared in contrast.setups.values())
    assert (contrast.verdict, contrast.reason) == (UNDECIDED, "fewer than 3 seeds were run of one recipe, 700 steps")
    assert "--seeds 0,1,2,3,4 " in contrast_command(contrast, chosen)


def test_another_sign_at_the_best_rates_depends_on_the_learning_rate(tmp_path: Path) -> None:
    for steps in (700, 3000):
        tuned(runs(tmp_path, BETTER, steps=steps), WORSE, steps=steps)
    assert verdict(tmp_path) == ("depends on the learning rate", "")


def test_a_best_rate_that_is_the_recipes_own_needs_no_further_runs(tmp_path: Path) -> None:
    for steps in (700, 3000):
        tuned(tmp_path, BETTER, steps=steps, best=LR)
    assert verdict(tmp_path) == ("supported", "")


def test_a_search_with_another_recipe_is_no_search_for_these_runs(tmp_path: Path) -> None:
    """The rates are those that the runs have; only what was searched differs."""
    for steps in (700, 3000):
        tuned(runs(tmp_path, BETTER, steps=steps), BETTER, steps=steps)
    found, records = entries(find([tmp_path]), None), tunings(tmp_path)
    for batch, setups in ((QUICK.recipe.batch, 4), (2, 2)):
        searched = [
            record.model_copy(update={"shared": shared_with_search(own | {"recipe": own["recipe"] | {"batch": batch}})})
            for record in records
            for own in [_identity(found, record.steps)]
        ]
        assert len(select(found, Searches.read(searched, find([tmp_path]))).compare("kit", "local")) == setups


@pytest.mark.parametrize(
    ("methods", "suite"),
    [(("kit", "kit-k1"), "ablate"), (("kit", "window"), "denoise"), (("kit", "kit-random"), "denoise")],
)
def test_the_next_step_is_in_a_suite_that_names_both_methods(tmp_path: Path, methods, suite) -> None:
    runs(tmp_path, {"kit": 0.1, "window": 0.0, "kit-random": 0.0})
    runs(
        tmp_path,
        {"kit-k1": 0.0},
        attention="kit",
        settings={"k": 1, "patch": 4},
        of=loading.load_suite("ablate", "quick"),
    )
    chosen = select(entries(find([tmp_path]), None), NONE_SEARCHED)
    found = decide_contrasts({"it": (*methods, chosen.compare(*methods))})["it"]
    command = contrast_command(found, chosen)
    assert f"tune --suite {suite} --preset quick" in command
    assert all(f"--method {method}" in command for method in methods)


def _identity(found: list[Entry], steps: int) -> dict[str, Any]:
    """Of any run of this length."""
    return next(e.run.identity for e in found if e.run.identity["recipe"]["steps"] == steps)


def test_trials_of_the_search_are_not_compared(tmp_path: Path) -> None:
    tuned(runs(tmp_path, BETTER), BETTER)
    chosen = select(entries(find([tmp_path]), None), searches_in(tmp_path))
    seeds = {e.run.seed for b in chosen.blocks for of in b.methods.values() for group in of.values() for e in group}
    columns = {column for b in chosen.blocks for of in b.methods.values() for column in of}
    assert seeds == set(range(5))
    assert columns == {("Set_A", "σ25")}


def test_scores_on_any_validation_set_of_a_search_are_not_compared(tmp_path: Path) -> None:
    runs(tmp_path, BETTER)
    runs(tmp_path, BETTER, data_set="Set_B")
    [record] = tunings(tuned(tmp_path, BETTER))
    for sets, compared in (("validation", {"Set_A", "Set_B"}), ("validation, Set_B", {"Set_A"})):
        chosen = select(
            entries(find([tmp_path]), None), Searches.read([record.model_copy(update={"validation": sets})], [])
        )
        assert {column[0] for b in chosen.blocks for of in b.methods.values() for column in of} == compared


def test_variants_are_left_out_and_named(tmp_path: Path) -> None:
    runs(tmp_path, BETTER, settings={"k": 4})
    runs(tmp_path, {"kit": -1.0}, settings={"k": 8}, changed=["k"])
    chosen = select(entries(find([tmp_path]), None), NONE_SEARCHED)
    assert chosen.left_out == ("kit (k 8)",)
    [compared] = chosen.compare("kit", "local").values()
    assert compared.found.mean == pytest.approx(0.2, abs=0.03)


def test_the_record_says_which_settings_the_command_changed(kitbench: Kitbench, tmp_path: Path) -> None:
    setting = "methods.kit.patch"
    for value in ("4", "2"):  # the suite's own and another one
        kitbench("run", "--suite", "tiny.toml", "--method", "kit", "--set", f"{setting}={value}", "--out", "out")
    changed = {
        folder.run.settings["patch"]: folder.run.changed for folder in find([tmp_path / "out"]) if folder.trained
    }
    assert changed == {4: (), 2: ("patch",)}


def test_a_variant_alone_does_not_stand_for_its_method(tmp_path: Path) -> None:
    runs(tmp_path, {"local": 0.0})
    runs(tmp_path, {"kit": 1.0}, settings={"k": 8}, changed=["k"])
    chosen = select(entries(find([tmp_path]), None), NONE_SEARCHED)
    assert chosen.left_out == ("kit (k 8)",)
    assert chosen.compare("kit", "local") == {}


def test_a_file_with_a_shipped_name_is_another_method(tmp_path: Path) -> None:
    runs(tmp_path, {"local": 0.0})
    runs(tmp_path, {"kit": 1.0}, attention="ab" * 32)
    chosen = select(entries(find([tmp_path]), None), NONE_SEARCHED)
    assert list(chosen.blocks[0].methods) == ["kit (file abababab)", "local"]
    assert chosen.compare("kit", "local") == {}


@pytest.mark.parametrize("name", ["san", "neighbourhood", "kit-exact", "global"])
def test_no_file_passes_for_a_shipped_method_that_its_suite_does_not_name(tmp_path: Path, name: str) -> None:
    runs(tmp_path, {name: 1.0, "mine": 1.0}, attention="ab" * 32)
    found = entries(find([tmp_path]), None)
    assert set(labels(found).values()) == {f"{name} (file abababab)", "mine"}


def test_smoke_runs_decide_nothing(tmp_path: Path) -> None:
    runs(tmp_path, BETTER, of=loading.load_suite("denoise", "smoke"))
    chosen = select(entries(find([tmp_path]), None), NONE_SEARCHED)
    assert chosen.smoke
    assert chosen.blocks == ()


def test_a_contrast_is_corrected_for_the_others_of_the_page(tmp_path: Path) -> None:
    runs(tmp_path, {"kit": 0.2, "local": 0.0, "window": 0.2, "global": 0.2, "conv": 0.2})
    chosen = select(entries(find([tmp_path]), None), NONE_SEARCHED)
    asked = {b: ("kit", b, chosen.compare("kit", b)) for b in ("local", "window", "global", "conv")}
    found = decide_contrasts(asked | {"nothing": ("kit", "missing", {})})
    [local] = found["local"].setups.values()
    assert local.p_holm == pytest.approx(4 * local.found.p)
    alone = decide_contrasts({"local": asked["local"]})["local"].setups
    assert next(iter(alone.values())).detectable < local.detectable
    assert found["nothing"].reason == "no stored runs of both kit and missing under one recipe"


def test_a_setup_without_a_difference_does_not_weaken_the_correction_of_the_others(tmp_path: Path) -> None:
    runs(tmp_path, {"kit": 0.2, "local": 0.0})
    chosen = select(entries(find([tmp_path]), None), NONE_SEARCHED)
    [measured] = chosen.compare("kit", "local").values()

    def contrast(*p: float | None) -> tuple[str, str, dict[Setup, Compared]]:
        every = [Setup(choice, steps) for choice in (ONE, OWN) for steps in (700, 24_000)]
        setups = dict(zip(every, p, strict=False))
        of = {setup: replace(measured, found=replace(measured.found, p=own)) for setup, own in setups.items()}
        return "kit", "local", of

    found = decide_contrasts(
        {"mixed": contrast(0.02, 0.9, 0.009, 0.02), "all": contrast(0.001, 0.011, 0.012, 0.005), "third": contrast(0.02),
         "clear": contrast(0.001, 0.002), "none": contrast(0.001, None)}
    )  # fmt: skip
    p = {name: [setup.p_holm for setup in one.setups.values()] for name, one in found.items()}
    assert p["mixed"] == pytest.approx([0.1, 1.0, 0.045, 0.1])  # each 5 times, at most what all of them have
    assert (
        "no difference is shown by each at its own best rate, 24,000 steps and one recipe, 700" in found["mixed"].reason
    )
    assert "each at its own best rate, 700 steps" not in found["mixed"].reason
    assert found["all"].p_holm == pytest.approx(4 * 0.012)
    assert found["all"].verdict == "supported"
    assert found["third"].p_holm == pytest.approx(3 * 0.02)
    assert found["clear"].p_holm == pytest.approx(5 * 0.002)  # one that has no p value counts too
    assert (found["none"].p_holm, found["none"].family, p["none"]) == (None, 5, [None, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": {"kit": LR}}, "not that of its trial with the highest PSNR"),
        ({"best": {"kit": 3.0}}, "must be that of a trial with a score"),
        ({"best": {}}, "must be that of a trial with a score"),
        ({"rates": (LR, BEST, 1.0)}, "must have one trial at each of the rates"),
        ({"rates": (BEST, LR)}, "rates must ascend"),
    ],
)
def test_a_search_whose_choice_is_not_that_of_its_trials_is_refused(change, message) -> None:
    trials = [{"method": "kit", "lr": lr, "psnr_db": psnr, "key": "0"} for lr, psnr in ((LR, 20.0), (BEST, 21.0))]
    record = {
        "suite": "denoise", "preset": "quick", "mode": "colour", "steps": 700, "seed": 99, "lr": LR, "rates": (LR, BEST),
        "widened": False, "validation": "v", "trials": trials, "best": {"kit": BEST},
    }  # fmt: skip
    assert Tuning.model_validate(record).best == {"kit": BEST}
    diverged = {**record, "trials": [trials[0], trials[1] | {"psnr_db": None}], "best": {"kit": LR}}
    assert Tuning.model_validate(diverged).best == {"kit": LR}
    with pytest.raises(ValueError, match=message):
        Tuning.model_validate(record | change)
