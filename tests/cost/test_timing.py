"""Timing: what is kept, dropped and called noisy. No assertion on how long anything takes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from kitbench.cost.timing import Sample, Timing, compare, ratio, sampler, summary


def scripted(*samples):
    stream = itertools.cycle(samples)
    return lambda: next(stream)


def test_rounds_that_were_disturbed_are_dropped_for_all_and_counted():
    a = scripted(Sample(1.0), Sample(9.0, contended=True), Sample(1.0))
    b = scripted(Sample(2.0), Sample(2.0), Sample(2.0))
    found = compare({"a": a, "b": b}, rounds=4)
    assert found["a"].samples == (1.0,) * 4
    assert found["b"].samples == (2.0,) * 4
    assert found["a"].dropped == found["b"].dropped == 2  # rounds 2 and 5
    assert ratio(found["b"], found["a"]) == 2


def test_where_everything_was_disturbed_everything_is_kept():
    found = compare({"a": scripted(Sample(1.0, contended=True))}, rounds=3)["a"]
    assert found.samples == (1.0,) * 6
    assert found.dropped == 0


def test_rounds_stop_when_the_time_is_up_but_not_before_the_first():
    assert len(compare({"a": scripted(Sample(1.0))}, rounds=50, seconds=0)["a"].samples) == 1


def test_every_round_takes_every_callable_once_in_changing_order():
    order: list[str] = []

    def named(name):
        return lambda: order.append(name) or Sample(1.0)

    compare({name: named(name) for name in "abc"}, rounds=20)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 2


def test_the_ratio_pairs_rounds_so_that_a_drift_cancels():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert ratio(summary([3 * x for x in drift]), summary(drift)) == 3


@pytest.mark.parametrize(
    ("samples", "noisy"),
    [([1.0] * 5, False), ([1, 1, 1, 1.5, 1.5], True), ([1.0, 1.0], True), ([1, 1.01, 1.1, 1.05], False)],
)
def test_a_wide_spread_or_few_rounds_are_noisy(samples, noisy):
    assert summary(samples).noisy is noisy


def test_quartiles_are_those_of_the_samples():
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, (2.0, 4.0), (5.0, 1.0, 3.0, 2.0, 4.0), 0)


def test_a_sample_lasts_long_enough_and_is_seconds_a_call():
    calls = itertools.count()
    take = sampler(lambda: next(calls) and time.sleep(1e-4), torch.device("cpu"), least=0.01)
    before = next(calls)
    sample = take()
    made = next(calls) - before - 1
    assert made > 1
    assert sample.seconds * made >= 1e-4 * made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_timed_by_events():
    x = torch.randn(4096, 4096, device="cuda")
    assert sampler(lambda: x @ x, x.device)().seconds > 0
