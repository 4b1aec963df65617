"""Statistics against simulations whose truth is known, and against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kitbench.verdict.statistics import (
    difference,
    fewest_images,
    holm,
    mean_interval,
    permutation_p,
    standard_error,
)


def simulate(random: np.random.Generator, truth: float, seeds: int, images: int, spread: tuple[float, float, float]):
    """Differences [seeds, images] in dB with known spread over seeds, over images, and of the rest."""
    of_seeds, of_images, rest = (
        s * random.standard_normal(n) for s, n in zip(spread, (seeds, images, seeds * images), strict=True)
    )
    return truth + of_seeds[:, None] + of_images + rest.reshape(seeds, images)


@pytest.mark.parametrize("truth", [0.0, 0.1])
@pytest.mark.parametrize(
    ("seeds", "images", "spread"),
    [(3, 24, (0.03, 0.1, 0.05)), (5, 68, (0.05, 0.1, 0.05)), (3, 12, (0.05, 0.02, 0.05)), (8, 24, (0.02, 0.15, 0.02))],
)
def test_the_interval_covers_the_truth_and_the_test_keeps_its_level(truth, seeds, images, spread) -> None:
    random = np.random.default_rng(0)
    covered = rejected = 0
    for _ in range(1000):
        found = difference(simulate(random, truth, seeds, images, spread))
        covered += found.interval.low <= truth <= found.interval.high
        rejected += found.p < 0.05
    assert 930 <= covered <= 970
    if truth == 0:
        assert rejected <= 70  # 5 % and three standard errors of 1,000 simulations


def test_the_smallest_detectable_difference_is_found_in_four_cases_of_five() -> None:
    random, spread = np.random.default_rng(1), (0.02, 0.1, 0.05)
    truth = math.sqrt(0.02**2 / 6 + 0.1**2 / 30 + 0.05**2 / 180)
    told = np.mean([difference(simulate(random, 0, 6, 30, spread)).detectable for _ in range(300)])
    assert 2.8 < told / truth < 3.6  # (t.975 + t.8) standard errors, with the degrees of freedom that there are
    found = sum(difference(simulate(random, told, 6, 30, spread)).p < 0.05 for _ in range(300)) / 300
    assert 0.7 < found < 0.92


def test_the_standard_error_is_that_of_a_one_way_layout_where_only_one_effect_is_there() -> None:
    effect = np.random.default_rng(2).standard_normal(7)  # the other effect and the rest are exactly 0
    by_seed, by_image = np.repeat(effect[:, None], 4, 1), np.repeat(effect[None], 4, 0)
    expected = effect.std(ddof=1) / math.sqrt(7)
    assert standard_error(by_seed) == pytest.approx((expected, 6))
    assert standard_error(by_image) == pytest.approx((expected, 6))


def test_without_a_second_seed_there_is_no_interval_and_no_p() -> None:
    found = difference(np.random.default_rng(3).standard_normal((1, 24)))
    assert (found.interval, found.interval_seeds, found.p, found.detectable) == (None, None, None, None)
    assert found.note == "one seed: no interval"
    assert mean_interval([30.0]) is None


@pytest.mark.parametrize("d", [np.ones((3, 1)), np.zeros((3, 8)), np.full((2, 2), 0.1)])
def test_an_interval_of_zero_width_is_never_given(d) -> None:
    found = difference(d)
    assert found.interval is None
    assert found.interval_seeds is None
    assert "no interval" in found.note


def test_effects_that_cancel_leave_an_interval_of_some_width() -> None:
    found = difference(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert found.interval.low < 0 < found.interval.high
    assert found.p == 1


def test_too_few_images_say_how_many_are_needed() -> None:
    found = difference(5 + np.random.default_rng(4).standard_normal((3, 2)) / 100)
    assert found.p >= 0.5
    assert found.detectable is None
    assert f"at least {fewest_images()}" in found.note
    assert fewest_images() == 6


def test_the_permutation_test_equals_scipys() -> None:
    random = np.random.default_rng(5)
    for images in (2, 5, 9, 40):
        values = random.normal(0.3, 1, images)
        resamples = np.inf if images < 12 else 20_000
        expected = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=resamples, rng=np.random.default_rng(6)
        ).pvalue
        assert permutation_p(values) == pytest.approx(expected, abs=1e-12 if images < 12 else 0.015)


def test_the_same_differences_give_the_same_judgement() -> None:
    d = np.random.default_rng(7).normal(0.1, 0.1, (3, 20))
    assert difference(d) == difference(d.copy())
    mirrored = difference(-d)
    assert mirrored.p == difference(d).p
    assert mirrored.mean == -difference(d).mean


def test_holm_against_a_worked_example() -> None:
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("d", [np.zeros((0, 3)), np.zeros(3), np.full((2, 2), np.inf)])
def test_what_is_no_array_of_differences_is_refused(d) -> None:
    with pytest.raises(ValueError, match="finite"):
        difference(d)
