"""`kitbench claims`: the six statements of the KiT paper, as we read its abstract, put to the test by stored runs.

A statement is broken into parts that stored numbers can answer. A part about quality is one paired difference over all
images of the longest recipe that was stored (each image's mean over its conditions), at 5 % after Holm's correction
over all parts. A part about cost is an exponent in pixels, from a sweep (`kitbench scale`). A statement is supported
where all its parts are, not supported where one part is contradicted, and not decided otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from kitbench.errors import InputError
from kitbench.spec.shipped import suite_names
from kitbench.spec.tasks import Kind
from kitbench.store.folder import RunFolder, find
from kitbench.store.sweeps import Point, Sweep
from kitbench.verdict.compare import Column, Compared, adjusted, pooled
from kitbench.verdict.entries import Entry, entries, labels, mean_psnr, under
from kitbench.verdict.statistics import difference, mean_interval

Verdict = Literal["supported", "not supported", "not decided by these runs"]
OPEN: Verdict = "not decided by these runs"
LINEAR, QUADRATIC = 1.1, 1.5
"""Exponents in pixels up to the first are called linear, from the second on quadratic."""
DEAR = 10.0
"""So many times window attention's multiply-adds are called too dear for full resolution."""
FULL_STEPS = 100_000
"""Training steps from which on a run may speak of the state of the art."""

STATEMENTS = (
    "Global similarity lacks locality, and its cost is quadratic in the input resolution.",
    "Local attention sees adjacent positions only: too small a receptive field for restoration.",
    "KiT groups the k nearest patches by hashing and aggregates them by pair-wise local attention.",
    "KiT has non-local connectivity, the locality bias, and linear complexity in the input resolution.",
    "KiT is better than the state of the art of its day on denoising, deblurring and deraining.",
    "Non-local layers are normally used only on low-resolution maps because of their cost.",
)


@dataclass(frozen=True)
class Part:
    """One testable part of a statement."""

    question: str
    verdict: Verdict
    evidence: str
    runs: tuple[str, ...] = ()
    command: str = ""
    """What would decide it; empty where it is decided."""


@dataclass(frozen=True)
class Claim:
    """One statement, and what the runs say of it."""

    number: int
    statement: str
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> Verdict:
        found = {part.verdict for part in self.parts}
        return "not supported" if "not supported" in found else OPEN if OPEN in found else "supported"


@dataclass(frozen=True)
class Block:
    """The runs of one comparison by method, then by data set and condition."""

    methods: dict[str, dict[Column, list[Entry]]]

    @property
    def first(self) -> Entry:
        return next(group[0] for columns in self.methods.values() for group in columns.values())

    @property
    def weight(self) -> tuple[int, bool, int]:
        """Longest training first, then colour, then most methods."""
        recipe = self.first.run.recipe
        assert recipe is not None
        return recipe.steps * recipe.batch * recipe.crop**2, self.first.run.mode == "colour", len(self.methods)


def load(paths: Sequence[Path]) -> tuple[list[RunFolder], list[Sweep]]:
    """Runs and sweeps in these folders, or one folder below. Raises InputError where a folder holds neither."""
    runs, sweeps = [], []
    for path in paths:
        found = [p for p in [path / "scale.json", *sorted(path.glob("*/scale.json"))] if p.is_file()]
        sweeps += [_sweep(p) for p in found]
        if not found or (path / "run.json").is_file() or any(path.glob("*/run.json")):
            runs += find([path])
    return runs, sweeps


def _sweep(path: Path) -> Sweep:
    from kitbench.store.sweeps import Sweep

    try:
        return Sweep.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path} is no sweep of this version of kitbench; make it anew by `kitbench scale`."
        ) from error


def blocks(found: Sequence[Entry]) -> list[Block]:
    """The comparisons among these entries, the weightiest first; training-free methods are in none."""
    names = labels(found)
    grouped: dict[str, dict[str, dict[Column, list[Entry]]]] = {}
    for entry in sorted(found, key=lambda e: (names[e.run.key, e.run.method], e.run.seed or 0)):
        if entry.run.comparison:
            columns = grouped.setdefault(entry.run.comparison, {}).setdefault(
                names[entry.run.key, entry.run.method], {}
            )
            columns.setdefault((entry.evaluation.data_set, entry.evaluation.condition), []).append(entry)
    return sorted((Block(methods) for _, methods in sorted(grouped.items())), key=lambda b: b.weight, reverse=True)


TASKS: dict[Kind, str] = {"denoise": "denoising", "deblur": "deblurring", "derain": "deraining"}
"""The tasks that the paper claims."""


def claims(runs: Sequence[RunFolder], sweeps: Sequence[Sweep], protocol: str | None = None) -> list[Claim]:
    """All six, in order. Raises InputError for runs of one task and two protocols."""
    longest = {kind: found[0] for kind, found in _by_task(runs, protocol).items() if found}
    main = longest.get("denoise") or max(longest.values(), key=lambda block: block.weight, default=None)
    quality = _quality(main, longest)
    return [
        Claim(1, STATEMENTS[0], (quality["locality"], _quadratic(sweeps))),
        Claim(2, STATEMENTS[1], (quality["reach"],)),
        Claim(3, STATEMENTS[2], (_recall(main), quality["retrieval"])),
        Claim(4, STATEMENTS[3], (quality["connectivity"], quality["bias"], _linear(sweeps))),
        Claim(5, STATEMENTS[4], tuple(quality[kind] for kind in TASKS)),
        Claim(6, STATEMENTS[5], (_dear(sweeps),)),
    ]


def _by_task(runs: Sequence[RunFolder], protocol: str | None) -> dict[str, list[Block]]:
    """The comparisons of each task: tasks have protocols of their own, which never meet."""
    kinds: dict[str, list[RunFolder]] = {}
    for folder in runs:
        kinds.setdefault(folder.run.task.kind, []).append(folder)
    if protocol is not None:
        entries(runs, protocol)  # refuses one that nothing was scored under
    scored = {
        kind: [f for f in folders if protocol is None or any(under(e, protocol) for e in f.evaluations())]
        for kind, folders in kinds.items()
    }
    return {kind: blocks(entries(folders, protocol)) for kind, folders in scored.items() if folders}


QUESTIONS = {
    "locality": ("local", "global", "Under one recipe, does local attention restore better than global attention?"),
    "reach": ("kit", "local", "Does reaching beyond adjacent positions (KiT) restore better than local attention?"),
    "retrieval": ("kit", "kit-random", "Do the nearest patches restore better than as many random ones?"),
    "connectivity": ("kit", "window", "Does non-local connectivity (KiT) restore better than windows?"),
    "bias": ("kit", "global", "Does KiT's locality restore better than global attention?"),
}


def _quality(main: Block | None, longest: Mapping[str, Block]) -> dict[str, Part]:
    """Every question about quality, by name, and whether KiT is best, by task; corrected together."""
    asked = {name: (main, a, b, question) for name, (a, b, question) in QUESTIONS.items()}
    for kind, task in TASKS.items():
        block = longest.get(kind)
        asked[kind] = block, "kit", _best_but_kit(block), f"On {task}, does KiT restore best of all attentions?"
    found = {name: None if block is None else compare_methods(block, a, b) for name, (block, a, b, _) in asked.items()}
    answered = {name: compared for name, compared in found.items() if compared is not None}
    answered = dict(zip(answered, adjusted(list(answered.values())), strict=True))
    parts = {}
    for name, (block, a, b, question) in asked.items():
        if name in answered:
            part = _judged(question, answered[name], block)
            parts[name] = _state_of_the_art(part, block) if name in TASKS else part
        else:
            parts[name] = Part(
                question, OPEN, f"no stored runs of both {a} and {b} under one recipe",
                command=run_command(block, [] if name in TASKS else [a, b], 5, name if name in TASKS else "denoise"),
            )  # fmt: skip
    return parts


def _best_but_kit(block: Block | None) -> str:
    others = [name for name in (block.methods if block else ()) if not name.startswith("kit")]
    if block is None or not others:
        return "the best other attention"

    def mean(name: str) -> float:
        return float(np.mean([mean_psnr(e) for group in block.methods[name].values() for e in group]))

    return max(others, key=mean)


def compare_methods(block: Block, a: str, b: str) -> Compared | None:
    """Method a against b over all images of a comparison; None where there is nothing to pair."""
    if a not in block.methods or b not in block.methods:
        return None
    d = pooled(block.methods[a], block.methods[b])
    if d is None:
        return None
    used = {e.run.key[:10]: None for name in (a, b) for group in block.methods[name].values() for e in group}
    return Compared(a, b, difference(d), tuple(used))


def _judged(question: str, compared: Compared, block: Block | None) -> Part:
    verdict: Verdict = OPEN
    if compared.decided:
        verdict = "supported" if compared.found.mean > 0 else "not supported"
    command = run_command(block, [compared.a, compared.b], max(5, 2 * compared.found.seeds)) if verdict == OPEN else ""
    return Part(question, verdict, told(compared), compared.runs, command)


def told(compared: Compared) -> str:
    """A difference in words: figure, interval, p, and what it rests on."""
    found = compared.found
    text = f"{compared.a} - {compared.b}: {found.mean:+.3f} dB"
    if found.interval is not None:
        text += f", 95 % interval [{found.interval.low:+.3f}, {found.interval.high:+.3f}]"
    if found.interval_seeds is not None:
        text += f" (on these images alone [{found.interval_seeds.low:+.3f}, {found.interval_seeds.high:+.3f}])"
    if compared.p_holm is not None:
        text += f", adjusted p {compared.p_holm:.3g}"
    seeds, images = (f"{n} {what}{'s' * (n > 1)}" for n, what in ((found.seeds, "seed"), (found.images, "image")))
    text += f"; {seeds}, {images}"
    if found.detectable is not None:
        text += f", which show {found.detectable:.3f} dB on 4 times of 5"
    return text + (f"; {found.note}" if found.note else "")


def _recall(block: Block | None) -> Part:
    """What KiT's runs noted of their retrieval after training, a value a seed: the mean over the attention's places."""
    question = "Does hashing find more of the k nearest patches than chance would?"
    command = run_command(block, ["kit"], 5)
    entries_of_kit = [e for group in (block.methods.get("kit", {}) if block else {}).values() for e in group]
    noted = {e.run.key[:10]: list(e.training.notes.values()) for e in entries_of_kit if e.training and e.training.notes}
    if not noted:
        return Part(question, OPEN, "no stored run of kit noted the recall of its retrieval", command=command)
    recalls, chances = (
        np.array([np.mean([place[key] for place in places]) for places in noted.values()])
        for key in ("recall", "chance")
    )
    interval = mean_interval(recalls - chances)
    words = f"recall {recalls.mean():.3f}, of chance {chances.mean():.3f}, over {len(recalls)} seeds"
    if interval is None:
        return Part(question, OPEN, f"{words}: no interval", tuple(noted), command)
    words += f"; 95 % interval of the gain [{interval.low:+.3f}, {interval.high:+.3f}]"
    verdict: Verdict = "supported" if interval.low > 0 else "not supported" if interval.high < 0 else OPEN
    return Part(question, verdict, words, tuple(noted), command if verdict == OPEN else "")


def _state_of_the_art(part: Part, block: Block | None) -> Part:
    """A short recipe says nothing of the state of the art, whatever it measured."""
    steps = block.first.run.recipe.steps if block and block.first.run.recipe else 0
    if steps >= FULL_STEPS or part.verdict == OPEN:
        return part
    return replace(
        part, verdict=OPEN,
        evidence=f"{part.evidence}; but {steps} steps of training say nothing of the state of the art",
        command=run_command(None, [], 5, block.first.run.task.kind if block else "denoise"),
    )  # fmt: skip


def run_command(block: Block | None, methods: Sequence[str], seeds: int, task: str = "denoise") -> str:
    """The command whose runs would decide: more seeds and the public test sets, of this recipe or the full one."""
    suite, preset = (block.first.run.suite, block.first.run.preset) if block else (task, "full")
    suite = suite if suite in suite_names() else f"{suite}.toml"  # the user's own file
    chosen = "".join(f" --method {name}" for name in methods if " " not in name)
    seeds_text = ",".join(map(str, range(seeds)))
    return f"python -m kitbench run --suite {suite} --preset {preset}{chosen} --seeds {seeds_text} --data DIR --out OUT"


SWEEP = "python -m kitbench scale --sizes 64:4096 --out OUT"


def _curve(sweeps: Sequence[Sweep], method: str) -> tuple[Sweep, list[Point]] | None:
    """The longest inference curve of a method."""
    found = [
        (sweep, sweep.curve(label, "infer"))
        for sweep in sweeps
        for label, (name, _) in sweep.methods.items()
        if name == method
    ]
    return max(found, key=lambda pair: len(pair[1]), default=None)


def _exponents(
    sweeps: Sequence[Sweep], method: str
) -> tuple[dict[str, tuple[float, float]], str, tuple[str, ...]] | None:
    """Value and lower end of the interval of each exponent of a method, in words, and the sweep's key."""
    from kitbench.verdict.scaling.fit import exponent

    found = _curve(sweeps, method)
    if found is None:
        return None
    sweep, points = found
    fits = {
        "multiply-adds": exponent(points, lambda p: p.macs),
        "memory": exponent([p for p in points if p.peak_bytes is not None], lambda p: p.peak_bytes),
        "time": exponent(points, lambda p: p.seconds),
    }
    fits = {name: fit for name, fit in fits.items() if fit is not None and fit.half_width is not None}
    if "multiply-adds" not in fits:
        return None
    words = ", ".join(f"{name} {f.value:.2f} ± {f.half_width:.2f} ({f.points} sizes)" for name, f in fits.items() if f)
    sizes = f"{points[0].size} to {points[-1].size} px"
    values = {name: (f.value, f.value - (f.half_width or 0)) for name, f in fits.items() if f}
    return values, f"exponents in pixels of {method} from {sizes}: {words}", (f"sweep {sweep.key[:10]}",)


def _quadratic(sweeps: Sequence[Sweep]) -> Part:
    question = f"Do the multiply-adds of global attention grow with an exponent in pixels of {QUADRATIC} or more?"
    found = _exponents(sweeps, "global")
    if found is None:
        return Part(question, OPEN, "no sweep of global attention over three sizes is stored", command=SWEEP)
    values, words, runs = found
    value, low = values["multiply-adds"]
    verdict: Verdict = "supported" if low >= QUADRATIC else "not supported" if value < QUADRATIC else OPEN
    return Part(question, verdict, words, runs, SWEEP if verdict == OPEN else "")


def _linear(sweeps: Sequence[Sweep]) -> Part:
    question = f"Do multiply-adds, memory and time of KiT grow with exponents in pixels of {LINEAR} or less?"
    found = _exponents(sweeps, "kit")
    if found is None:
        return Part(question, OPEN, "no sweep of KiT over three sizes is stored", command=SWEEP)
    values, words, runs = found
    if any(low > LINEAR for _, low in values.values()):
        return Part(question, "not supported", words, runs)
    if len(values) == 3 and all(value <= LINEAR for value, _ in values.values()):
        return Part(question, "supported", words, runs)
    return Part(question, OPEN, words, runs, SWEEP)


def _dear(sweeps: Sequence[Sweep]) -> Part:
    question = f"Does global attention take {DEAR:g} times window attention's multiply-adds or more on large maps only?"
    pair = [(s, _curve([s], "global"), _curve([s], "window")) for s in sweeps]
    both = [(s, {p.size: p for p in a[1]}, {p.size: p for p in b[1]}) for s, a, b in pair if a and b]
    if not both:
        return Part(question, OPEN, "no sweep of both global and window attention is stored", command=SWEEP)
    sweep, dear, cheap = max(both, key=lambda found: len(found[1].keys() & found[2].keys()))
    ratio = {size: dear[size].macs / cheap[size].macs for size in sorted(dear.keys() & cheap.keys())}
    words = "global / window: " + ", ".join(f"{r:.3g} at {size} px" for size, r in ratio.items())
    small, large = min(ratio), max(ratio)
    verdict: Verdict = OPEN
    if ratio[large] < DEAR:
        verdict = "not supported" if large >= 256 else OPEN
    elif ratio[small] < DEAR:
        verdict = "supported"
    command = "" if verdict != OPEN else SWEEP.replace("64:4096", "16:1024")
    return Part(question, verdict, words, (f"sweep {sweep.key[:10]}",), command)


def markdown(found: Sequence[Claim]) -> str:
    """The claims as a page."""
    lines = ["# The claims, one by one", ""]
    for claim in found:
        lines += [f"## {claim.number}. {claim.statement}", "", f"**{claim.verdict}**", ""]
        for part in claim.parts:
            lines.append(f"- {part.question} **{part.verdict}**: {part.evidence}.")
            if part.runs:
                lines.append(f"  Runs: {', '.join(part.runs)}.")
            if part.command:
                lines.append(f"  To decide it: `{part.command}`")
        lines.append("")
    return "\n".join(lines)
