"""One point of the sweep in a process of its own, which may run out of memory, hang or be killed.

The parent starts a `Child` for a `Spec`, and asks it to measure memory and to take samples of time in turn with the
other processes of its size. A process that ends early becomes a `Failed` that says how.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from kitbench.cost.memory import RSS_ENVIRONMENT, peak, resident_peak_bytes
from kitbench.cost.timing import FLUSH_BYTES, Sample, release_flush_buffer, sampler
from kitbench.errors import METHOD_ERRORS, InputError, describe_error
from kitbench.model import methods
from kitbench.spec.suite import Backbone
from kitbench.store.sweeps import Outcome, Scope, What
from kitbench.system.environment import choose_device
from kitbench.system.processes import process_context

_SMALL_RSS = 16 << 20  # below it the resident set is not accurate


@dataclass(frozen=True)
class Spec:
    """What a point runs. `size` is the side of the square map (attention, block) or image (model); batch 1, float32."""

    method: str
    settings: Mapping[str, Any]
    scope: Scope
    what: What
    size: int
    dim: int
    heads: int
    backbone: Backbone | None = None
    """Of the model; None for the other scopes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input: [1, H, W, C] for an attention, [1, C, H, W] for a block or a model."""
        if self.scope == "attention":
            return (1, self.size, self.size, self.dim)
        return (1, self.dim if self.scope == "block" else 3, self.size, self.size)


def build(spec: Spec) -> nn.Module:
    """The module of a point, on the CPU. Raises InputError."""
    from kitbench.model.backbone import Block, UNet

    loaded = methods.load_method(spec.method)
    if loaded.attention is None:
        raise InputError(f"Method {spec.method!r} has no class Attention; the sweep measures attentions: give one.")
    settings = loaded.resolve(spec.settings)
    torch.manual_seed(0)
    if spec.scope == "model":
        assert spec.backbone is not None
        module: nn.Module = UNet(3, spec.backbone, loaded, settings, seed=0)
    else:
        module = loaded.build(spec.dim, spec.heads, False, **settings)
        if spec.scope == "block":
            module = Block(spec.dim, module, ratio=4)
    return module.train(spec.what == "train")


def closed_form(module: nn.Module, spec: Spec) -> int | None:
    """Multiply-adds of one forward pass as stated by the method's `macs`; None where it has none."""
    parts = [module.attention, module.ffn] if spec.scope == "block" else [module]
    if not all(hasattr(part, "macs") for part in parts):
        return None
    forms = [part.macs(spec.size, spec.size) for part in parts]  # type: ignore[operator,union-attr]
    return None if None in forms else sum(forms)


def needed_macs(module: nn.Module, spec: Spec) -> int | None:
    """As `closed_form`, with what the attention's definition needs, where it states that and executes more."""
    attention = module.attention if spec.scope == "block" else module
    executed = closed_form(module, spec)
    if executed is None or not hasattr(attention, "needed_macs"):
        return None
    needed = attention.needed_macs(spec.size, spec.size)  # type: ignore[operator]
    if needed is not None and spec.scope == "block":
        needed += module.ffn.macs(spec.size, spec.size)  # type: ignore[operator,union-attr]
    return needed if needed != executed else None


def step(module: nn.Module, x: Tensor) -> Tensor | None:
    """One call: a forward pass, or in training mode forward and backward, with the gradient of the input."""
    if not module.training:
        with torch.no_grad():
            y: Tensor = module(x)
            return y
    x = x.detach().requires_grad_()
    module(x).square().mean().backward()
    module.zero_grad(set_to_none=True)
    return None


class Failed(Exception):
    """A process ended early: how, and why."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(outcome, reason)
        self.outcome: Outcome = outcome
        self.reason = reason


@dataclass(frozen=True)
class Memory:
    """Peak bytes above what the module and its input take."""

    allocated: int
    reserved: int | None
    seconds: float
    """Of the first call, warm-up included: an estimate for further calls."""


class Child:
    """A process with the module of one point. A context manager: leaving it ends the process."""

    def __init__(self, spec: Spec, device: torch.device, threads: int, limit: int) -> None:
        context = process_context()
        context.set_forkserver_preload(["kitbench.cost.sweep.worker"])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec, str(device), threads, limit), daemon=True)
        self._process.start()
        theirs.close()

    def measure(self, timeout: float) -> Memory:
        """Peak memory of a call after a warm-up call. Raises Failed."""
        found: Memory = self._ask("measure", timeout)
        return found

    def prepare(self, timeout: float) -> None:
        """Find out how many calls a sample takes. Raises Failed."""
        self._ask("prepare", timeout)

    def sample(self, timeout: float) -> Sample:
        """One sample of its time. Raises Failed."""
        taken: Sample = self._ask("sample", timeout)
        return taken

    def resident(self, timeout: float) -> int | None:
        """Peak resident set of a call; None where it is too small to be accurate or the system cannot report it."""
        found: int | None = self._ask("resident", timeout)
        return found

    def _ask(self, request: str, timeout: float) -> Any:
        try:
            self._connection.send(request)
            if not self._connection.poll(timeout):
                raise Failed("timeout", f"no answer within {timeout:.0f} s")
            reply = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode or 0
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            hint = ", perhaps out of memory" if code == -9 else ""
            raise Failed("killed", f"the process ended {how}{hint}") from error
        if isinstance(reply, Failed):
            raise reply
        return reply

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process; its memory is free when this returns."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def serve(connection: Connection, spec: Spec, device_name: str, threads: int, limit: int) -> None:
    """Answer requests until the parent ends this process. Runs in the child."""
    torch.set_num_threads(threads)
    bench = Bench(spec, torch.device(device_name), limit)
    while True:
        try:
            request = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            reply: Any = bench.answer(request)
            bench.rest()
        except METHOD_ERRORS as error:  # any error is the result of this point
            reply = _failure(error)
        connection.send(reply)


class Bench:
    """Runs the module of a point. On CUDA it keeps an input, and cached memory, only while it answers a request.

    The processes of one size share the device: memory kept by a waiting process would be missing for the others.
    limit: bytes that the method may take; on CUDA the timer's own buffer is not counted.
    """

    def __init__(self, spec: Spec, device: torch.device, limit: int) -> None:
        self.spec, self.device, self.limit = spec, device, limit
        self.module: nn.Module | None = None
        self.x: Tensor | None = None
        self.take: Callable[[], Sample] | None = None

    def call(self) -> Tensor | None:
        assert self.module is not None
        assert self.x is not None
        return step(self.module, self.x)

    def answer(self, request: str) -> Memory | Sample | int | None:
        """What a `Child` asks. Raises what the method raises."""
        if self.module is None:
            choose_device(str(self.device))
            self.module = build(self.spec).to(self.device)
            _limit(self.device, self.limit)
        if self.x is None:
            torch.manual_seed(0)
            self.x = torch.randn(self.spec.shape, device=self.device)
        if request == "measure":
            start = time.perf_counter()
            self.call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
            found = peak(self.call, self.device)
            return Memory(found.allocated, found.reserved, seconds)
        if self.device.type == "cuda":
            _limit(self.device, self.limit + FLUSH_BYTES)
        if request == "prepare":
            self.take = sampler(self.call, self.device)
        elif request == "sample":
            assert self.take is not None
            if self.device.type == "cuda":
                self.call()  # allocates memory from the driver again, which is slow
            return self.take()
        elif request == "resident":
            return _resident(self.call) if self.device.type == "cpu" and sys.platform == "linux" else None
        return None

    def rest(self) -> None:
        """Give memory back until the next request."""
        if self.device.type == "cuda":
            self.x = None
            release_flush_buffer(self.device)
            torch.cuda.empty_cache()


def _limit(device: torch.device, limit: int) -> None:
    """Make allocations fail beyond `limit` bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    elif sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:  # noqa: PTH123
            mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + limit, hard))


def _resident(call: Callable[[], object]) -> int | None:
    """Peak resident set of a second call, with a malloc that returns memory at once. Needs a new process."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    for option, name in ((-3, "MALLOC_MMAP_THRESHOLD_"), (-1, "MALLOC_TRIM_THRESHOLD_")):
        libc.mallopt(option, int(RSS_ENVIRONMENT[name]))
    call()
    libc.malloc_trim(0)
    try:
        found = resident_peak_bytes(call)
    except OSError:  # a kernel without /proc/self/clear_refs, or one that does not let it be written
        return None
    return found if found >= _SMALL_RSS else None


def _failure(error: BaseException) -> Failed:
    words = str(error).strip().split("\n")[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in words:
        asked = re.search(
            r"allocate ([\d.]+) (bytes|[KMG]iB)", words
        )  # in the words of the CPU's allocator and of CUDA's
        if asked is None:
            return Failed("oom", "out of memory")
        scale = ("bytes", "KiB", "MiB", "GiB").index(asked[2])
        return Failed("oom", f"an allocation of {float(asked[1]) * 1024**scale / 2**30:.1f} GiB failed")
    return Failed("failed", describe_error(error))
