"""benchmarks/error_rates.py: its worlds have the spreads they state, and the stored figures reach the aims."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.error_rates import METHODS, UNEQUAL, World, limit, rates_of, worlds
from tests.conftest import ROOT

STORED = json.loads((ROOT / "benchmarks" / "error_rates.json").read_text())


@pytest.mark.parametrize("tails", ["normal", "heavy", "skewed"])
def test_a_world_has_the_means_and_spreads_that_it_states(tails) -> None:
    world = World("", 10, 40, 0.1, 0.2, 0.05, UNEQUAL, UNEQUAL[::-1], tails)
    truth = np.arange(len(METHODS)) / 10
    scores = world.scores(np.random.default_rng(0), 400, truth)
    assert scores.shape == (400, len(METHODS), 10, 40)
    np.testing.assert_allclose(scores.mean((0, 2, 3)), truth, atol=0.03)
    for effect, sd, axis in ((0.1, UNEQUAL, 2), (0.2, UNEQUAL[::-1], 3)):
        rest = 0.05 / np.sqrt(scores.shape[5 - axis])
        expected = np.sqrt((effect * np.array(sd)) ** 2 + rest**2)
        found = scores.mean(5 - axis).std(2, ddof=1)
        np.testing.assert_allclose(np.sqrt((found**2).mean(0)), expected, rtol=0.15)


def test_a_small_simulation_keeps_the_aims_and_a_large_difference_is_found() -> None:
    rates = rates_of(World("", 10, 12, of_seed=0.02, of_image=0.05, of_rest=0.02), 400)
    assert rates["false_marks"] <= limit(400)
    assert rates["false_claims"] <= limit(400)
    assert rates["cover"] >= 0.94
    assert rates["power_table"] == sorted(rates["power_table"])
    assert rates["power_table"][-1] > 0.9
    assert rates["power_claims"][-1] > 0.9


def test_the_stored_figures_are_of_these_worlds_and_reach_the_aims() -> None:
    found = [
        World(**{k: tuple(v) if isinstance(v, list) else v for k, v in w["world"].items()}) for w in STORED["worlds"]
    ]
    assert found == list(worlds())
    assert STORED["repeats"] >= 4000
    for world, stored in zip(found, STORED["worlds"], strict=True):
        rates = stored["rates"]
        assert rates["cover"] >= 0.94, world
        if not world.known_limit:
            assert max(rates["false_marks"], rates["false_claims"]) <= limit(STORED["repeats"]), world


def test_the_worlds_hold_those_that_were_asked_for() -> None:
    aimed = [world for world in worlds() if not world.known_limit]
    assert World("stored runs", 3, 68, 0.108, 0.117, 0.085) == aimed[0]
    assert {0.05, 0.2} <= {world.of_seed for world in aimed}
    assert {3, 5, 10} <= {world.seeds for world in aimed}
    assert {2, 100} <= {world.images for world in aimed}
    assert all(max(w.seed_spreads) >= 3 * w.seed_spreads[0] for w in aimed if w.name.startswith("unequal"))
    assert replace(aimed[0], tails="heavy") not in aimed  # equality sees the tails


def test_the_command_prints_the_stored_table() -> None:
    script = ROOT / "benchmarks" / "error_rates.py"
    done = subprocess.run([sys.executable, script, "--markdown"], capture_output=True, text=True, check=True)
    assert "| stored runs " in done.stdout
    assert "aimed at: at most 5 %" in done.stdout
