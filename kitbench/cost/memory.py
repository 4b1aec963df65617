"""Peak memory of a callable: measured on the CPU and on CUDA, or predicted without running.

What each method includes:
- CPU measurement: every allocation of torch's CPU allocator, temporaries inside kernels included, from the profiler's
  allocator events. Exact, without side effects. It misses the release of memory that was allocated before (torch then
  warns on stderr, once): measure a step that keeps nothing allocated.
- CUDA measurement: torch's caching allocator, bytes in live blocks, and bytes reserved from the driver.
- Prediction: the bytes of all storages alive at a time, on fake tensors. Misses temporaries inside kernels.
- Resident set: pages of the process, as counted by the operating system. Accurate to a few per cent only in a new
  process whose malloc returns memory at once (`RSS_ENVIRONMENT`).
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kitbench.host import free_host_bytes

RSS_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Set these before the process starts: with glibc's defaults the resident set overstates the peak by up to 76 %."""


@dataclass(frozen=True)
class Peak:
    """Peak bytes above the level at entry: in live tensors, and (CUDA only) reserved from the driver."""

    allocated: int
    reserved: int | None = None


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int:
    """Peak bytes allocated on `device` while `fn()` runs, above the level at entry. See `peak`."""
    return peak(fn, device).allocated


def peak(fn: Callable[[], object], device: torch.device) -> Peak:
    """Run `fn()` once and return its peak memory on `device` (CPU or CUDA), above the level at entry.

    What `fn` returns is released after the peak is taken. On CUDA call `fn` once before: the first call allocates the
    workspaces of cuBLAS and cuDNN, which are kept. Raises whatever `fn` raises.
    """
    return _cuda_peak(fn, device) if device.type == "cuda" else Peak(_cpu_peak(fn))


def _cpu_peak(fn: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints to stderr
    with profile(profile_memory=True) as profiler:
        result = fn()
    del result
    assert profiler.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    level = highest = 0
    for _, change in changes:
        level += change
        highest = max(highest, level)
    return highest


def _cuda_peak(fn: Callable[[], object], device: torch.device) -> Peak:
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # its trials allocate workspaces
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        fn()
        torch.cuda.synchronize(device)
        return Peak(
            torch.cuda.max_memory_allocated(device) - allocated, torch.cuda.max_memory_reserved(device) - reserved
        )
    finally:
        torch.backends.cudnn.benchmark = benchmark


def resident_peak_bytes(fn: Callable[[], object]) -> int:
    """Peak resident set of this process while `fn()` runs, above the level at entry (Linux). A cross-check only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    fn()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def free_bytes(device: torch.device) -> int:
    """Free memory of the device in bytes; on the CPU at most what control groups (cgroups) leave."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_host_bytes()


class OpenOperators(TorchDispatchMode):
    """Runs the Python body of own operators (`torch.library.custom_op`) where the modes entered before can see it.

    Where a body converts a fake tensor to bool, the result is False: shortcuts are then not taken, so that the
    prediction is the largest amount that the operator may allocate.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("is_nonzero", "item", "_local_scalar_dense") and isinstance(args[0], FakeTensor):
            return False
        operator = OPDEFS.get(f"{func.namespace}::{func._opname}")
        if operator is None:
            return func(*args, **(kwargs or {}))
        with self:
            return operator._init_fn(*args, **(kwargs or {}))


class LiveStorages(TorchDispatchMode):
    """Tracks the bytes of the storages made inside it that are still alive: `live` now, `highest` so far.

    On fake tensors (`FakeTensorMode`, entered before) it predicts the peak of a computation of any size.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.highest = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        # The engine adds up gradients in place, except under a mode; then the sum takes the place of its first term.
        summed = func is torch.ops.aten.add.Tensor and _called_by_autograd()
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self._sizes:
                    if summed:
                        self._release(args[0].untyped_storage()._cdata)
                    self._hold(storage)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        self.live += storage.nbytes()
        self.highest = max(self.highest, self.live)
        weakref.finalize(storage, self._release, storage._cdata).atexit = False

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _called_by_autograd() -> bool:
    """Whether the operator that is dispatched now was called by the engine of autograd, and by no Python code in it.

    That is its addition of gradients. A node in C++ whose backward pass adds two tensors looks alike; few do.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name in _FRAMES_OF_DISPATCH:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


_FRAMES_OF_DISPATCH = ("_called_by_autograd", "__torch_dispatch__", "__call__", "inner", "_fn")
"""Functions between an operator's caller and a mode: the modes' own, and torch's around them."""


def predict_peak_bytes(
    step: Callable[[nn.Module, Tensor], object], module: nn.Module, shape: tuple[int, ...], inside: bool = True
) -> int:
    """Predicted peak bytes of `step(module, x)` on the CPU, above the level at entry, without computing anything.

    x is float32 of `shape`. `module` is not changed. inside: follow the bodies of own operators, loops included;
    without it their temporaries are missed, and 4096 x 4096 takes as long as 64 x 64.
    """
    with fake_mode() as mode:
        x = torch.empty(shape)
        fake = fake_copy(module, mode)
        with LiveStorages() as storages, OpenOperators() if inside else nullcontext():
            result = step(fake, x)
        del result
    highest: int = storages.highest
    return highest


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """FakeTensorMode, in which tensors have shapes, dtypes and devices but no data. What fails in it raises, and torch
    does not print its traceback as well.
    """
    log = logging.getLogger(fake_tensor.__name__)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode() as mode:
            yield mode
    finally:
        log.setLevel(level)


def fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of `module` whose parameters and buffers are fake: shapes, dtypes and devices, no data."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
