"""Time of callables compared with each other in interleaved rounds, so that disturbances affect all of them alike.

Every round takes one sample of every callable, in a shuffled order; a sample is a mean over enough calls to last at
least 50 ms (CUDA: 20 ms). A round in which the sampled process had to wait for a processor is dropped and counted. A
ratio of two callables is the median of the rounds' ratios: on a shared machine its error is 1 to 2 %, against 14 % for
timing one callable after the other.

CUDA is timed by events. The device must not wait for the host between the two events of a call, or the time that the
host takes to launch is counted as the device's. So each call is queued behind writes over the L2 cache that take longer
than the host needs to queue the call: they keep the device busy, and flush the cache. After the second event has been
recorded the device must not yet have reached the first. Where it has, however long the queue is (the callable
synchronises with the device, or has more launches than the queue can hold), the sample is marked `launch_bound`: it is
the time from call to result that a user sees, not the time that the device works.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

SAMPLE_SECONDS = 0.05
CUDA_SAMPLE_SECONDS = 0.02
WARM_UP_SECONDS = 0.5  # CUDA, each callable: clocks rise, caching allocator and workspaces settle
CONTENDED = 0.05  # a round is dropped above this share of its time spent waiting for a processor
NOISY = 0.20  # interquartile range over median
MOST_CALLS = 50  # of a sample on CUDA
MOST_FLUSHES = 256  # ahead of one call; with the call's own launches still less than the driver's queue takes
FLUSH_BYTES = 256 << 20  # CUDA: the buffer written over, more than the L2 cache of any current GPU


@dataclass(frozen=True)
class Timing:
    """Seconds per call, over the rounds that were kept."""

    median: float
    quartiles: tuple[float, float]
    samples: tuple[float, ...]
    """One for each kept round, in the order of the rounds: samples of two callables of a comparison can be paired."""
    dropped: int
    """Rounds dropped because other processes held the processors."""
    launch_bound: bool = False
    """CUDA: whether samples contain time in which the device waited for the host."""
    host: float | None = None
    """CUDA: median seconds that the host takes to queue a call. Where it exceeds `median`, a program that makes only
    this call is limited by its launches, not by the device."""

    @property
    def noisy(self) -> bool:
        """Whether the interquartile range exceeds 20 % of the median, or fewer than three rounds were kept."""
        return len(self.samples) < 3 or self.quartiles[1] - self.quartiles[0] > NOISY * self.median


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, whether other processes held the processors meanwhile, and what CUDA adds: see `Timing`."""

    seconds: float
    contended: bool = False
    launch_bound: bool = False
    host: float | None = None


def compare_times(
    samplers: Mapping[str, Callable[[], Sample]], rounds: int, seconds: float = float("inf"), seed: int = 0
) -> dict[str, Timing]:
    """Time several callables in shuffled, interleaved rounds.

    samplers: by name, a function that takes one sample, as `sampler` makes it; it may take it in another process.
    rounds: wanted number of undisturbed rounds; up to as many again are run to get them, within `seconds` in all (at
    least one is run). Where no round was undisturbed, all are kept and none is counted as dropped.
    """
    shuffle = random.Random(seed).shuffle
    names = list(samplers)
    kept: list[dict[str, Sample]] = []
    disturbed: list[dict[str, Sample]] = []
    start = time.perf_counter()
    while len(kept) < rounds and len(kept) + len(disturbed) < 2 * rounds:
        shuffle(names)
        taken = {name: samplers[name]() for name in names}
        (disturbed if any(sample.contended for sample in taken.values()) else kept).append(taken)
        if time.perf_counter() - start > seconds:
            break
    used = kept or disturbed
    dropped = len(disturbed) if kept else 0
    return {name: _timing([taken[name] for taken in used], dropped) for name in samplers}


def _timing(samples: Sequence[Sample], dropped: int) -> Timing:
    host = [sample.host for sample in samples if sample.host is not None]
    return replace(
        timing_summary([sample.seconds for sample in samples], dropped),
        launch_bound=any(sample.launch_bound for sample in samples),
        host=statistics.median(host) if host else None,
    )


def timing_summary(samples: Sequence[float], dropped: int = 0) -> Timing:
    """Median and quartiles of at least one sample, in seconds."""
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return Timing(middle, (low, high), tuple(samples), dropped)


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long as b a takes: the median over the rounds of one comparison."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


def sampler(fn: Callable[[], object], device: torch.device, least: float | None = None) -> Callable[[], Sample]:
    """A function that takes one sample of `fn`: seconds per call, over calls that last `least` seconds together.

    least: by default SAMPLE_SECONDS, on CUDA CUDA_SAMPLE_SECONDS; 0 for one call. Calls `fn` at once, to warm up and to
    find the number of calls: on the CPU until they last `least`, on CUDA for WARM_UP_SECONDS. Raises whatever `fn`
    raises.
    """
    if device.type == "cuda":
        return QueuedSampler(fn, _cuda_queue(device), CUDA_SAMPLE_SECONDS if least is None else least)
    least = SAMPLE_SECONDS if least is None else least
    fn()
    calls = 1
    while least > 0 and (taken := _cpu_sample(fn, calls).seconds * calls) < least and calls < 1 << 20:
        calls = min(1 << 20, max(calls + 1, round(1.2 * calls * least / max(taken, 1e-9))))
    return lambda: _cpu_sample(fn, calls)


def _cpu_sample(fn: Callable[[], object], calls: int) -> Sample:
    waited = waited_seconds()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    elapsed = time.perf_counter() - start
    return Sample(elapsed / calls, waited_seconds() - waited > CONTENDED * elapsed)


class Event(Protocol):
    """A place in the queue of a device: torch.cuda.Event."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to `end_event`, both passed."""


class Queue(Protocol):
    """The queue of a device that works behind the host."""

    def mark(self) -> Event:
        """Queue an event."""

    def flush(self) -> None:
        """Queue a write over the L2 cache."""

    def synchronize(self) -> None:
        """Wait until the device has done all that is queued."""

    def now(self) -> float:
        """Seconds of the host's clock."""


class CudaQueue:
    """The current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed: torch.Tensor | None = None

    def mark(self) -> Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def flush(self) -> None:
        if self._flushed is None:
            self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        self._flushed.zero_()

    def release(self) -> None:
        """Free the buffer that `flush` writes over; the next flush allocates it again."""
        self._flushed = None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def now(self) -> float:
        return time.perf_counter()


@cache
def _cuda_queue(device: torch.device) -> CudaQueue:
    """One for all samplers of a device, so that the buffer that flushes its cache is there once."""
    return CudaQueue(device)


def release_flush_buffer(device: torch.device) -> None:
    """Free the FLUSH_BYTES that samplers of a CUDA device hold between samples; the next sample allocates them again.

    They go to torch's cache: `torch.cuda.empty_cache` gives them back to the device.
    """
    _cuda_queue(device).release()


class QueuedSampler:
    """Takes samples of `fn` on a device that works behind the host; see the head of this file. `least`: seconds."""

    def __init__(self, fn: Callable[[], object], queue: Queue, least: float) -> None:
        self._fn, self._queue = fn, queue
        self._calls, self._flushes, self._hopeless = 1, 1, False
        calls, start = 0, queue.now()
        while calls == 0 or queue.now() - start < WARM_UP_SECONDS:
            fn()
            queue.synchronize()
            calls += 1
        found = self()
        self._calls = min(MOST_CALLS, max(1, math.ceil(least / max(found.seconds, 1e-9))))

    def __call__(self) -> Sample:
        """One sample. Calls that the device reached too early are left out, and where most of them were, the queue is
        made longer and the sample taken again: once it was found that no queue is long enough, no longer."""
        while True:
            seconds, ahead, host = self._measure()
            if 2 * sum(ahead) > len(ahead):
                kept = [value for value, early in zip(seconds, ahead, strict=True) if early]
                return Sample(statistics.fmean(kept), host=host)
            if self._flushes == MOST_FLUSHES or self._hopeless:
                # As a user would meet it: without the wait behind a long queue, which changes nothing.
                self._hopeless, self._flushes = True, 1
                return Sample(statistics.fmean(seconds), launch_bound=True, host=host)
            self._flushes = min(MOST_FLUSHES, 2 * self._flushes)

    def _measure(self) -> tuple[list[float], list[bool], float]:
        """(seconds of each call, whether it was queued before the device reached it, the host's seconds for one)."""
        queue, host = self._queue, math.inf
        events: list[tuple[Event, Event]] = []
        ahead: list[bool] = []
        for _ in range(self._calls):
            for _ in range(self._flushes):
                queue.flush()
            first = queue.mark()
            start = queue.now()
            self._fn()
            host = min(host, queue.now() - start)  # the least: where the queue is full, the host waits for the device
            last = queue.mark()
            ahead.append(not first.query())
            events.append((first, last))
        queue.synchronize()
        return [first.elapsed_time(last) / 1e3 for first, last in events], ahead, host


def waited_seconds() -> float:
    """Seconds that threads of this process were ready but not running, so far (Linux; elsewhere 0)."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except OSError:  # a thread that has just ended
            continue
    return total / 1e9
