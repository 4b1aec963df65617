"""Statistics against simulations whose truth is known, against closed forms, and against scipy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from kitbench.verdict.statistics import (
    ALPHA,
    FEWEST_IMAGES,
    detectable,
    difference,
    half_width,
    holm,
    mean_interval,
    p_values,
    seeds_to_find,
    spread,
    to_best,
)

WORLDS = [
    (3, 24, (0.03, 0.1, 0.05)), (5, 68, (0.05, 0.1, 0.05)), (3, 12, (0.05, 0.02, 0.05)), (8, 24, (0.02, 0.15, 0.02)),
    (3, 6, (0.05, 0.07, 0.0)), (2, 24, (0.1, 0.1, 0.1)), (3, 68, (0.108, 0.117, 0.085)),
]  # fmt: skip


def simulate(truth: float, seeds: int, images: int, sd: tuple[float, float, float], tables: int = 4000) -> np.ndarray:
    """Differences [tables, seeds, images] in dB with known spread over seeds, over images, and of the rest."""
    random = np.random.default_rng(0)
    shapes = ((tables, seeds, 1), (tables, 1, images), (tables, seeds, images))
    return truth + sum(s * random.standard_normal(shape) for s, shape in zip(sd, shapes, strict=True))


@pytest.mark.parametrize(("seeds", "images", "sd"), WORLDS)
def test_the_interval_covers_and_the_test_keeps_its_level_also_in_the_tail(seeds, images, sd) -> None:
    found = spread(simulate(0.1, seeds, images, sd))
    assert (np.abs(found.mean - 0.1) <= half_width(found)).mean() >= 0.95 - 2 * 0.0035
    p = p_values(spread(simulate(0.0, seeds, images, sd)))
    for level in (0.05, 0.05 / 15):  # the second is that of all pairs of six methods
        assert (p < level).mean() <= level + 3 * math.sqrt(level / len(p))


@settings(max_examples=60, deadline=None)
@given(arrays(float, st.tuples(st.integers(2, 6), st.integers(6, 20)), elements=st.floats(-2, 2, width=32)))
def test_no_p_is_below_students_over_seeds_and_no_interval_narrower(d: np.ndarray) -> None:
    found = difference(d)
    if found.p is None:
        assert "no spread" in found.note
        return
    for values, own in ((d.mean(1), found.interval_seeds), (d.mean(0), mean_interval(d.mean(0)))):
        assert found.p >= stats.ttest_1samp(values, 0).pvalue * (1 - 1e-6)
        assert found.interval.low <= own.low + 1e-12
        assert found.interval.high >= own.high - 1e-12
    assert (found.p < ALPHA) == (found.interval.low > 0 or found.interval.high < 0)


def test_p_is_students_where_only_one_effect_is_there() -> None:
    effect = np.random.default_rng(2).normal(0.5, 1, 8)
    noise = 1e-7 * np.random.default_rng(3).standard_normal((8, 9))  # there is no p without any spread
    expected = stats.ttest_1samp(effect, 0).pvalue
    assert difference(effect[:, None] + noise).p == pytest.approx(expected, rel=1e-4)
    assert difference((effect[:, None] + noise).T).p == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("seeds", "images", "sd"), [(3, 68, (0.1, 0.05, 0.05)), (6, 30, (0.03, 0.2, 0.05))])
@pytest.mark.parametrize("comparisons", [1, 15])
def test_the_detectable_difference_is_found_in_four_cases_of_five(seeds, images, sd, comparisons) -> None:
    d = simulate(0.0, seeds, images, sd)
    found = spread(d)
    true = replace(found, of_seeds=found.of_seeds.mean(), of_images=found.of_images.mean())
    db = detectable(true, comparisons)
    assert (p_values(spread(d + db)) < ALPHA / comparisons).mean() == pytest.approx(0.8, abs=0.03)


def test_a_stricter_level_detects_less() -> None:
    found = spread(simulate(0.0, 5, 24, (0.1, 0.1, 0.1), 1)[0])
    assert detectable(found, 1) < detectable(found, 15) < detectable(found, 45)


def test_without_a_second_seed_there_is_no_interval_and_no_p() -> None:
    found = difference(np.random.default_rng(3).standard_normal((1, 24)))
    assert (found.interval, found.interval_seeds, found.p) == (None, None, None)
    assert detectable(found.spread, 1) is None
    assert found.note == "one seed: no interval"
    assert mean_interval([30.0]) is None


@pytest.mark.parametrize("d", [np.ones((3, 1)), np.zeros((3, 8)), np.full((2, 2), 0.1), np.array([[1.0, -1], [-1, 1]])])
def test_an_interval_of_zero_width_is_never_given(d) -> None:
    found = difference(d)
    assert found.interval is None
    assert found.interval_seeds is None
    assert "no interval" in found.note


def test_too_few_images_decide_nothing_and_say_how_many_are_needed() -> None:
    close = 5 + np.random.default_rng(4).standard_normal((3, FEWEST_IMAGES)) / 100
    found = difference(close[:, :-1])
    assert found.p is None
    assert found.interval.low > 0
    assert detectable(found.spread, 1) is None
    assert f"at least {FEWEST_IMAGES}" in found.note
    assert difference(close).p < 0.01


def test_mirrored_differences_give_the_mirrored_judgement() -> None:
    d = np.random.default_rng(7).normal(0.1, 0.1, (3, 20))
    found, mirrored = difference(d), difference(-d)
    assert mirrored.p == found.p
    assert mirrored.mean == -found.mean
    assert mirrored.interval.high == -found.interval.low


def test_holm_against_a_worked_example() -> None:
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, np.nan, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.stack([p, p[::-1]])), [holm(p), holm(p)[::-1]])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1.0, 1.0])
    assert holm(np.array([])).size == 0


def test_the_best_of_each_column_is_compared_with_all_pairs_of_all_columns_corrected() -> None:
    random = np.random.default_rng(8)
    columns = [random.normal(np.array([[[0.0]], [[0.2]], [[0.1]]]), 0.05, (3, 4, n)) for n in (9, 12)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    p = [difference(scores[a] - scores[b]).p for scores in columns for a, b in pairs]
    adjusted = holm(np.array(p)).reshape(2, 3)
    for (best, found), own, scores in zip(to_best(columns), adjusted, columns, strict=True):
        assert best == scores.mean((1, 2)).argmax() == 1
        assert math.isnan(found[1])
        np.testing.assert_allclose(found[[0, 2]], own[[0, 2]])
    [(best, found)] = to_best([np.stack([columns[0], columns[0] + 1])])  # a stack of tables, each by itself
    np.testing.assert_allclose(found[0], found[1])
    assert best.tolist() == [1, 1]


def test_a_table_of_equal_methods_seldom_marks_one() -> None:
    """The case of the stored runs, with methods of unequal spread; benchmarks/error_rates.py has many more."""
    random = np.random.default_rng(9)
    sd = np.array([1, 1, 1, 2, 3, 0.5])[:, None, None]
    scores = 0.108 * sd * random.standard_normal((2000, 6, 5, 1)) + 0.085 * random.standard_normal((2000, 6, 5, 68))
    [(_, p)] = to_best([scores + 0.117 * sd * random.standard_normal((2000, 6, 1, 68))])
    assert 0.005 < (p < ALPHA).any(-1).mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 2000)


@pytest.mark.parametrize("d", [np.zeros((0, 3)), np.zeros(3), np.full((2, 2), np.inf)])
def test_what_is_no_array_of_differences_is_refused(d) -> None:
    with pytest.raises(ValueError, match="finite"):
        difference(d)


def test_the_seeds_that_a_difference_takes_are_the_fewest_whose_power_is_enough() -> None:
    rng = np.random.default_rng(8)
    d = 0.1 + rng.normal(0, 0.08, (3, 1)) + rng.normal(0, 0.05, (3, 68))
    found = spread(d)
    seeds = seeds_to_find(found, 8)
    assert seeds is not None

    def least(seeds: int) -> float:
        world = replace(found, of_seeds=found.of_seeds * 3 / seeds, seeds=seeds)
        value = detectable(world, 8)
        assert value is not None
        return value

    assert least(seeds) <= abs(found.mean) < least(seeds - 1)
    # More seeds do not help where the images differ too much, and one seed says nothing of the spread.
    assert seeds_to_find(spread(d + rng.normal(0, 5, 68)), 8) is None
    assert seeds_to_find(difference(d[:1]).spread, 8) is None
