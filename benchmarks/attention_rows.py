"""How benchmarks/attention.py measures: the rates of the device, and of a case a row for each operator and pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import attention_family
import torch
from attention_operators import (
    DTYPES,
    Case,
    Failure,
    Operator,
    bare,
    modules,
    one_line,
    precision,
    searching,
    tokens,
)
from attention_table import PASSES, Row, line

from kitbench.cost import memory, timing
from kitbench.system.environment import gpu_state

SECONDS = {"cpu": 40, "cuda": 8}  # at most, for the rounds of one case, scope and pass
WITHOUT_BACKWARD = ("reference", "global sdpa", *attention_family.NAMES)  # modules, measured forward and in training
MAPS_AT_ONCE = 40  # float32 maps that a case may hold: where so much is not free, it is not run


class Lost(Exception):
    """The device takes no more work from this process: an error that CUDA does not recover from."""


def rates(device: torch.device, dtypes: list[str], rounds: int) -> tuple[dict[str, float], float]:
    """Multiply-adds a second of a product of square matrices, by type; bytes a second that a copy reads and writes."""
    cuda, products = device.type == "cuda", {}
    for dtype in dtypes:
        # Many CPUs know no bfloat16, and emulate it a hundred times slower than float32.
        side = 8192 if cuda else 256 if dtype == "bfloat16" else 2048
        a, b = torch.randn(2, side, side, device=device).to(DTYPES[dtype])
        with precision(dtype):
            products[dtype] = side**3 / median_seconds(partial(torch.matmul, a, b), device, rounds)
    source = torch.randn(1 << (28 if cuda else 26), device=device)
    target = torch.empty_like(source)
    return products, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, rounds)


def median_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    return timing.compare_times({"": timing.sampler(call, device, least(rounds))}, rounds)[""].median


def least(rounds: int) -> float | None:
    """Seconds of a sample; with one round, single calls."""
    return None if rounds > 1 else 0.0


def measure_case(
    case: Case, rounds: int, device: torch.device, product_rate: float, copy_rate: float, stored: dict[str, Any]
) -> None:
    """Add the rows of a case to `stored`, and on CUDA the state of the device at work.  Raises Lost."""
    need, free = MAPS_AT_ONCE * 4 * case.pixels**2 * case.dim, memory.free_bytes(device)
    if need > free:
        reason = f"a case may take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        stored["rows"].append(head(case, "module", "forward", "kit") | {"status": "not run", "reason": reason})
        return
    x = tokens(case, device)
    for scope, modes in (
        ("module", PASSES),
        ("operator", ("forward", "backward")),
        ("cutting", ("forward", "backward")),
    ):
        operators = modules(case, x) if scope == "module" else bare(case, x, scope)
        for mode in modes:
            if mode == "backward":
                operators = {name: one for name, one in operators.items() if name not in WITHOUT_BACKWARD}
            wanted = operators | ({"retrieval": searching(case, x)} if (scope, mode) == ("module", "forward") else {})
            calls, reasons, peaks = prepare(wanted, mode, device, with_memory=scope == "module" and mode != "backward")
            times = timed(calls, rounds, device, reasons)
            floor = case.macs(scope, mode, "kit") / product_rate + case.least_bytes(scope, mode) / copy_rate
            for name, operator in wanted.items():
                row = head(case, scope, mode, name) | {"backend": operator.backend and operator.backend.name}
                if name in attention_family.NAMES:
                    row["keys"] = operator.keys
                if name in reasons:
                    status, row["reason"] = reasons[name]
                    row["status"] = status
                else:
                    row |= figures(times[name], peaks.get(name), case)
                    row["floor_seconds"] = floor
                    if name.startswith(("kit", "window")):
                        row["product_share"] = case.macs(scope, mode, name) / times[name].median / product_rate
                        row["copy_share"] = case.least_bytes(scope, mode) / times[name].median / copy_rate
                    for other in ("window", "window sdpa", "window no bias", "window cudnn"):
                        if other in times:
                            row[f"time over {other}"] = timing.ratio(times[name], times[other])
                        if other in peaks and name in peaks and other in times:
                            row[f"memory over {other}"] = peaks[name] / peaks[other]
                stored["rows"].append(row)
                print(line(row), flush=True)
            if device.type == "cuda" and (scope, mode) == ("module", "training"):
                stored["gpu_states"].append(asdict(case) | gpu_state(device, calls["kit"] if "kit" in times else None))
            del calls  # and with them the graphs of backward passes, before the next are built


def prepare(
    operators: dict[str, Operator], mode: str, device: torch.device, with_memory: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, tuple[str, str]], dict[str, int]]:
    """(calls that ran, of the others their status and why, peak bytes), by operator."""
    calls: dict[str, Callable[[], object]] = {}
    reasons, peaks = {}, {}
    for name, operator in operators.items():
        try:
            call = operator.prepared(mode)
            if with_memory:
                peaks[name] = memory.peak_bytes(call, device)
            calls[name] = call
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this row's result
            optional = operator.optional and isinstance(error, Failure)
            reasons[name] = ("not run" if optional else "failed", why(name, error, device))
    return calls, reasons, peaks


def timed(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device, reasons: dict[str, tuple[str, str]]
) -> dict[str, timing.Timing]:
    """Interleaved rounds; where a call fails, `reasons` tells, and the others start their rounds again."""
    samplers: dict[str, Callable[[], timing.Sample]] = {}
    asked = ""

    def taking(name: str, take: Callable[[], timing.Sample]) -> Callable[[], timing.Sample]:
        def sample() -> timing.Sample:
            nonlocal asked
            asked = name
            return take()

        return sample

    for name, call in calls.items():
        try:
            samplers[name] = taking(name, timing.sampler(call, device, least(rounds)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this row's result
            reasons[name] = ("failed", why(name, error, device))
    while samplers:
        try:
            return timing.compare_times(samplers, rounds, SECONDS[device.type])
        except Exception as error:  # noqa: BLE001 - as above
            del samplers[asked]
            reasons[asked] = ("failed", why(asked, error, device))
    return {}


def why(name: str, error: Exception, device: torch.device) -> str:
    """An operator's error in one line.  Raises Lost where the device has not survived it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise Lost(f"{name}: {one_line(error)}") from lost
    return one_line(error)


def head(case: Case, scope: str, mode: str, operator: str) -> Row:
    return asdict(case) | {"heads": case.heads, "scope": scope, "mode": mode, "operator": operator}


def figures(timed: timing.Timing, peak: int | None, case: Case) -> Row:
    return {
        "status": "measured",
        "seconds": timed.median,
        "quartiles": timed.quartiles,
        "noisy": timed.noisy,
        "rounds": len(timed.samples),
        "dropped": timed.dropped,
        "launch_bound": timed.launch_bound,
        "host_seconds": timed.host,
        "peak_bytes": peak,
        "peak_maps": None if peak is None else peak / (4 * case.pixels**2 * case.dim),
    }
