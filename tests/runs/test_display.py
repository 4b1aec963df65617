"""What a terminal shows of the cells that are under way."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from kitbench.runs.announce import FEWEST_WINDOWS, Expected
from kitbench.runs.cell import Cell
from kitbench.runs.display import Display, leading
from kitbench.spec.loading import recipes
from kitbench.spec.suite import Recipe
from tests.conftest import Kitbench
from tests.stored import SUITE


@pytest.mark.parametrize(("width", "whole"), [(80, False), (160, True)])
def test_the_latest_validation_and_the_steps_are_in_the_line_however_narrow_the_terminal(
    width: int, whole: bool
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    cell = Cell(SUITE, "colour", "kit-random", "kit-random", None, {}, 0, "cpu", "00")
    display = Display(console, {cell: Expected(600.0, 10.0)}, 1)
    with display.shown():
        display.advance(cell, "training", 3000, 12000, "validation 30.16 dB, training 29.87 dB, loss 0.0312")
    last = [line for line in screen.getvalue().splitlines() if "3000/12000" in line][-1]
    assert "[1/1] colour kit-random seed 0" in last
    assert "validation 30.16 dB" in last
    assert ("loss 0.0312" in last) == whole
    assert "…" not in last


def test_the_time_left_of_a_run_that_goes_on_does_not_count_the_steps_that_were_done_before() -> None:
    cell = Cell(SUITE, "colour", "conv", "conv", None, {}, 0, "cpu", "00")
    display = Display(Console(file=io.StringIO()), {cell: Expected(100.0, 0.0, saved_steps=500)}, 1)
    display._began = time.monotonic() - 10
    display.advance(cell, "training", 510, 1000, "")
    display.advance(cell, "training", 550, 1000, "")
    assert display.time_left() == "1 min 30 s"


def test_a_text_is_cut_between_its_parts() -> None:
    assert leading("one, two, three", 15) == "one, two, three"
    assert leading("one, two, three", 14) == "one, two"
    assert leading("one, two, three", 1) == "one"


def test_averaged_weights_that_lag_behind_a_short_training_are_said_to(kitbench: Kitbench) -> None:
    command = ("run", "--suite", "tiny.toml", "--method", "conv", "--set", "references=[]", "--set", "recipe.steps=6")
    said = " ".join(kitbench(*command, "--set", "recipe.ema=0.75").stdout.split())
    assert "recipe.ema 0.75 averages the weights over about the last 4 of 6 steps: they lag behind" in said
    assert "take --set recipe.ema=0 " in said
    assert "lag behind" not in kitbench(*command, "--set", "recipe.ema=0").stdout


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_no_shipped_recipe_averages_weights_that_lag(recipe: Recipe) -> None:
    assert not recipe.ema or FEWEST_WINDOWS / (1 - recipe.ema) <= recipe.steps * (1 + 1e-9)
