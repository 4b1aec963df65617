"""Timing: what is kept, dropped and called noisy. No assertion on how long anything takes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from kitbench.cost import timing
from kitbench.cost.timing import QueuedSampler, Sample, Timing, compare_times, ratio, sampler, timing_summary


def scripted(*samples):
    stream = itertools.cycle(samples)
    return lambda: next(stream)


def test_rounds_that_were_disturbed_are_dropped_for_all_and_counted():
    a = scripted(Sample(1.0), Sample(9.0, contended=True), Sample(1.0))
    b = scripted(Sample(2.0), Sample(2.0), Sample(2.0))
    found = compare_times({"a": a, "b": b}, rounds=4)
    assert found["a"].samples == (1.0,) * 4
    assert found["b"].samples == (2.0,) * 4
    assert found["a"].dropped == found["b"].dropped == 2  # rounds 2 and 5
    assert ratio(found["b"], found["a"]) == 2


def test_where_everything_was_disturbed_everything_is_kept():
    found = compare_times({"a": scripted(Sample(1.0, contended=True))}, rounds=3)["a"]
    assert found.samples == (1.0,) * 6
    assert found.dropped == 0


def test_rounds_stop_when_the_time_is_up_but_not_before_the_first():
    assert len(compare_times({"a": scripted(Sample(1.0))}, rounds=50, seconds=0)["a"].samples) == 1


def test_every_round_takes_every_callable_once_in_changing_order():
    order: list[str] = []

    def named(name):
        return lambda: order.append(name) or Sample(1.0)

    compare_times({name: named(name) for name in "abc"}, rounds=20)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 2


def test_the_ratio_pairs_rounds_so_that_a_drift_cancels():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert ratio(timing_summary([3 * x for x in drift]), timing_summary(drift)) == 3


@pytest.mark.parametrize(
    ("samples", "noisy"),
    [([1.0] * 5, False), ([1, 1, 1, 1.5, 1.5], True), ([1.0, 1.0], True), ([1, 1.01, 1.1, 1.05], False)],
)
def test_a_wide_spread_or_few_rounds_are_noisy(samples, noisy):
    assert timing_summary(samples).noisy is noisy


def test_quartiles_are_those_of_the_samples():
    assert timing_summary([5.0, 1.0, 3.0, 2.0, 4.0]) == Timing(3.0, (2.0, 4.0), (5.0, 1.0, 3.0, 2.0, 4.0), 0)


def test_a_sample_lasts_long_enough_and_is_seconds_a_call():
    calls = itertools.count()
    take = sampler(lambda: next(calls) and time.sleep(1e-4), torch.device("cpu"), least=0.01)
    before = next(calls)
    sample = take()
    made = next(calls) - before - 1
    assert made > 1
    assert sample.seconds * made >= 1e-4 * made


class FakeMark:
    def __init__(self, device, at):
        self.device, self.at = device, at

    def query(self):
        return self.device.host >= self.at

    def elapsed_time(self, end):
        assert self.device.host >= end.at, "asked before the device had passed it"
        return 1e3 * (end.at - self.at)


class FakeDevice:
    """Two clocks: the host takes 10 us to launch, then goes on; the device works through what is queued, in order."""

    LAUNCH, FLUSH, DEPTH = 10e-6, 100e-6, 1000

    def __init__(self):
        self.host = self.device = 0.0
        self.pending = []  # when each launch that the device has not finished will be

    def launch(self, seconds):
        self.pending = [at for at in self.pending if at > self.host]
        if len(self.pending) == self.DEPTH:  # the queue is full: the host waits for a place
            self.host = self.pending.pop(0)
        self.host += self.LAUNCH
        self.device = max(self.host, self.device) + seconds
        self.pending.append(self.device)

    def kernels(self, count, seconds=1e-6):
        def call():
            for _ in range(count):
                self.launch(seconds)

        return call

    def mark(self):
        return FakeMark(self, max(self.host, self.device))

    def flush(self):
        self.launch(self.FLUSH)

    def synchronize(self):
        self.host = max(self.host, self.device)

    def now(self):
        return self.host


def test_a_kernel_behind_an_idle_queue_seems_to_take_as_long_as_its_launch():
    device = FakeDevice()  # what the fake device is for: without a busy queue it shows 11 us for a kernel of 1 us
    device.flush()
    device.synchronize()
    first = device.mark()
    device.launch(1e-6)
    last = device.mark()
    device.synchronize()
    assert first.elapsed_time(last) == pytest.approx(11e-3)


@pytest.mark.parametrize("launches", [1, 9, 75, 400])
def test_a_sample_of_a_device_is_its_work_without_the_launches(launches):
    device = FakeDevice()
    sample = QueuedSampler(device.kernels(launches), device, least=0.002)()
    assert sample.seconds == pytest.approx(launches * 1e-6, rel=1e-6)
    assert sample.host == pytest.approx(launches * 10e-6, rel=1e-6)
    assert not sample.launch_bound


def test_kernels_longer_than_their_launch_are_timed_as_they_are():
    device = FakeDevice()
    sample = QueuedSampler(device.kernels(3, 1e-3), device, least=0.02)()
    assert sample.seconds == pytest.approx(3e-3)
    assert not sample.launch_bound


def test_a_call_that_waits_for_the_device_is_launch_bound_and_timed_from_call_to_result():
    device = FakeDevice()

    def call():
        device.launch(1e-6)
        device.synchronize()
        device.launch(1e-6)

    take = QueuedSampler(call, device, least=0.001)
    samples = [take() for _ in range(3)]
    assert all(sample.launch_bound for sample in samples)
    # The first kernel lies behind the flush, the second waits for the host's return, its launch and itself.
    assert [sample.seconds for sample in samples] == pytest.approx([12e-6] * 3)
    assert compare_times({"a": take}, rounds=3)["a"].launch_bound


def test_a_call_of_more_launches_than_the_queue_takes_is_launch_bound():
    device = FakeDevice()
    assert QueuedSampler(device.kernels(3000), device, least=0.001)().launch_bound


def test_a_call_that_the_host_was_late_with_is_left_out_of_its_sample():
    device, calls = FakeDevice(), itertools.count()
    stalled = set()

    def call():
        if next(calls) in stalled:
            device.host += 1.0  # the operating system takes the host's processor away
        device.launch(1e-6)

    take = QueuedSampler(call, device, least=10e-6)
    made = next(calls)
    stalled |= {made + 3, made + 7}
    sample = take()
    assert next(calls) - made == 11
    assert sample.seconds == pytest.approx(1e-6)
    assert not sample.launch_bound


@pytest.mark.parametrize(("least", "calls"), [(0, 1), (2e-3, 3), (5e-3, 6), (1.0, timing.MOST_CALLS)])
def test_a_sample_of_a_device_has_as_many_calls_as_last_long_enough(least, calls):
    device, made = FakeDevice(), []
    take = QueuedSampler(lambda: made.append(0) or device.launch(0.9e-3), device, least)
    made.clear()
    take()
    assert len(made) == calls


def test_every_callable_is_warmed_up_for_half_a_second_before_anything_is_timed():
    device, marks = FakeDevice(), []
    mark, device.mark = device.mark, lambda: marks.append(device.now()) or mark()
    QueuedSampler(device.kernels(1), device, least=0.001)
    assert marks[0] >= 0.5


def test_what_the_host_takes_to_queue_a_call_is_kept_as_a_median():
    found = compare_times({"a": scripted(*(Sample(1.0, host=host) for host in (1.0, 5.0, 2.0)))}, rounds=3)["a"]
    assert found.host == 2.0
    assert not found.launch_bound
    assert compare_times({"a": scripted(Sample(1.0))}, rounds=3)["a"].host is None


def test_a_sample_of_no_least_length_is_one_call_after_one_to_warm_up():
    calls = itertools.count()
    take = sampler(lambda: next(calls), torch.device("cpu"), least=0.0)
    assert next(calls) == 1
    take()
    assert next(calls) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_timed_by_events_behind_a_busy_queue():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(1, device=device)
    sample = sampler(lambda: x.add_(1), device)()
    assert sample.seconds > 0
    assert not sample.launch_bound
    assert sampler(lambda: x.add_(1).item(), device)().launch_bound
