"""`kitbench scale`: FLOPs, memory and time of every method against resolution, on this machine, as far as it goes.

For each size, from small to large: FLOPs are counted and memory is predicted for all points, on fake tensors; what
is predicted to fit, and not to take too long, runs, each point in a child process of its own (worker.py); the children
of a size take turns while their time is taken. What does not fit, hangs or dies is a row like any other, and larger
sizes are predicted. Points are stored as they come, and the same command on the same machine does not repeat them.

Read next: fit.py (exponents, crossings, largest image), plot.py (the pictures), report.py (table and words).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from rich.console import Console

from kitbench import methods
from kitbench.cost.flops import count_module, reconcile
from kitbench.cost.memory import free_bytes, predict_peak_bytes
from kitbench.cost.timing import Sample, compare
from kitbench.cost.worker import Child, Failed, Memory, Outcome, Scope, Spec, What, build, closed_form, step
from kitbench.environment import choose_device, environment
from kitbench.errors import InputError
from kitbench.progress import duration, gib, progress
from kitbench.store import Environment, writable, write_atomic
from kitbench.suite import Frozen, Setting, digest, load

DEFAULT_METHODS = ("kit", "global:form=materialised", "global:form=sdpa", "window", "local")
DEFAULT_SIZES = "64:4096"
SHARE = 0.8  # of the free memory that a child may take
MARGIN = 1.1  # over the prediction, for a point to be tried
INSIDE_UP_TO = 512  # side up to which predictions follow the loops inside own operators
RESIDENT_SECONDS = 1.0  # longest call whose resident set is cross-checked
WARM_UP_SECONDS = 20.0  # on top of what a call should take, before a child is called hung

Status = Literal["measured", "predicted"] | Outcome


@dataclass(frozen=True)
class Options:
    """What to sweep, and within which bounds."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    """NAME, FILE.py, or either with settings: NAME:key=value:key=value."""
    sizes: str = DEFAULT_SIZES
    """Sides in pixels: A:B (doubling) or a list A,B,C."""
    what: tuple[What, ...] = ("infer", "train")
    scope: Scope = "attention"
    dim: int = 32
    heads: int = 1
    device: str = "auto"
    out: Path = Path("results/scale")
    memory: str | None = None
    """Most that a point may take, e.g. 8GiB; 80 % of what is free without it."""
    budget: str = "8GiB"
    """Memory for which the largest image is reported."""
    patience: float = 1.5
    """Points of which one call would take longer, in seconds, are predicted."""
    rounds: int = 7
    """Undisturbed rounds of timing."""
    seconds: float = 8.0
    """For the rounds of one size and one of `what`."""


class Point(Frozen):
    """One method at one size, inference or training step: what it takes, and whether that was measured."""

    method: str
    what: What
    size: int
    status: Status
    reason: str | None = None
    """Why it was not measured, or not to the end."""
    macs: int
    """Counted multiply-adds of one call on fake tensors; of a training step forward and backward."""
    macs_closed: int | None
    """Closed form of the forward pass; None where the method states none."""
    macs_note: str | None = None
    """Set where closed form and forward count differ by more than 1 %."""
    comparisons: int
    exponentials: int
    gathered_bytes: int
    raw_bytes: int
    """Peak bytes predicted on fake tensors."""
    predicted_bytes: int
    """The same, corrected by what both of the next two smaller sizes measured beyond their own."""
    peak_bytes: int | None = None
    """Measured peak of allocated bytes, above module and input."""
    reserved_bytes: int | None = None
    """CUDA: measured peak of reserved bytes, above what was reserved before."""
    resident_bytes: int | None = None
    """CPU: peak resident set of a fresh process, where it was cross-checked."""
    seconds: float | None = None
    """Median of one call."""
    quartiles: tuple[float, float] | None = None
    rounds: int = 0
    dropped: int = 0
    noisy: bool = False

    @property
    def bytes(self) -> int:
        """Measured peak where there is one, else the predicted."""
        return self.predicted_bytes if self.peak_bytes is None else self.peak_bytes


class Sweep(Frozen):
    """scale.json: the points of one command on one machine."""

    schema_version: Literal[1] = 1
    key: str
    """Digest of all that decides the points; another key starts the sweep anew."""
    scope: Scope
    dim: int
    heads: int
    device: str
    threads: int
    memory_limit: int
    budget: int
    methods: dict[str, tuple[str, dict[str, Setting]]]
    """By label: the method's name or file, and its settings."""
    environment: Environment
    points: tuple[Point, ...] = ()

    def curve(self, method: str, what: What) -> list[Point]:
        """The points of one method, by size."""
        return sorted((p for p in self.points if (p.method, p.what) == (method, what)), key=lambda p: p.size)


def run_scale(options: Options, console: Console) -> Sweep:
    """Sweep, store and draw: `options.out` gets scale.json, scale.csv, scale.md, scale.png and scale.svg.

    Raises InputError for a method, size, scope or amount of memory that makes no sense, and where `out` cannot be
    written.
    """
    from kitbench.cost.plot import draw
    from kitbench.cost.report import csv, markdown

    sizes = parse_sizes(options.sizes)
    sweep = _start(options)
    backbone = _backbone(options)
    specs = {
        (label, what, size): Spec(name, settings, options.scope, what, size, options.dim, options.heads, backbone)
        for size in sizes
        for what in options.what
        for label, (name, settings) in sweep.methods.items()
    }
    for spec in specs.values():
        if spec.size == sizes[0]:
            build(spec)  # refuses what makes no sense before anything runs
    writable(options.out)
    path = options.out / "scale.json"
    sweep = _resumed(sweep, path)
    console.print(
        f"{len(sweep.methods)} methods, {options.scope} of {options.dim} channels, sides {sizes[0]} to {sizes[-1]} px, "
        f"on {sweep.device} with {sweep.threads} threads; a point may take {gib(sweep.memory_limit)} and "
        f"{options.patience:g} s a call, larger ones are predicted",
        highlight=False,
    )
    total = len(specs)
    with progress(console, "scale", total) as update:
        for size in sizes:
            for what in options.what:
                wanted = {label: specs[label, what, size] for label in sweep.methods}
                have = {p.method for p in sweep.points if (p.what, p.size) == (what, size)}
                missing = {label: spec for label, spec in wanted.items() if label not in have}
                done = len([p for p in sweep.points if (p.method, p.what, p.size) in specs])
                update(done, f"{size} px, {what}")
                if missing:
                    found = measure(missing, sweep, options)
                    sweep = sweep.model_copy(update={"points": (*sweep.points, *found)})
                    write_atomic(path, sweep.model_dump_json(indent=1).encode())
        update(total, "done")
    shown = sweep.model_copy(update={"points": tuple(p for p in sweep.points if (p.method, p.what, p.size) in specs)})
    write_atomic(options.out / "scale.csv", csv(shown).encode())
    write_atomic(options.out / "scale.md", markdown(shown).encode())
    draw(shown, options.out)
    return shown


def measure(specs: Mapping[str, Spec], sweep: Sweep, options: Options) -> list[Point]:
    """The points of one size and one of infer and train, by label: counted, predicted, and run where they can be.

    On CUDA the children share the memory: a point that finds none beside the others is run again when they have ended,
    and is out of memory only where it is so alone.
    """
    predicted = {label: _predicted(label, spec, sweep) for label, spec in specs.items()}
    points = dict(predicted)
    for label in _run(specs, points, sweep, options):
        points[label] = predicted[label]
        _run({label: specs[label]}, points, sweep, options)
    return list(points.values())


def _run(specs: Mapping[str, Spec], points: dict[str, Point], sweep: Sweep, options: Options) -> list[str]:
    """Run the points that can be, each in a child, and renew them. Returns those that lacked memory beside others."""
    device = torch.device(sweep.device)
    crowded: list[str] = []
    with ExitStack() as running:
        children: dict[str, Child] = {}
        waits: dict[str, float] = {}

        def fail(label: str, child: Child, failure: Failed) -> None:
            """Mark the row, end the child; the others go on."""
            child.end()
            children.pop(label, None)
            reason = failure.reason
            if failure.outcome == "oom":
                if children and device.type == "cuda":
                    crowded.append(label)
                reason = f"{reason}; would need {gib(points[label].predicted_bytes)}"
            points[label] = points[label].model_copy(update={"status": failure.outcome, "reason": reason})

        for label, spec in specs.items():
            point, guess = points[label], guess_seconds(points[label], sweep)
            update = _not_to_be_run(point, guess, sweep, options)
            if update is not None:
                points[label] = point.model_copy(update=update)
                continue
            child = running.enter_context(Child(spec, device, sweep.threads, sweep.memory_limit))
            waits[label] = WARM_UP_SECONDS + 20 * (guess or options.patience)
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
    options: Options,
    fail: Callable[[str, Child, Failed], None],
) -> None:
    """Interleaved rounds over the children; where one fails, the others start their rounds again."""
    while children:
        asked: list[str] = []
        samplers = {label: _taker(label, children[label], waits[label], asked) for label in children}
        try:
            timings = compare(samplers, options.rounds, options.seconds)
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
    """The point before anything has run: counts, and the predicted memory."""
    module = build(spec)
    train = spec.what == "train"
    closed = closed_form(module, spec)
    try:
        counted = count_module(module, spec.shape, train)
        forward = count_module(module.eval(), spec.shape) if train else counted
        raw = _raw_bytes(module.train(train), spec)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"Method {label!r} cannot run on fake tensors, by which the sweep counts and predicts "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); its forward must not depend on tensors' values."
        ) from error
    return Point(
        method=label,
        what=spec.what,
        size=spec.size,
        status="predicted",
        macs=counted.macs,
        macs_closed=closed,
        macs_note=None if closed is None else reconcile(closed, forward.macs, forward.uncounted),
        comparisons=counted.comparisons,
        exponentials=counted.exponentials,
        gathered_bytes=counted.gathered_bytes,
        raw_bytes=raw,
        predicted_bytes=round(raw * _correction(label, spec, sweep)),
    )


def _raw_bytes(module: torch.nn.Module, spec: Spec) -> int:
    """Following the loops of own operators, or at large sizes adding what they held at a size where that is quick.

    An operator's chunks have a fixed size, so what it holds inside does not grow with the map.
    """
    if spec.size <= INSIDE_UP_TO:
        return predict_peak_bytes(step, module, spec.shape)
    smaller = Spec(**{**spec.__dict__, "size": INSIDE_UP_TO}).shape
    held = predict_peak_bytes(step, module, smaller) - predict_peak_bytes(step, module, smaller, inside=False)
    return predict_peak_bytes(step, module, spec.shape, inside=False) + held


def _correction(label: str, spec: Spec, sweep: Sweep) -> float:
    """What the two largest smaller sizes both measured over their own prediction; 1 where there are no two.

    Temporaries inside torch's kernels are not predicted. Those that grow with the map show at both sizes; scratch of a
    fixed size shows at the smaller one only, and is left out.
    """
    measured = [p for p in sweep.curve(label, spec.what) if p.size < spec.size and p.peak_bytes]
    ratios = [p.bytes / p.raw_bytes for p in measured[-2:]]
    return max(1.0, min(ratios)) if len(ratios) == 2 else 1.0


def guess_seconds(point: Point, sweep: Sweep) -> float | None:
    """What one call should take, from the largest smaller size that was timed; infinite beyond one that hung."""
    below = [p for p in sweep.curve(point.method, point.what) if p.size < point.size]
    if any(p.status in ("timeout", "killed") for p in below):
        return float("inf")
    timed = [p for p in below if p.seconds is not None]
    if not timed:
        return None
    last = timed[-1]
    assert last.seconds is not None
    return last.seconds * max(point.macs / max(1, last.macs), (point.size / last.size) ** 2)


def _not_to_be_run(point: Point, guess: float | None, sweep: Sweep, options: Options) -> dict[str, Any] | None:
    """The row of a point that would not fit or take too long; None for one that is to be run."""
    if point.predicted_bytes * MARGIN > sweep.memory_limit:
        return {"status": "oom", "reason": f"would need {gib(point.predicted_bytes)}, not tried"}
    if guess is not None and guess > options.patience:
        told = "a smaller size did not end" if guess == float("inf") else f"one call would take about {duration(guess)}"
        return {"status": "predicted", "reason": told}
    return None


def _start(options: Options) -> Sweep:
    device = choose_device(options.device)
    if options.dim < 1 or options.heads < 1 or options.rounds < 1 or options.patience <= 0:
        raise InputError("dim, heads and rounds must be at least 1, and patience positive; give larger values.")
    if not options.what or set(options.what) - {"infer", "train"}:
        raise InputError(f"--what {','.join(options.what)!r} is not understood; give infer, train or infer,train.")
    labels = {text: parse_method(text) for text in options.methods}
    if len(labels) < len(options.methods):
        raise InputError("A method is listed twice; list each once, with different settings.")
    sources = {name: methods.load(name).source_sha256 for name, _ in labels.values()}
    limit = parse_bytes(options.memory) if options.memory else round(SHARE * free_bytes(device))
    told = environment(device)
    decides = [
        labels, sources, options.scope, options.dim, options.heads, options.device, options.patience, told.host,
        told.device, told.threads, told.commit, told.versions["torch"], options.memory,
    ]  # fmt: skip
    return Sweep(
        key=digest(decides),
        scope=options.scope,
        dim=options.dim,
        heads=options.heads,
        device=str(device),
        threads=torch.get_num_threads(),
        memory_limit=limit,
        budget=parse_bytes(options.budget),
        methods=labels,
        environment=told,
    )


def _resumed(sweep: Sweep, path: Path) -> Sweep:
    """The stored sweep, if it is of the same key; otherwise the new one. What failed is tried again."""
    if not path.is_file():
        return sweep
    try:
        stored = Sweep.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path} is no sweep of this version of kitbench; move it away or change --out.") from error
    if stored.key != sweep.key:
        return sweep
    points = tuple(point for point in stored.points if point.status != "failed")
    return stored.model_copy(update={"budget": sweep.budget, "points": points})


def _backbone(options: Options) -> Any:
    return load("denoise").backbone if options.scope == "model" else None


def parse_method(text: str) -> tuple[str, dict[str, Setting]]:
    """`kit:k=8:retrieval=exact` -> ("kit", {"k": 8, "retrieval": "exact"}). Raises InputError."""
    name, *rest = text.split(":")
    settings: dict[str, Setting] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"Method {text!r}: {item!r} is no setting; write NAME:key=value:key=value.")
        settings[key] = _value(value)
    return name, methods.load(name).resolve(settings) and settings


def _value(text: str) -> Setting:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_sizes(text: str) -> list[int]:
    """`64:512` -> [64, 128, 256, 512]; `64,96` -> [64, 96]. Raises InputError."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        sizes = list(_doubling(int(match[1]), int(match[2])))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        sizes = sorted({int(part) for part in text.split(",")})
    else:
        raise InputError(f"--sizes {text!r} is not understood; give A:B, which doubles from A to B, or a list A,B,C.")
    if not sizes or sizes[0] < 8 or sizes[-1] > 1 << 16:
        raise InputError(f"--sizes {text!r} must lie between 8 and 65536, the smaller end first.")
    return sizes


def _doubling(first: int, last: int) -> Iterator[int]:
    while 0 < first <= last:
        yield first
        first *= 2


def parse_bytes(text: str) -> int:
    """`8GiB`, `512 MiB`, `24GB`, `1000000` -> bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(iB|B)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise InputError(f"{text!r} is no amount of memory; write for example 8GiB or 512MiB.")
    base = 1000 if (match[3] or "iB").lower() == "b" and match[2] else 1024
    return round(float(match[1]) * base ** " KMGTP".index(match[2].upper() or " "))
