"""`kitbench scale`: FLOPs, memory and time of every method against resolution, as far as this machine allows.

Size by size, from small to large (points.py). Points are stored as soon as they are measured, and the same command on
the same machine does not repeat them. Their evaluation and plots: kitbench/verdict/scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from kitbench.cost.memory import free_bytes
from kitbench.cost.sweep.options import SweepOptions, parse_bytes, parse_method, parse_sizes
from kitbench.cost.sweep.points import bracket, measure
from kitbench.cost.sweep.worker import Spec, build
from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.spec.fields import digest
from kitbench.spec.loading import load_suite
from kitbench.store.files import writable, write_atomic
from kitbench.store.sweeps import BRACKET, Point, Sweep
from kitbench.system.environment import choose_device, environment
from kitbench.system.progress import progress
from kitbench.text import byte_size, counted

PREVIOUS = "scale-previous.json"
"""Where a sweep is put that a new one takes the place of."""
SHARE = 0.8  # of the free memory that a child may take


def run_scale(options: SweepOptions, console: Console) -> Sweep:
    """Sweep, and store the points in `options.out` as scale.json. Returns those that the options ask for.

    Raises InputError for an invalid method, size, scope or amount of memory, and where `out` cannot be written.
    """
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
            build(spec)  # raises for invalid settings before anything runs
    writable(options.out)
    path = options.out / "scale.json"
    sweep = _resumed(sweep, path, console)
    console.print(
        f"{counted(len(sweep.methods), 'method')}, "
        f"{sweep.subject}, sides {sizes[0]} to {sizes[-1]} px, "
        f"on {sweep.device} with {sweep.threads} threads; a point may take {byte_size(sweep.memory_limit)} and "
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
                    sweep = _with(sweep, found)
                    write_atomic(path, sweep.model_dump_json(indent=1).encode())
        update(total, f"predicting up to {byte_size(sweep.budget)}")
        kept = sweep.model_copy(
            update={"points": tuple(p for p in sweep.points if (p.method, p.what, p.size) in specs)}
        )
        ends = {(label, what): specs[label, what, sizes[-1]] for what in options.what for label in sweep.methods}
        further = [point for (label, _), spec in ends.items() for point in bracket(label, spec, kept)]
        stored = {(p.method, p.what, p.size) for p in sweep.points}
        new = [p for p in further if (p.method, p.what, p.size) not in stored]
        write_atomic(path, _with(sweep, new).model_dump_json(indent=1).encode())
        update(total, "done")
    return _with(kept, further)


def _with(sweep: Sweep, points: Sequence[Point]) -> Sweep:
    return sweep.model_copy(update={"points": (*sweep.points, *points)})


def _start(options: SweepOptions) -> Sweep:
    device = choose_device(options.device)
    if options.dim < 1 or options.heads < 1 or options.rounds < 1 or options.patience <= 0:
        raise InputError("dim, heads and rounds must be at least 1, and patience positive; give larger values.")
    if not options.what or set(options.what) - {"infer", "train"}:
        raise InputError(f"--what {','.join(options.what)!r} is not understood; give infer, train or infer,train.")
    labels = {text: parse_method(text) for text in options.methods}
    if len(labels) < len(options.methods):
        raise InputError("A method is listed twice; list each once, with different settings.")
    sources = {name: methods.load_method(name).source_sha256 for name, _ in labels.values()}
    limit = parse_bytes(options.memory) if options.memory else round(SHARE * free_bytes(device))
    found = environment(device)
    decides = [
        labels, sources, options.scope, options.dim, options.heads, str(device), options.patience, found.host,
        found.device, found.threads, found.commit, found.versions["torch"], options.memory,
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
        environment=found,
    )


def _resumed(sweep: Sweep, path: Path, console: Console) -> Sweep:
    """The stored sweep, if it is of the same key; otherwise the new one, and the stored one is put aside.

    What failed is tried again, and sizes beyond those asked for are chosen anew, because the budget may differ.
    """
    if not path.is_file():
        return sweep
    try:
        stored = Sweep.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path} is no sweep of this version of kitbench; move it away or change --out.") from error
    if stored.key != sweep.key:
        path.replace(aside := path.with_name(PREVIOUS))
        said = "has a sweep of other methods or options, of another machine or version of kitbench"
        console.print(f"{path} {said}: it is now {aside}", markup=False, highlight=False, soft_wrap=True)
        return sweep
    points = tuple(point for point in stored.points if point.status != "failed" and point.reason != BRACKET)
    return stored.model_copy(update={"budget": sweep.budget, "points": points})


def _backbone(options: SweepOptions) -> Any:
    return load_suite("denoise").backbone if options.scope == "model" else None
