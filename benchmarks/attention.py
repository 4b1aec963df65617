"""Time and peak memory of the attention operators, against window attention with as many keys a query, and against the
floor.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/attention.py   # measures: attention.json, attention.png
    python benchmarks/attention.py --device cuda --dtypes bfloat16 --dims 32 --json a.json    # a part of it, on a GPU
    python benchmarks/attention.py --markdown                # prints the table of the stored JSON
    python benchmarks/attention.py --markdown --json a.json b.json     # of several parts from one machine

One image of 64 to 1024 px (bfloat16 on CUDA: 2048), C = 32 (1 head) and 64 (2 heads), 8 x 8 patches, k = 4 and 8.  All
operators of a case are timed in shuffled, interleaved rounds; ratios are medians of the rounds' ratios.

    kit             k-NN patch attention with LSH retrieval (kitbench/attention/kit.py)
    reference       the same through the readable definition (kitbench/attention/reference.py)
    window          window attention with 64 k keys a query and a learned bias, through the same registered operator
    window sdpa     the same through scaled_dot_product_attention, which on the CPU holds all logits while it trains the
                    bias
    window no bias  the same without a bias: torch's fused kernel forward and backward, the fastest there is
    window cudnn    the same by cuDNN's kernel, on CUDA where it takes the tables
    global sdpa     every position attends every position, through the fused kernel; it and the reference in float32
    retrieval       the search of kit alone
    cut and join    a map cut into the patches of kit and joined again

What runs (scope):  module, the whole attention with projections, retrieval, cutting and joining; operator, the bare
operator on ready tables of queries, keys and values; cutting, the operator with one map to cut before it and one to
join behind it, as in the module.  Passes: forward without gradients; training, forward with backward for the input and
all parameters; backward alone, of a forward pass made before.  Which of torch's kernels runs is forced, so that no
other can, and stored as 'backend'.

Types: float32; tf32, the same with products of float32 on CUDA's tensor cores in TensorFloat-32; bfloat16, modules
under autocast with float32 weights and input, as the training loop runs them, bare operators on bfloat16 tables.

The floor is the closed form of kit over the measured rate of matrix products of the type, plus the least traffic over
the measured rate of copies: for the module 10 maps forward and 18 backward, for the operator 4 and 8, with cutting 4
more each.  Backward counts twice the projections and 2.5 times the attention.

An operator that fails gets a row that says why, and the others go on.  Exit codes: 0; 2, bad options; 3, kit or a
window failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
import torch.nn.functional as F
from attention_table import PASSES, Row, exponents, failures, line, markdown, merged, picture
from kitbench.baselines import global_
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kitbench.attention import kit, layout, reference
from kitbench.attention.operator import patch_attention
from kitbench.cost import memory, timing
from kitbench.errors import InputError
from kitbench.system.environment import choose_device, device_name, environment, gpu_state

HERE = Path(__file__).parent
ROUNDS = {64: 7, 128: 5, 256: 5, 512: 5, 1024: 3}
CUDA_ROUNDS = 9
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS = {"cpu": 40, "cuda": 8}  # at most, for the rounds of one case, scope and pass
REFERENCE_UP_TO = 512
GLOBAL_UP_TO = 128
MAPS_AT_ONCE = 40  # float32 maps that a case may hold: where so much is not free, it is not run
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Case:
    """One shape and type: `k` neighbours of 64 positions, or windows of 64 k positions."""

    dim: int
    k: int
    pixels: int
    dtype: str

    @property
    def heads(self) -> int:
        return self.dim // 32

    @property
    def map_bytes(self) -> int:
        """Of H W C numbers of the tables' type."""
        return self.pixels**2 * self.dim * DTYPES[self.dtype].itemsize

    def macs(self, scope: str, mode: str, operator: str) -> int:
        """Multiply-adds of kit, or of window attention with as many keys."""
        area = self.pixels**2
        attention = 2 * area * 64 * min(self.k, area // 64) * self.dim
        projections = search = 0
        if scope == "module":
            projections = 4 * area * self.dim**2
            if operator == "kit":
                search = kit.Attention(self.dim, self.heads, k=self.k).retrieval_macs(area // 64, self.dim)
        forward, backward = attention + projections + search, 2 * projections + attention * 5 // 2
        return {"forward": forward, "backward": backward, "training": forward + backward}[mode]

    def least_bytes(self, scope: str, mode: str) -> int:
        """What must be read and written at least."""
        forward, backward = {"module": (10, 18), "operator": (4, 8), "cutting": (8, 12)}[scope]
        return self.map_bytes * {"forward": forward, "backward": backward, "training": forward + backward}[mode]


class Window(nn.Module):
    """Windows of 16 x 16, for more keys several side by side: baselines/window.py without shift or padding."""

    def __init__(self, dim: int, heads: int, keys: int, form: str) -> None:
        super().__init__()
        self.heads, self.keys = heads, keys
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        index = layout.relative_index(16)
        self.bias = layout.PositionBias(index, int(index.max()) + 1, heads) if form != "no bias" else None
        self.attend = registered_windows if form == "registered" else fused_windows

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        bias = None if self.bias is None else self.bias()
        out = self.attend(*self.tables(x), bias)
        y: Tensor = self.proj(layout.join(out.reshape(1, -1, 256, channels), 16, height, width))
        return y

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [windows, keys, h, d]."""
        windows = layout.cut(x, 16).reshape(-1, self.keys, x.shape[-1])
        q, k, v = (table.unflatten(-1, (self.heads, -1)) for table in layout.project(self.qkv, windows))
        return q, k, v


def registered_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention within each row of the tables [M, L, h, d] by the registered operator; bias [h, 256, 256].

    Windows side by side have the bias of a window and itself.  On CUDA the kernels read each window's neighbours by
    index; elsewhere a row is one patch.
    """
    assert bias is not None
    beside = q.shape[1] // 256
    if q.device.type == "cuda" and beside > 1:
        return indexed_windows(q, k, v, bias)
    return patch_attention(q, k, v, None, repeated(bias, beside))


def indexed_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same with patches of 256 positions, which have all windows of their row for neighbours."""
    count, length = q.shape[:2]
    beside = length // 256
    first = torch.arange(count * beside, device=q.device) // beside * beside
    neighbours = first[:, None] + torch.arange(beside, device=q.device)
    wq, wk, wv = (table.reshape(-1, 256, *table.shape[2:]) for table in (q, k, v))
    return patch_attention(wq, wk, wv, neighbours, bias).reshape(q.shape)


def fused_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same by torch's operator, with or without bias."""
    beside = q.shape[1] // 256
    mask = None if bias is None else repeated(bias, beside)[None].to(q.dtype)
    if mask is not None and not torch.is_grad_enabled():
        mask = mask.detach()  # a view of a parameter asks for a gradient even so, and torch then takes the slow path
    q, k, v = (table.transpose(1, 2) for table in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def repeated(bias: Tensor, beside: int) -> Tensor:
    """The bias [h, 256, 256] of windows side by side, [h, 256 n, 256 n]."""
    return bias if beside == 1 else bias.repeat(1, beside, beside)


class ReadableKit(kit.Attention):
    """KiT through the readable reference."""

    def forward(self, x: Tensor) -> Tensor:
        with mock.patch.object(kit, "patch_attention", reference.patch_attention):
            return super().forward(x)


class Failure(Exception):
    """An operator failed, and why."""


class Lost(Exception):
    """The device takes no more work from this process: an error that CUDA does not recover from."""


@dataclass
class Operator:
    """What is measured: `run` gives the output, `leaves` are what it is differentiated for."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    backends: tuple[SDPBackend, ...] = ()
    """Torch's kernels that it may use, the fastest first; none where it uses its own."""
    optional: bool = False
    """Whether it is no failure where the backends do not take it."""
    backend: SDPBackend | None = None
    """The one that it uses, once `prepared`."""

    def output(self) -> Tensor:
        # Every other kernel is off, so that torch raises an error where this one does not take the tables.
        with contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return self.run()

    def forward(self) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return self.output()

        return call

    def training(self) -> Callable[[], object]:
        with torch.no_grad():
            upstream = torch.randn_like(self.output())
        return lambda: torch.autograd.grad(self.output(), self.leaves, upstream)

    def backward(self) -> Callable[[], object]:
        out = self.output()
        upstream = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, self.leaves, upstream, retain_graph=True)

    def prepared(self, mode: str) -> Callable[[], object]:
        """The call of a pass, made once, with the first backend that takes it.  Raises Failure where none does."""
        make = {"forward": self.forward, "training": self.training, "backward": self.backward}[mode]
        if not self.backends:
            call = make()
            call()
            return call
        refused = []
        for backend in self.backends:
            self.backend = backend
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # why torch refuses a kernel comes as warnings
                    call = make()
                    call()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                refused.append(f"{backend.name}: {one_line(error)}")
            else:
                return call
        raise Failure("; ".join(refused))


def one_line(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0]
    return said if isinstance(error, Failure) else f"{type(error).__name__}: {said}"[:300]


def modules(case: Case, x: Tensor) -> dict[str, Operator]:
    """Whole attentions on the map x [1, H, W, C]."""
    keys = 64 * case.k
    built: dict[str, tuple[nn.Module, tuple[SDPBackend, ...]]] = {
        "kit": (kit.Attention(case.dim, case.heads, k=case.k), ()),
        "window": (Window(case.dim, case.heads, keys, "registered"), ()),
        "window sdpa": (Window(case.dim, case.heads, keys, "sdpa"), (*FUSED, SDPBackend.MATH)),
        "window no bias": (Window(case.dim, case.heads, keys, "no bias"), FUSED),
    }
    if case.dtype == "float32" and case.pixels <= REFERENCE_UP_TO:
        built["reference"] = (ReadableKit(case.dim, case.heads, k=case.k), ())
    if case.dtype == "float32" and case.pixels <= GLOBAL_UP_TO:
        built["global sdpa"] = (global_.Attention(case.dim, case.heads), FUSED)

    def running(module: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                y: Tensor = module(leaf)
                return y

        return run

    found, leaf = {}, x.clone().requires_grad_()
    for name, (module, backends) in built.items():
        found[name] = Operator(running(module.to(x.device)), [leaf, *module.parameters()], backends)
    return found


@torch.no_grad()
def bare(case: Case, x: Tensor, scope: str) -> dict[str, Operator]:
    """Of scope 'operator' or 'cutting': operators on ready tables, made from the map x as the modules make them."""

    def leaf(table: Tensor) -> Tensor:
        return table.detach().to(DTYPES[case.dtype]).contiguous().requires_grad_()

    knn = kit.Attention(case.dim, case.heads, k=case.k).to(x.device)
    patches = layout.cut(x, knn.patch)
    neighbours = knn.neighbours(patches, None)[0][0]
    q, k, v = (leaf(table[0].unflatten(-1, (case.heads, -1))) for table in layout.project(knn.qkv, patches))
    bias = knn.bias().detach().requires_grad_()
    window = Window(case.dim, case.heads, 64 * case.k, "registered").to(x.device)
    wq, wk, wv = (leaf(table) for table in window.tables(x))  # [windows, keys, h, d]
    assert window.bias is not None
    window_bias = window.bias().detach().requires_grad_()
    if scope == "operator":
        found = {
            "kit": Operator(lambda: patch_attention(q, k, v, neighbours, bias), [q, k, v, bias]),
            "window": Operator(lambda: registered_windows(wq, wk, wv, window_bias), [wq, wk, wv, window_bias]),
            "window sdpa": Operator(
                lambda: fused_windows(wq, wk, wv, window_bias), [wq, wk, wv, window_bias], (*FUSED, SDPBackend.MATH)
            ),
            "window no bias": Operator(lambda: fused_windows(wq, wk, wv, None), [wq, wk, wv], FUSED),
        }
        if x.device.type == "cuda":
            found["window cudnn"] = Operator(
                lambda: fused_windows(wq, wk, wv, None), [wq, wk, wv], (SDPBackend.CUDNN_ATTENTION,), optional=True
            )
        return found
    image = leaf(x)

    def joined(out: Tensor, patch: int) -> Tensor:
        return layout.join(out.reshape(1, -1, patch**2, case.dim), patch, case.pixels, case.pixels)

    def cut_kit() -> Tensor:
        queries = layout.cut(image, knn.patch)[0].unflatten(-1, (case.heads, -1))
        return joined(patch_attention(queries, k, v, neighbours, bias), knn.patch)

    def cut_window() -> Tensor:
        return joined(fused_windows(layout.cut(image, 16).reshape(wq.shape), wk, wv, None), 16)

    return {
        "kit": Operator(cut_kit, [image, k, v, bias]),
        "window no bias": Operator(cut_window, [image, wk, wv], FUSED),
        "cut and join": Operator(lambda: joined(layout.cut(image, knn.patch), knn.patch), [image]),
    }


def searching(case: Case, x: Tensor) -> Operator:
    """The retrieval of kit alone, which has no backward pass."""
    module = kit.Attention(case.dim, case.heads, k=case.k).to(x.device)
    patches = layout.cut(x, module.patch)
    return Operator(lambda: module.neighbours(patches, None)[0], [])


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products of float32 in TensorFloat-32 or not, on CUDA; the kernels follow the same flag."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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


def tokens(case: Case, device: torch.device) -> Tensor:
    """A map [1, H, W, C] of smooth structure with noise, normalised as before an attention."""
    torch.manual_seed(0)
    side, shape = case.pixels, (1, case.dim, case.pixels, case.pixels)
    coarse = F.interpolate(torch.randn(1, case.dim, side // 8, side // 8), (side, side), mode="bilinear")
    return F.layer_norm((coarse + 0.3 * torch.randn(shape)).permute(0, 2, 3, 1), (case.dim,)).contiguous().to(device)


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
                operators = {name: one for name, one in operators.items() if name not in ("reference", "global sdpa")}
            wanted = operators | ({"retrieval": searching(case, x)} if (scope, mode) == ("module", "forward") else {})
            calls, reasons, peaks = prepare(wanted, mode, device, with_memory=scope == "module" and mode != "backward")
            times = timed(calls, rounds, device, reasons)
            floor = case.macs(scope, mode, "kit") / product_rate + case.least_bytes(scope, mode) / copy_rate
            for name, operator in wanted.items():
                row = head(case, scope, mode, name) | {"backend": operator.backend and operator.backend.name}
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


def machine(device: torch.device) -> dict[str, Any]:
    model = device_name(device) if device.type == "cuda" else platform.processor()
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.type,
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "spin_count": os.environ.get("GOMP_SPINCOUNT", "default"),
    }
    if device.type == "cuda":
        has, known = torch.cuda.get_device_properties(device), environment(device)
        found |= {
            "driver": known.driver,
            "commit": known.commit,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "multiprocessors": has.multi_processor_count,
            "memory_bytes": has.total_memory,
        }
    return found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(device: torch.device, cases: list[Case], rounds: int | None, path: Path) -> dict[str, Any]:
    """Measure, keeping in `path` what there is after every case."""
    products, copies = rates(device, list(dict.fromkeys(case.dtype for case in cases)), rounds or 9)
    for dtype, rate in products.items():
        print(f"products in {dtype} {rate / 1e9:.1f} GMAC/s", flush=True)
    print(f"copies {copies / 1e9:.1f} GB/s", flush=True)
    stored: dict[str, Any] = {
        "machine": machine(device),
        "product_macs_per_second": products,
        "copy_bytes_per_second": copies,
        "gpu_states": [],
        "rows": [],
        "exponents": [],
        "lost": None,
    }
    for case in cases:
        wanted = rounds or (CUDA_ROUNDS if device.type == "cuda" else ROUNDS.get(case.pixels, 3))
        try:
            with precision(case.dtype):
                measure_case(case, wanted, device, products[case.dtype], copies, stored)
        except Lost as error:
            stored["lost"] = f"{asdict(case)}: {error}"
            print(f"the device was lost, and nothing more can be measured: {stored['lost']}", file=sys.stderr)
        stored["exponents"] = exponents(stored["rows"])
        path.write_text(json.dumps(stored, indent=1) + "\n")
        if stored["lost"]:
            break
    return stored


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def chosen_cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases asked for.  Raises InputError for one that cannot be."""
    dtypes = options.dtypes or (list(DTYPES) if device.type == "cuda" else ["float32"])
    cases = []
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"--dtypes has {dtype}; give some of {', '.join(DTYPES)}.")
        if dtype == "tf32" and device.type != "cuda":
            raise InputError("--dtypes has tf32, which is a mode of CUDA's tensor cores; on the CPU give float32.")
        largest = [2048] if device.type == "cuda" and dtype == "bfloat16" else []
        sizes = options.sizes or [*ROUNDS, *largest]
        cases += [Case(dim, k, pixels, dtype) for dim in options.dims for k in options.k for pixels in sizes]
    for case in cases:
        if case.dim < 32 or case.dim % 32:
            raise InputError(f"--dims has {case.dim}; heads are 32 wide, so give multiples of 32.")
        if case.k < 4 or case.k % 4:
            raise InputError(f"--k has {case.k}; a window of 16 x 16 is as 4 neighbours, so give multiples of 4.")
        if case.pixels < 32 or case.pixels % 16 or (case.pixels // 16) ** 2 % (case.k // 4):
            raise InputError(
                f"--sizes has {case.pixels}; give multiples of 16 px, 32 px or more, that windows of 16 x 16 cover "
                f"in groups of {case.k // 4}."
            )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the stored JSON and measure nothing"
    )
    parser.add_argument(
        "--json", type=Path, nargs="+",
        help="where the figures are kept, and the picture beside it; by default attention.json beside this file for "
        "all cases of the CPU, attention-DEVICE.json in the current folder for others",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtypes", type=lambda text: text.split(","), help="of float32, tf32 and bfloat16; CPU: float32"
    )
    parser.add_argument("--dims", type=numbers, default=[32, 64], help="channels, 32 to a head")
    parser.add_argument("--k", type=numbers, default=[4, 8], help="neighbours")
    parser.add_argument("--sizes", type=numbers, help="sides of the map, pixels")
    parser.add_argument("--rounds", type=int, help="timed rounds a case, by default as many as the size allows; 1 is a "
                        "look at whether all of it runs, with samples of one call")  # fmt: skip
    options = parser.parse_args()
    try:
        if options.markdown:
            paths = options.json or [HERE / "attention.json"]
            stored = merged([json.loads(path.read_text()) for path in paths])
        else:
            device = choose_device(options.device)
            cases = chosen_cases(options, device)
    except (InputError, OSError, json.JSONDecodeError) as error:
        parser.error(str(error))
    if options.markdown:
        print(markdown(stored))
        return
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}; give 1 or more")
    if options.json and len(options.json) > 1:
        parser.error("several files are read by --markdown only; give one --json to write to")
    whole_cpu = device.type == "cpu" and not options.rounds and cases == chosen_cases(parser.parse_args([]), device)
    default = HERE / "attention.json" if whole_cpu else Path(f"attention-{device.type}.json")
    path = options.json[0] if options.json else default
    stored = measure(device, cases, options.rounds, path)
    picture(stored, path.with_suffix(".png"))
    print(f"\n{markdown(stored)}")
    failed = failures(stored)
    if failed:
        print("\n".join(["", "failed:", *failed]), file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
