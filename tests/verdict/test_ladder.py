"""Budget ladders: differences at several lengths of training, and whether an order lasts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kitbench.spec import loading
from kitbench.store.folder import find
from kitbench.verdict.compare import Compared
from kitbench.verdict.contrasts import blocks
from kitbench.verdict.entries import entries
from kitbench.verdict.ladder import Budget, Ladder, LadderLine, Rung, ladder_sheet, ladders
from kitbench.verdict.statistics import difference
from tests.stored import store

QUICK = loading.load_suite("denoise", "quick")
T2, T5 = 4.302652729911275, 2.570581835636314
"""Student's two-sided 95 % quantiles with 2 and 5 degrees of freedom."""
SEED_SD, IMAGE_SD = 0.02, 0.01
HALF = math.sqrt(T2**2 * SEED_SD**2 / 3 + T5**2 * IMAGE_SD**2 / 5)
"""Of differences gain + u + v: u is -0.02, 0 and 0.02 dB over three seeds, v is +-0.01 dB over six images."""


def rung(out: Path, steps: int, gains: dict[str, float], **stored) -> Path:
    """Methods that differ from conv by known decibels on six images and three seeds."""
    image = IMAGE_SD * np.array([1, -1, 1, -1, 1, -1])
    for seed, effect in enumerate((-SEED_SD, 0, SEED_SD)):
        store(out, "conv", np.linspace(28, 33, 6), seed, steps=steps, **({"of": QUICK} | stored))
        for method, gain in gains.items():
            psnr = np.linspace(28, 33, 6) + gain + effect + image
            store(out, method, psnr, seed, steps=steps, **({"of": QUICK} | stored))
    return out


def found(out: Path) -> list[Ladder]:
    return ladders(blocks(entries(find([out]), None)))


def test_a_ladder_holds_the_difference_and_its_interval_at_every_budget(tmp_path: Path) -> None:
    gains = {700: -0.5, 3000: 0.1, 12000: 0.7}
    for steps, gain in gains.items():
        rung(tmp_path, steps, {"kit": gain})
    [ladder] = found(tmp_path)
    assert [budget.steps for budget in ladder.budgets] == [700, 3000, 12000]
    [line] = ladder.lines
    assert (line.a, line.b) == ("kit", "conv")
    for one in line.rungs:
        interval = one.compared.found.interval
        assert interval is not None
        assert one.compared.found.mean == pytest.approx(gains[one.budget.steps])
        assert interval.high - interval.low == pytest.approx(2 * HALF)
    assert ladder_sheet(ladder).lines[0][:2] == ("kit - conv", f"-0.500 [{-0.5 - HALF:+.3f}, {-0.5 + HALF:+.3f}]")
    assert line.order == "the order changes with the budget"


def test_a_ladder_asks_the_claims_contrasts_and_every_method_against_conv(tmp_path: Path) -> None:
    for steps in (700, 3000):
        rung(tmp_path, steps, {"kit": 0.3, "local": 0.2, "window": 0.1, "san": 0.05})
    [ladder] = found(tmp_path)
    pairs = [(line.a, line.b) for line in ladder.lines]
    assert set(pairs) == {
        ("kit", "local"), ("kit", "window"), ("kit", "conv"), ("local", "conv"), ("window", "conv"), ("san", "conv")
    }  # fmt: skip
    assert len(pairs) == len(set(pairs))
    p = [one.compared.p_holm for line in ladder.lines for one in line.rungs]
    raw = [one.compared.found.p for line in ladder.lines for one in line.rungs]
    assert raw.count(None) == 4  # kit - local and kit - window differ by a constant, which has no spread
    least = min(value for value in raw if value is not None)
    assert min(value for value in p if value is not None) == pytest.approx(8 * least)  # Holm's first step


@pytest.mark.parametrize("other", [{"lr": 2e-3}, {"of": loading.load_suite("denoise", "quick", ["recipe.batch=2"])}])
def test_only_runs_that_differ_in_the_budget_alone_make_a_ladder(tmp_path: Path, other: dict) -> None:
    rung(tmp_path, 700, {"kit": 0.1})
    rung(tmp_path, 3000, {"kit": 0.1}, **other)
    assert found(tmp_path) == []


def test_warm_up_belongs_to_the_budget(tmp_path: Path) -> None:
    longer = loading.load_suite("denoise", "quick", ["recipe.warmup=90"])
    rung(tmp_path, 700, {"kit": 0.1})
    rung(tmp_path, 3000, {"kit": 0.1}, of=longer)
    [ladder] = found(tmp_path)
    assert ladder.budgets == [Budget(700, QUICK.recipe.warmup, 0), Budget(3000, 90, 0)]
    assert ladder_sheet(ladder).header == ("Difference, dB", "700 steps", "3,000 steps", "Order")
    rung(tmp_path, 700, {"kit": 0.1}, of=longer)
    header = ladder_sheet(found(tmp_path)[0]).header
    assert header[1:3] == (f"700 steps, {QUICK.recipe.warmup} of warm-up", "700 steps, 90 of warm-up")


def test_the_window_of_averaged_weights_belongs_to_the_budget_and_is_stated(tmp_path: Path) -> None:
    rung(tmp_path, 700, {"kit": 0.1}, of=loading.load_suite("denoise", "quick", ["recipe.ema=0.97"]))
    rung(tmp_path, 3000, {"kit": 0.1}, of=loading.load_suite("denoise", "quick", ["recipe.ema=0.992"]))
    sheet = ladder_sheet(found(tmp_path)[0])
    assert sheet.header == ("Difference, dB", "700 steps", "3,000 steps", "Order")
    said = "Weights are averaged over a window that goes with the length: ema 0.97 at 700 steps, 0.992 at 3,000 steps."
    assert said in sheet.notes
    rung(tmp_path, 700, {"kit": 0.1})
    header = ladder_sheet(found(tmp_path)[0]).header
    assert header == ("Difference, dB", "700 steps, ema 0", "700 steps, ema 0.97", "3,000 steps", "Order")


def test_a_method_of_one_budget_has_no_line(tmp_path: Path) -> None:
    rung(tmp_path, 700, {"kit": 0.1})
    rung(tmp_path, 3000, {"kit": 0.1, "window": 0.2})
    assert [(line.a, line.b) for line in found(tmp_path)[0].lines] == [("kit", "conv")]


def line(signs: Sequence[int | None]) -> LadderLine:
    """kit - conv at 700, 3000, ... steps: +1 and -1 decided, 0 not, None where nothing can be decided."""
    rungs = []
    for steps, sign in zip((700, 3000, 12000), signs, strict=False):
        d = difference(np.full((2, 6), 0.1 if sign is None else sign or 0.1))
        p = None if sign is None else 0.001 if sign else 0.4
        rungs.append(Rung(Budget(steps, 0, 0), Compared("kit", "conv", d, (), p)))
    return LadderLine("kit", "conv", tuple(rungs))


@pytest.mark.parametrize(
    ("signs", "words"),
    [
        ((1, 1, 1), "holds: kit is better at every budget"),
        ((-1, -1), "holds: conv is better at every budget"),
        ((0, 0), "no order shown at any budget"),
        ((-1, 0, 1), "the order changes with the budget"),
        ((1, -1, 0), "the order changes with the budget"),
        ((1, 1, 0), "does not last: kit is better at 700 and 3,000 steps, at the others no difference is shown"),
        ((-1, 0), "does not last: conv is better at 700 steps, at the others no difference is shown"),
        ((0, 0, 1), "kit is better at 12,000 steps, at the others no difference is shown"),
        ((0, -1), "conv is better at 3,000 steps, at the others no difference is shown"),
        ((1, None, 1), "not decided"),
    ],
)
def test_the_order_in_words(signs: Sequence[int | None], words: str) -> None:
    assert line(signs).order == words


def test_why_nothing_is_decided_is_stated(tmp_path: Path) -> None:
    for steps in (700, 3000):
        for method in ("kit", "conv"):
            store(tmp_path, method, np.linspace(28, 33, 6), steps=steps, of=QUICK)
    [ladder] = found(tmp_path)
    sheet = ladder_sheet(ladder)
    assert sheet.lines == (("kit - conv", "+0.000", "+0.000", "not decided"),)
    assert "Not decided: one seed: no interval." in sheet.notes
    assert sheet.notes[0] == "Mean over the test images that all budgets have; 1 seed, 6 images."


def test_a_set_that_one_budget_alone_has_moves_no_difference(tmp_path: Path) -> None:
    for steps in (700, 3000):
        rung(tmp_path, steps, {"kit": 0.5})
    rung(tmp_path, 3000, {"kit": -2.0}, data_set="Set_B")
    [ladder] = found(tmp_path)
    [line] = ladder.lines
    assert [one.compared.found.mean for one in line.rungs] == pytest.approx([0.5, 0.5])
    assert line.order == "holds: kit is better at every budget"
    assert "test images that all budgets have" in ladder_sheet(ladder).notes[0]
    rung(tmp_path, 12000, {"kit": 0.5}, data_set="Set_C")
    [ladder] = found(tmp_path)
    assert [budget.steps for budget in ladder.budgets] == [700, 3000]


def test_a_set_of_too_few_seeds_at_one_budget_is_left_out_at_all_and_named(tmp_path: Path) -> None:
    for steps in (700, 3000):
        rung(tmp_path, steps, {"kit": 0.5})
    rung(tmp_path, 3000, {"kit": -2.0}, data_set="Set_B")
    for method in ("conv", "kit"):
        store(tmp_path, method, np.linspace(28, 33, 6), 0, steps=700, of=QUICK, data_set="Set_B")
    [ladder] = found(tmp_path)
    [line] = ladder.lines
    assert [one.compared.found.mean for one in line.rungs] == pytest.approx([0.5, 0.5])
    assert (
        "kit - conv: without Set_B σ25, which fewer than 3 of these seeds were scored on." in ladder_sheet(ladder).notes
    )
