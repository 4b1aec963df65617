"""The files of a sweep: a CSV of its points, and a Markdown page with exponents, points and a summary."""

from __future__ import annotations

import csv as csv_format
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tabulate import tabulate

from kitbench.store.files import write_atomic
from kitbench.store.sweeps import Point, Sweep, What
from kitbench.text import byte_size, significant
from kitbench.verdict.scaling.fit import COMPARED_BYTES, WORDS, Exponent, Quantity, crossings, curves, exponent, largest
from kitbench.verdict.scaling.plot import draw_sweep

QUANTITIES: dict[str, Quantity] = {
    "FLOPs": lambda point: point.macs,
    "memory": lambda point: point.bytes,
    "time": lambda point: point.seconds,
}
LINEAR = 1.1  # exponents up to this are called linear
_COLUMNS: dict[str, Callable[[Point], object]] = {
    "method": lambda p: p.method,
    "what": lambda p: p.what,
    "side_px": lambda p: p.size,
    "status": lambda p: p.status,
    "reason": lambda p: p.reason,
    "gmacs": lambda p: p.macs / 1e9,
    "gflops": lambda p: 2 * p.macs / 1e9,
    "closed_form_forward_gmacs": lambda p: None if p.macs_closed is None else p.macs_closed / 1e9,
    "needed_forward_gmacs": lambda p: None if p.macs_needed is None else p.macs_needed / 1e9,
    "flops_note": lambda p: p.macs_note,
    "comparisons": lambda p: p.comparisons,
    "exponentials": lambda p: p.exponentials,
    "gathered_bytes": lambda p: p.gathered_bytes,
    "peak_bytes": lambda p: p.peak_bytes,
    "predicted_bytes": lambda p: p.predicted_bytes,
    "reserved_bytes": lambda p: p.reserved_bytes,
    "resident_bytes": lambda p: p.resident_bytes,
    "seconds": lambda p: p.seconds,
    "seconds_q1": lambda p: p.quartiles and p.quartiles[0],
    "seconds_q3": lambda p: p.quartiles and p.quartiles[1],
    "rounds": lambda p: p.rounds,
    "dropped_rounds": lambda p: p.dropped,
    "noisy": lambda p: p.noisy,
}


def sweep_csv(sweep: Sweep) -> str:
    """One line a point, sorted by method, infer or train, and size; units stand in the header."""
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for method, what in curves(sweep):
        for point in sweep.curve(method, what):
            writer.writerow([column(point) for column in _COLUMNS.values()])
    return text.getvalue()


def sweep_markdown(sweep: Sweep) -> str:
    """The content of scale.md."""
    environment = sweep.environment
    parts = [
        "# Cost against resolution",
        f"{sweep.subject}, batch 1, float32; "
        f"{environment.device}, {environment.host}, {sweep.threads} threads, torch {environment.versions['torch']}, "
        f"commit {environment.commit}. "
        f"Memory limit of a point: {byte_size(sweep.memory_limit)}. Memory is the peak above the module and its input. "
        "Exponents are in pixels (1: linear in the number of pixels), with their 95 % intervals; those of time are "
        "fitted to measured points only, those of memory to measured and predicted ones. The interval of "
        "the largest side, in parentheses, comes from the sizes of the sweep and from how much predicted and measured "
        "memory differ.",
    ]
    for what in dict.fromkeys(what for _, what in curves(sweep)):
        parts += [f"## {WORDS[what].capitalize()}", _exponents(sweep, what), _points(sweep, what)]
    parts += ["## Summary", "\n".join(f"- {sentence}" for sentence in words(sweep))]
    return "\n\n".join(parts) + "\n"


def write_sweep(sweep: Sweep, folder: Path) -> list[Path]:
    """Write scale.csv, scale.md, scale.png and scale.svg into `folder`, which is there."""
    texts = {folder / "scale.csv": sweep_csv(sweep), folder / "scale.md": sweep_markdown(sweep)}
    for path, text in texts.items():
        write_atomic(path, text.encode())
    return [*texts, *draw_sweep(sweep, folder)]


def sweep_summary(sweep: Sweep) -> str:
    """For the terminal: exponents, the largest image within the budget, and the summary in sentences."""
    parts = []
    for what in dict.fromkeys(what for _, what in curves(sweep)):
        parts += [WORDS[what].capitalize(), _exponents(sweep, what, "simple")]
    return "\n\n".join([*parts, "\n".join(words(sweep))]) + "\n"


def _exponents(sweep: Sweep, what: What, form: str = "github") -> str:
    header = [
        "method",
        *(f"exponent of {name}" for name in QUANTITIES),
        f"largest side within {byte_size(sweep.budget)}, px",
    ]
    rows = []
    for method, _ in (curve for curve in curves(sweep) if curve[1] == what):
        points = sweep.curve(method, what)
        fits = [_shown(exponent(points, quantity)) for quantity in QUANTITIES.values()]
        rows.append([method, *fits, str(largest(sweep, method, what))])
    return tabulate(rows, header, tablefmt=form, disable_numparse=True)


def _shown(found: Exponent | None) -> str:
    if found is None:
        return "n/a"
    if found.half_width is None:
        return f"{found.value:.2f} (2 points)"
    return f"{found.value:.2f} ± {found.half_width:.2f}"


def _points(sweep: Sweep, what: What) -> str:
    header = ["method", "side, px", "GMACs", "GFLOPs", "peak memory", "time, ms", "quartiles", "rounds", "remark"]
    rows = []
    for method, _ in (curve for curve in curves(sweep) if curve[1] == what):
        for p in sweep.curve(method, what):
            memory = byte_size(p.bytes) if p.peak_bytes is not None else f"({byte_size(p.bytes)})"
            spread = "" if p.quartiles is None else "-".join(significant(1e3 * end) for end in p.quartiles)
            rounds = f"{p.rounds} (+{p.dropped} dropped)" if p.dropped else f"{p.rounds or ''}"
            time = "" if p.seconds is None else significant(1e3 * p.seconds)
            rows.append(
                [
                    method,
                    p.size,
                    significant(p.macs / 1e9, 4),
                    significant(2 * p.macs / 1e9, 4),
                    memory,
                    time,
                    spread,
                    rounds,
                    _remark(p),
                ]
            )
    note = "Peak memory in parentheses is predicted."
    return f"{tabulate(rows, header, tablefmt='github', disable_numparse=True)}\n\n{note}"


def _remark(point: Point) -> str:
    state = {"measured": "", "predicted": "predicted", "oom": "OOM"}.get(point.status, point.status)
    parts = [state, point.reason or "", point.macs_note or "", "noisy" if point.noisy else ""]
    return "; ".join(part for part in parts if part)


def failures(sweep: Sweep) -> list[str]:
    """A sentence for each point that failed for another reason than memory, time or a kill."""
    failed = (p for method, what in curves(sweep) for p in sweep.curve(method, what) if p.status == "failed")
    return [f"{p.method} failed at {p.size} px, {WORDS[p.what]}: {p.reason}" for p in failed]


def broken(sweep: Sweep) -> list[str]:
    """A sentence for each method that failed at every size that was tried."""
    sentences = []
    for method, what in curves(sweep):
        points = sweep.curve(method, what)
        reason = next((p.reason for p in points if p.status == "failed"), None)
        if reason is not None and not any(p.status in ("measured", "timeout", "killed") for p in points):
            sentences.append(f"{method}, {WORDS[what]}, failed at every size that was tried: {reason}")
    return sentences


def words(sweep: Sweep) -> list[str]:
    """Statements that the points support, one sentence each."""
    sentences: list[str] = []
    for what in dict.fromkeys(what for _, what in curves(sweep)):
        sentences += _growth(sweep, what) + _kernel_or_method(sweep, what) + _overtaking(sweep, what)
    return sentences + _trust(sweep) + [f"{failure}." for failure in failures(sweep)]


def _growth(sweep: Sweep, what: What) -> list[str]:
    sentences = []
    for name, quantity in QUANTITIES.items():
        fits = {method: exponent(sweep.curve(method, what), quantity) for method, w in curves(sweep) if w == what}
        known = {method: fit for method, fit in fits.items() if fit}
        steep = [f"{method} ({fit.value:.2f})" for method, fit in known.items() if _low(fit) > LINEAR]
        flat = [method for method, fit in known.items() if _high(fit) <= LINEAR]
        unsure = [f"{method} ({_shown(fit)})" for method, fit in known.items() if _low(fit) <= LINEAR < _high(fit)]
        groups = {"faster than linear": steep, "at most about linear": flat, "not decided": unsure}
        phrases = [f"{how} for {_list(methods)}" for how, methods in groups.items() if methods]
        if phrases:
            sentences.append(f"{WORDS[what]}: growth of {name} in pixels is {'; '.join(phrases)}.")
    return sentences


def _low(fit: Exponent) -> float:
    """The lower end of the interval; two points have none, and decide nothing."""
    return -math.inf if fit.half_width is None else fit.value - fit.half_width


def _high(fit: Exponent) -> float:
    return math.inf if fit.half_width is None else fit.value + fit.half_width


def _kernel_or_method(sweep: Sweep, what: What) -> list[str]:
    """Whether a gain over global attention comes from the kernel or the method, where both forms of it were swept."""
    forms = {
        settings.get("form", "sdpa"): label for label, (name, settings) in sweep.methods.items() if name == "global"
    }
    kit = next((label for label, (name, _) in sweep.methods.items() if name == "kit"), None)
    if set(forms) != {"materialised", "sdpa"} or kit is None:
        return []
    slope = {
        (label, name): found.value
        for label in (*forms.values(), kit)
        for name, quantity in QUANTITIES.items()
        if (found := exponent(sweep.curve(label, what), quantity)) and found.half_width is not None
    }
    plain, fused = forms["materialised"], forms["sdpa"]
    sentences = []
    # One size has no slope, two have one without an interval.
    saved = slope.get((plain, "memory"), 0) > 1.5 and slope.get((fused, "memory"), 9) <= LINEAR
    if saved and (kit, "memory") in slope:
        sentences.append(
            f"{WORDS[what]}: the memory saved over global attention comes from the kernel: with a fused kernel, memory "
            f"of global attention grows with exponent {slope[fused, 'memory']:.2f} in pixels (materialised: "
            f"{slope[plain, 'memory']:.2f}), that of kit with {slope[kit, 'memory']:.2f}."
        )
    if slope.get((fused, "time"), 0) > 1.5 and slope.get((kit, "time"), 9) < 1.5:
        sentences.append(
            f"{WORDS[what]}: the time saved comes from the method: time of global attention grows with exponent "
            f"{slope[fused, 'time']:.2f} in pixels even with a fused kernel, that of kit with {slope[kit, 'time']:.2f}."
        )
    return sentences


def _overtaking(sweep: Sweep, what: What) -> list[str]:
    labels = [method for method, w in curves(sweep) if w == what]
    sentences = []
    for name, quantity in QUANTITIES.items():
        for other in labels[1:]:
            for crossing in crossings(sweep.curve(labels[0], what), sweep.curve(other, what), quantity):
                side = "above" if crossing.cheaper_above else "below"
                less = "fewer" if name == "FLOPs" else "less"
                sentences.append(
                    f"{WORDS[what]}: {labels[0]} needs {less} {name} than {other} {side} {crossing.size:.0f} px."
                )
    return sentences


def _trust(sweep: Sweep) -> list[str]:
    """How well prediction, measurement and counts agree in this sweep."""
    sentences = []
    both = [p for p in sweep.points if (p.peak_bytes or 0) >= COMPARED_BYTES]
    if both:
        errors = [100 * abs(p.predicted_bytes / p.bytes - 1) for p in both]
        sentences.append(
            f"Predicted memory is within {max(errors):.1f} % of the measured one at all {len(both)} points that have "
            "both and take 16 MiB or more (below that, fixed-size buffers inside torch's kernels matter)."
        )
    checked = [p for p in sweep.points if p.resident_bytes and p.peak_bytes]
    if checked:
        errors = [100 * abs((p.resident_bytes or 0) / (p.peak_bytes or 1) - 1) for p in checked]
        sentences.append(
            f"The resident set of a fresh process is within {max(errors):.1f} % of the allocator's peak "
            f"at all {len(checked)} points where it was taken."
        )
    marked = sorted({f"{p.method} ({p.macs_note})" for p in sweep.points if p.macs_note})
    sentences += [f"FLOPs: closed form and count differ: {mark}." for mark in marked]
    sentences += _executed_and_needed(sweep)
    stated = [p for p in sweep.points if p.macs_closed is not None]
    if stated and not marked:
        sentences.append(f"Counted FLOPs equal the closed form to 1 % at all {len(stated)} points.")
    return sentences


def _executed_and_needed(sweep: Sweep) -> list[str]:
    """The two counts of a forward pass, at the largest size, of each method that executes more than it needs."""
    largest_of = {p.method: p for p in sorted(sweep.points, key=lambda p: p.size) if p.macs_needed is not None}
    return [
        f"{method} executes {significant((p.macs_closed or 0) / 1e9, 4)} GMACs in a forward pass at {p.size} px, of "
        f"which its definition needs {significant(p.macs_needed / 1e9, 4)}."
        for method, p in largest_of.items()
        if p.macs_needed is not None
    ]


def _list(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]
