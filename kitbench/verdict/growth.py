"""What a stored sweep says about the statements on cost: parts of claims that need no training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kitbench.store.sweeps import Point, Sweep
from kitbench.text import significant
from kitbench.verdict.contrasts import UNDECIDED, Verdict, combined
from kitbench.verdict.scaling.fit import Exponent, exponent

LINEAR, QUADRATIC = 1.1, 1.5
"""Exponents in pixels up to the first are called linear, from the second on quadratic."""
COSTLY_RATIO = 10.0
"""So many times window attention's multiply-adds are called too many for full resolution."""


@dataclass(frozen=True)
class Part:
    """One testable part of a statement."""

    question: str
    verdict: Verdict
    facts: tuple[str, ...]
    """What was measured, a sentence each, without full stops."""
    runs: tuple[str, ...] = ()
    command: str = ""
    """The next step towards a decision; empty where there is one, or where no run can bring it."""
    reason: str = ""
    """Why it is not decided."""
    figure: str = ""
    """What was measured, in a few words; of a contrast the longest training by one recipe. Empty where nothing was."""
    by_construction: bool = False
    """Whether counted operations decide it, which follow from the definition of the method and not from a trial."""

    @property
    def measured(self) -> str:
        """What was measured, in a few words, or that nothing was."""
        return self.figure or "not measured by these runs"

    @property
    def short(self) -> str:
        """The verdict, and whether it follows by construction."""
        return (
            f"{self.verdict} (by construction)" if self.by_construction and self.verdict != UNDECIDED else self.verdict
        )

    @property
    def words(self) -> str:
        """The verdict with its reason."""
        return f"{self.verdict}: {self.reason}" if self.verdict == UNDECIDED and self.reason else self.short


SWEEP = "python -m kitbench scale --sizes 64:4096 --out OUT"


def quadratic_part(sweeps: Sequence[Sweep]) -> Part:
    """Part: do the multiply-adds of global attention grow with an exponent in pixels of QUADRATIC or more?"""
    question = f"Do the multiply-adds of global attention grow with an exponent in pixels of {QUADRATIC} or more?"
    return _exponents(
        sweeps, "global", ("multiply-adds",), question,
        lambda low, high: "supported" if low >= QUADRATIC else "not supported" if high < QUADRATIC else UNDECIDED,
    )  # fmt: skip


def linear_operations(sweeps: Sequence[Sweep]) -> Part:
    """Part: do the multiply-adds of KiT grow with an exponent in pixels of LINEAR or less?"""
    question = f"Do the multiply-adds of KiT grow with an exponent in pixels of {LINEAR} or less?"
    return _exponents(sweeps, "kit", ("multiply-adds",), question, _linear)


def linear_measured(sweeps: Sequence[Sweep]) -> Part:
    """Part: do the measured memory and time of KiT grow with exponents in pixels of LINEAR or less?"""
    question = f"Do the memory and the time of KiT in restoration grow with exponents in pixels of {LINEAR} or less?"
    return _exponents(sweeps, "kit", ("memory", "time"), question, _linear)


def _linear(low: float, high: float) -> Verdict:
    return "supported" if high <= LINEAR else "not supported" if low > LINEAR else UNDECIDED


QUANTITIES: dict[str, Callable[[Point], float | None]] = {
    "multiply-adds": lambda point: point.macs,
    "memory": lambda point: point.peak_bytes,
    "time": lambda point: point.seconds,
}


def _exponents(
    sweeps: Sequence[Sweep], method: str, quantities: Sequence[str], question: str,
    verdict: Callable[[float, float], Verdict],
) -> Part:  # fmt: skip
    """A part that is supported where the whole 95 % interval of every exponent lies on the right side of its bound.

    verdict: of the ends of one interval.
    """
    found = _curve(sweeps, method, quantities)
    fits: dict[str, Exponent] = {}
    if found is not None:
        every = {name: exponent(found[1], QUANTITIES[name]) for name in quantities}
        fits = {name: fit for name, fit in every.items() if fit is not None and fit.half_width is not None}
    if found is None or len(fits) < len(quantities):
        absent = " and ".join(name for name in quantities if name not in fits)
        reason = f"no sweep with the {absent} of {method} at three sizes is stored"
        return Part(question, UNDECIDED, (), command=SWEEP, reason=reason)
    sweep, points = found
    words = ", ".join(
        f"{name} {f.value:.2f} ± {f.half_width or 0:.2f} ({_sizes(points, name)})" for name, f in fits.items()
    )
    short = ", ".join(f"{name} {f.value:.2f} ± {f.half_width or 0:.2f}" for name, f in fits.items())
    verdicts = {verdict(f.value - (f.half_width or 0), f.value + (f.half_width or 0)) for f in fits.values()}
    worst = combined(verdicts)
    return Part(
        question, worst, (f"exponents in pixels of {method}: {words}",),
        (f"sweep {sweep.key[:10]}",), SWEEP if worst == UNDECIDED else "",
        "an interval holds the bound" if worst == UNDECIDED else "", f"exponent of {short}",
        by_construction=quantities == ("multiply-adds",),
    )  # fmt: skip


def _sizes(points: Sequence[Point], quantity: str) -> str:
    """Where a quantity is known: `5 sizes from 64 to 1024 px`."""
    sizes = [point.size for point in points if QUANTITIES[quantity](point)]
    return f"{len(sizes)} sizes from {sizes[0]} to {sizes[-1]} px"


def _curve(
    sweeps: Sequence[Sweep], method: str, quantities: Sequence[str] = ("multiply-adds",)
) -> tuple[Sweep, list[Point]] | None:
    """The inference curve of a method, of the attention alone, with the default settings, in any form.

    Of several, that which has the quantities at most sizes, then the longest.
    """
    found = [
        (sweep, sweep.curve(label, "infer"))
        for sweep in sweeps
        for label, (name, settings) in sweep.methods.items()
        if name == method and settings.keys() <= {"form"} and sweep.scope == "attention"
    ]

    def known(pair: tuple[Sweep, list[Point]]) -> tuple[int, int]:
        return min(sum(QUANTITIES[name](p) is not None for p in pair[1]) for name in quantities), len(pair[1])

    return max(found, key=known, default=None)


def costly_part(sweeps: Sequence[Sweep]) -> Part:
    """Of global attention against windows, on small and on large maps."""
    times = f"{COSTLY_RATIO:g} times window attention's multiply-adds or more"
    question = f"Does global attention take {times} on large maps only?"
    pair = [(s, _curve([s], "global"), _curve([s], "window")) for s in sweeps]
    both = [(s, {p.size: p for p in a[1]}, {p.size: p for p in b[1]}) for s, a, b in pair if a and b]
    both = [found for found in both if found[1].keys() & found[2].keys()]
    if not both:
        reason = "no sweep of both global and window attention is stored"
        return Part(question, UNDECIDED, (), command=SWEEP, reason=reason)
    sweep, ours, theirs = max(both, key=lambda found: len(found[1].keys() & found[2].keys()))
    ratio = {size: ours[size].macs / theirs[size].macs for size in sorted(ours.keys() & theirs.keys())}
    words = "global / window: " + ", ".join(f"{significant(r)} at {size} px" for size, r in ratio.items())
    small, large = min(ratio), max(ratio)
    verdict, reason = UNDECIDED, ""
    if ratio[large] < COSTLY_RATIO:
        verdict, reason = ("not supported", "") if large >= 256 else (UNDECIDED, "the sweep holds small maps only")
    elif ratio[small] < COSTLY_RATIO:
        verdict = "supported"
    else:
        reason = "the sweep holds no map small enough"
    command = SWEEP.replace("64:4096", "16:1024") if verdict == UNDECIDED else ""
    short = "ratio " + " and ".join(
        f"{significant(ratio[size])} at {size} px" for size in dict.fromkeys((small, large))
    )
    return Part(question, verdict, (words,), (f"sweep {sweep.key[:10]}",), command, reason, short, by_construction=True)
