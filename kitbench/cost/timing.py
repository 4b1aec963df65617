"""Time of callables against each other: interleaved rounds, so that what disturbs the machine disturbs all alike.

Every round takes one sample of every callable, in a shuffled order; a sample is a mean over enough calls to last at
least 50 ms. A round in which the sampled process had to wait for a processor is dropped and counted. A ratio of two
callables is the median of the rounds' ratios, which on a shared machine errs by 1 to 2 %, where timing one after the
other errs by 14 %. CUDA is timed by events, with the L2 cache flushed before each call.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SAMPLE_SECONDS = 0.05
CONTENDED = 0.05  # share of a round spent waiting for a processor, from which on the round is dropped
NOISY = 0.20  # interquartile range over median
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any current GPU


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds that were kept."""

    median: float
    quartiles: tuple[float, float]
    samples: tuple[float, ...]
    """One a kept round, in the order of the rounds: those of two callables of one comparison can be paired."""
    dropped: int
    """Rounds dropped because other processes held the processors."""

    @property
    def noisy(self) -> bool:
        """Whether the quartiles lie more than 20 % of the median apart, or too few rounds were left to tell."""
        return len(self.samples) < 3 or self.quartiles[1] - self.quartiles[0] > NOISY * self.median


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, and whether other processes held the processors meanwhile."""

    seconds: float
    contended: bool = False


def compare(
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
    return {name: summary([taken[name].seconds for taken in used], dropped) for name in samplers}


def summary(samples: Sequence[float], dropped: int = 0) -> Timing:
    """Median and quartiles of at least one sample, in seconds."""
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return Timing(middle, (low, high), tuple(samples), dropped)


def ratio(a: Timing, b: Timing) -> float:
    """How many times as long as b a takes: the median over the rounds of one comparison."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


def sampler(fn: Callable[[], object], device: torch.device, least: float = SAMPLE_SECONDS) -> Callable[[], Sample]:
    """A function that takes one sample of `fn`: seconds a call, over calls that last at least `least` seconds together.

    Calls `fn` once or more at once, to warm up and to find the number of calls. On CUDA a sample is one call.
    """
    fn()
    if device.type == "cuda":
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        return lambda: _cuda_sample(fn, flush)
    calls = 1
    while (taken := _cpu_sample(fn, calls).seconds * calls) < least and calls < 1 << 20:
        calls = min(1 << 20, max(calls + 1, round(1.2 * calls * least / max(taken, 1e-9))))
    return lambda: _cpu_sample(fn, calls)


def _cpu_sample(fn: Callable[[], object], calls: int) -> Sample:
    waited = waited_seconds()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    elapsed = time.perf_counter() - start
    return Sample(elapsed / calls, waited_seconds() - waited > CONTENDED * elapsed)


def _cuda_sample(fn: Callable[[], object], flush: torch.Tensor) -> Sample:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    torch.cuda.synchronize(flush.device)
    before.record()
    fn()
    after.record()
    torch.cuda.synchronize(flush.device)
    return Sample(before.elapsed_time(after) / 1e3)


def waited_seconds() -> float:
    """Seconds that threads of this process were ready but not running, so far (Linux; elsewhere 0)."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[1])
        except OSError:  # a thread that has just ended
            continue
    return total / 1e9
