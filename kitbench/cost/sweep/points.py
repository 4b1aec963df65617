"""The points of one size: counted, predicted, and measured where possible.

FLOPs are counted and memory is predicted for all points, on fake tensors. Points that are predicted to fit into memory
and not to take too long run, each in a process of its own (worker.py), which take turns while they are timed. A point
that does not fit, hangs or dies is a row like any other, and larger sizes are predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from kitbench.cost.agreement import reconcile
from kitbench.cost.flops import count_module
from kitbench.cost.memory import predict_peak_bytes
from kitbench.cost.sweep.options import SweepOptions
from kitbench.cost.sweep.worker import Child, Failed, Memory, Spec, build, closed_form, needed_macs, step
from kitbench.cost.timing import Sample, compare_times
from kitbench.errors import InputError, describe_error
from kitbench.store.sweeps import BRACKET, Point, Sweep
from kitbench.text import byte_size, duration

MARGIN = 1.1  # over the prediction, for a point to be tried
INSIDE_UP_TO = 512  # side up to which predictions follow the loops inside own operators
RESIDENT_SECONDS = 1.0  # longest call whose resident set is cross-checked
WARM_UP_SECONDS = {"cpu": 20.0, "cuda": 120.0}
"""On top of what a call should take, before a child is called hung: on CUDA it loads libraries and compiles kernels."""


LARGEST_SIDE = 1 << 16
WIDEST = 2
PAST = 1.05  # times the budget: what a size above it should need


def measure(specs: Mapping[str, Spec], sweep: Sweep, options: SweepOptions) -> list[Point]:
    """The points of one size and one of infer and train, by label: counted, predicted, and run where they can be.

    On CUDA the processes share memory: a point that runs out of it is run again alone when the others have ended, and
    only a point that fails alone is out of memory.
    """
    predicted = {label: _predicted(label, spec, sweep) for label, spec in specs.items()}
    points = dict(predicted)
    for label in _run(specs, points, sweep, options):
        points[label] = predicted[label]
        _run({label: specs[label]}, points, sweep, options)
    return list(points.values())


def _run(specs: Mapping[str, Spec], points: dict[str, Point], sweep: Sweep, options: SweepOptions) -> list[str]:
    """Run the points that may fit, each in a process, and update `points`. Returns those that must be run alone."""
    device = torch.device(sweep.device)
    crowded: list[str] = []
    with ExitStack() as running:
        children: dict[str, Child] = {}
        waits: dict[str, float] = {}

        def fail(label: str, child: Child, failure: Failed) -> None:
            """Mark the row and end the process; the others continue."""
            child.end()
            children.pop(label, None)
            reason = failure.reason
            if failure.outcome == "oom":
                if children and device.type == "cuda":
                    crowded.append(label)
                reason = f"{reason}; would need {byte_size(points[label].predicted_bytes)}"
            points[label] = points[label].model_copy(update={"status": failure.outcome, "reason": reason})

        for label, spec in specs.items():
            point, guess = points[label], guess_seconds(points[label], sweep)
            update = _not_to_be_run(point, guess, sweep, options)
            if update is not None:
                points[label] = point.model_copy(update=update)
                continue
            child = running.enter_context(Child(spec, device, sweep.threads, sweep.memory_limit))
            waits[label] = WARM_UP_SECONDS[device.type] + 20 * (guess or options.patience)
            try:
                memory = child.measure(waits[label])
                points[label] = point.model_copy(
                    update={"status": "measured", "peak_bytes": memory.allocated, "reserved_bytes": memory.reserved}
                )
                child.prepare(waits[label])
                if memory.seconds < RESIDENT_SECONDS and device.type == "cpu":
                    resident = _resident(spec, sweep, memory, waits[label])
                    points[label] = points[label].model_copy(update={"resident_bytes": resident})
                children[label] = child
            except Failed as failure:
                fail(label, child, failure)
        _time(children, waits, points, options, fail)
    return crowded


def _time(
    children: dict[str, Child],
    waits: Mapping[str, float],
    points: dict[str, Point],
    options: SweepOptions,
    fail: Callable[[str, Child, Failed], None],
) -> None:
    """Interleaved rounds over the processes; where one fails, the others start their rounds again."""
    while children:
        asked: list[str] = []
        samplers = {label: _taker(label, children[label], waits[label], asked) for label in children}
        try:
            timings = compare_times(samplers, options.rounds, options.seconds)
        except Failed as failure:
            fail(asked[-1], children[asked[-1]], failure)
            continue
        for label, timing in timings.items():
            points[label] = points[label].model_copy(
                update={
                    "seconds": timing.median,
                    "quartiles": timing.quartiles,
                    "rounds": len(timing.samples),
                    "dropped": timing.dropped,
                    "noisy": timing.noisy,
                }
            )
        return


def _taker(label: str, child: Child, wait: float, asked: list[str]) -> Callable[[], Sample]:
    def take() -> Sample:
        asked.append(label)
        return child.sample(wait)

    return take


def _resident(spec: Spec, sweep: Sweep, memory: Memory, wait: float) -> int | None:
    with Child(spec, torch.device(sweep.device), sweep.threads, 2 * sweep.memory_limit) as fresh:
        return fresh.resident(wait)


def _predicted(label: str, spec: Spec, sweep: Sweep) -> Point:
    """The point before it is run: counted FLOPs and predicted memory."""
    module = build(spec)
    train = spec.what == "train"
    closed = closed_form(module, spec)
    try:
        counted = count_module(module, spec.shape, train)
        forward = count_module(module.eval(), spec.shape) if train else counted
        raw = _raw_bytes(module.train(train), spec)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"Method {label!r} cannot run on fake tensors, which the sweep needs to count FLOPs and predict memory "
            f"({describe_error(error)}); its forward must not depend on tensors' values."
        ) from error
    return Point(
        method=label,
        what=spec.what,
        size=spec.size,
        status="predicted",
        macs=counted.macs,
        macs_closed=closed,
        macs_needed=needed_macs(module, spec),
        macs_note=None if closed is None else reconcile(closed, forward.macs, forward.uncounted),
        comparisons=counted.comparisons,
        exponentials=counted.exponentials,
        gathered_bytes=counted.gathered_bytes,
        raw_bytes=raw,
        predicted_bytes=round(raw * _correction(label, spec, sweep)),
    )


def bracket(label: str, spec: Spec, sweep: Sweep) -> list[Point]:
    """Points predicted so that the sweep's budget lies between two sizes of a curve, at most WIDEST apart.

    None where even the smallest size is above the budget; none above LARGEST_SIDE.
    """
    curve, found = sweep.curve(label, spec.what), list[Point]()
    while (size := _next_size(curve, sweep.budget)) is not None:
        point = _predicted(label, replace(spec, size=size), sweep).model_copy(update={"reason": BRACKET})
        found.append(point)
        curve = sorted([*curve, point], key=lambda p: p.size)
    return found


def _next_size(curve: Sequence[Point], budget: int) -> int | None:
    """The size that narrows the bracket of the budget, a multiple of 64; None where it is narrow enough."""
    within, above = [p for p in curve if p.bytes <= budget], [p for p in curve if p.bytes > budget]
    if not within or (not above and within[-1].size >= LARGEST_SIDE):
        return None
    last = within[-1]
    if not above:  # the size at which memory that grows with the pixels passes the budget
        return min(LARGEST_SIDE, 64 * math.ceil(last.size * max(1.01, math.sqrt(PAST * budget / last.bytes)) / 64))
    first = above[0]
    share = math.log(budget / last.bytes) / math.log(first.bytes / last.bytes)
    size: int = 64 * int(last.size * (first.size / last.size) ** share / 64)
    return size if first.size > WIDEST * last.size and last.size < size < first.size else None


def _raw_bytes(module: torch.nn.Module, spec: Spec) -> int:
    """Predicted peak bytes, including temporaries inside own operators; at large sizes, those of a small size.

    An operator's chunks have a fixed size, so its temporaries do not grow with the map.
    """
    if spec.size <= INSIDE_UP_TO:
        return predict_peak_bytes(step, module, spec.shape)
    smaller = Spec(**{**spec.__dict__, "size": INSIDE_UP_TO}).shape
    held = predict_peak_bytes(step, module, smaller) - predict_peak_bytes(step, module, smaller, inside=False)
    return predict_peak_bytes(step, module, spec.shape, inside=False) + held


def _correction(label: str, spec: Spec, sweep: Sweep) -> float:
    """The smaller ratio of measured to predicted bytes at the next two smaller sizes, at least 1; 1 without two.

    Temporaries inside torch's kernels are not predicted. Those that grow with the map raise both ratios; buffers of a
    fixed size raise mainly that of the smaller size, and are ignored.
    """
    measured = [p for p in sweep.curve(label, spec.what) if p.size < spec.size and p.peak_bytes]
    ratios = [p.bytes / p.raw_bytes for p in measured[-2:]]
    return max(1.0, min(ratios)) if len(ratios) == 2 else 1.0


def guess_seconds(point: Point, sweep: Sweep) -> float | None:
    """Expected seconds of a call, from the largest smaller size that was timed; infinite above a size that hung."""
    below = [p for p in sweep.curve(point.method, point.what) if p.size < point.size]
    if any(p.status in ("timeout", "killed") for p in below):
        return float("inf")
    timed = [p for p in below if p.seconds is not None]
    if not timed:
        return None
    last = timed[-1]
    assert last.seconds is not None
    return last.seconds * max(point.macs / max(1, last.macs), (point.size / last.size) ** 2)


def _not_to_be_run(point: Point, guess: float | None, sweep: Sweep, options: SweepOptions) -> dict[str, Any] | None:
    """Status and reason of a point that would not fit or would take too long; None for one that is to be run."""
    if point.predicted_bytes * MARGIN > sweep.memory_limit:
        return {"status": "oom", "reason": f"would need {byte_size(point.predicted_bytes)}, not tried"}
    if guess is not None and guess > options.patience:
        never = guess == float("inf")
        reason = "a smaller size did not end" if never else f"one call would take about {duration(guess)}"
        return {"status": "predicted", "reason": reason}
    return None
