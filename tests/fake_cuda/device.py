"""A make-believe CUDA device for machines without one: finds wrong devices in code that only ever ran on the CPU.

A `CudaTensor` is a CPU tensor that says it is on `cuda:N`. Operators on it compute on the CPU, but refuse what CUDA
refuses: operands on two devices, a batch in pageable memory read as numpy, more memory than the device has. Of
`torch.cuda`, the compiled functions alone are replaced (`torch._C._cuda_...`), so that torch's own Python code, with
its rules for arguments, is what runs: a device without an index, where torch wants one, fails as on a GPU.

Not rehearsed: CUDA's kernels, their numbers, times and determinism, streams, Triton, NCCL's transport, mixed precision
(autocast for CUDA does nothing to CPU operators).

Environment: FAKE_CUDA_DEVICES  number of devices (1)
             FAKE_CUDA_BYTES    memory of each (80 GiB)
             FAKE_CUDA_FOLDER   where the processes tell each other what they have reserved; without it each is alone
             FAKE_CUDA_LOG      file to which every process writes once what it uses: functions of torch.cuda, and
                                kinds of copies to the device
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

COUNT = int(os.environ.get("FAKE_CUDA_DEVICES", "1"))
BYTES = int(os.environ.get("FAKE_CUDA_BYTES", str(80 << 30)))
FOLDER = os.environ.get("FAKE_CUDA_FOLDER")
LOG = os.environ.get("FAKE_CUDA_LOG")


class Allocator:
    """What one process holds of one device: live bytes, and what it keeps reserved until its cache is emptied."""

    def __init__(self, index: int) -> None:
        self.index, self.fraction = index, 1.0
        self.live = self.reserved = self.live_peak = self.reserved_peak = 0
        self.sizes: dict[int, int] = {}
        self.lock = threading.RLock()

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage while it lives. Raises OutOfMemoryError as CUDA's caching allocator does."""
        key, size = storage._cdata, storage.nbytes()
        with self.lock:
            if key in self.sizes:
                return
            if self.live + size > self.reserved:
                grown = self.live + size
                if grown > self.fraction * BYTES or grown + self.others() > BYTES:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {self.index} has a total "
                        f"capacity of {BYTES / 2**30:.2f} GiB (make-believe)."
                    )
                self.reserve(grown)
            self.sizes[key] = size
            self.live += size
            self.live_peak = max(self.live_peak, self.live)
            weakref.finalize(storage, self.release, key).atexit = False

    def release(self, key: int) -> None:
        with self.lock:
            self.live -= self.sizes.pop(key, 0)

    def reserve(self, amount: int) -> None:
        self.reserved = amount
        self.reserved_peak = max(self.reserved_peak, amount)
        if FOLDER:
            place = Path(FOLDER, f"{os.getpid()}.{self.index}")
            aside = place.with_suffix(".aside")
            aside.write_text(str(amount))
            aside.replace(place)

    def others(self) -> int:
        """Bytes that other living processes have reserved."""
        total = 0
        for place in Path(FOLDER).glob(f"*.{self.index}") if FOLDER else ():
            pid = int(place.stem)
            if pid != os.getpid() and Path("/proc", str(pid)).exists():
                total += int(place.read_text())
        return total

    def stats(self) -> dict[str, Any]:
        def pool(now: int, peak: int) -> dict[str, Any]:
            return {"all": {"current": now, "peak": peak, "allocated": 0, "freed": 0}}

        live = pool(self.live, self.live_peak)
        return {
            "allocated_bytes": live, "active_bytes": live, "requested_bytes": live,
            "reserved_bytes": pool(self.reserved, self.reserved_peak),
        }  # fmt: skip


ALLOCATORS = [Allocator(index) for index in range(COUNT)]
_current = 0


def after_fork() -> None:
    """A child of fork holds nothing of the device."""
    global ALLOCATORS, _current
    ALLOCATORS, _current = [Allocator(index) for index in range(COUNT)], 0


def index_of(device: Any) -> int:
    """The number of a CUDA device; the current one where it has none. Raises as CUDA does where it is not there."""
    chosen = torch.device(device)
    index = _current if chosen.index is None else chosen.index
    if not 0 <= index < COUNT:
        raise RuntimeError("CUDA error: invalid device ordinal")
    torch.cuda._lazy_init()
    return index


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    _index: int

    @staticmethod
    def wrap(tensor: torch.Tensor, index: int) -> CudaTensor:
        if isinstance(tensor, CudaTensor):
            return tensor
        ALLOCATORS[index].hold(tensor.untyped_storage())
        made: CudaTensor = torch.Tensor._make_subclass(CudaTensor, tensor.detach(), tensor.requires_grad)
        made._index = index
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self._index)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def get_device(self) -> int:
        return self._index

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved(self, *args, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved(self, "cpu", *args, **kwargs)

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return moved(self, "cuda" if device is None else torch.device(device), *args, **kwargs)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, device: Any = None) -> torch.Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({list(self.shape)}, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = [leaf for leaf in leaves if isinstance(leaf, CudaTensor)]
        name = func._schema.name
        # The buckets of DistributedDataParallel are made in C++, which knows nothing of this class.
        bucket = func is torch.ops.aten.mul.out
        if name not in ACROSS and not name.startswith("c10d::") and not bucket:
            # A number in a tensor on the CPU goes with any device.
            strangers = [leaf for leaf in leaves if not isinstance(leaf, CudaTensor) and leaf.ndim]
            if name in INDEXING:
                strangers = [leaf for leaf in strangers if leaf.dtype not in (torch.int64, torch.bool)]
            if strangers or len({leaf._index for leaf in ours}) > 1:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {ours[0].device} "
                    f"and {strangers[0].device if strangers else ours[-1].device}! (in {name})"
                )
        forbidden = name in NONDETERMINISTIC and torch.are_deterministic_algorithms_enabled()
        if forbidden and (name != "aten::cumsum" or ours[0].is_floating_point()):
            raise RuntimeError(f"{name} does not have a deterministic implementation for CUDA")
        if name.startswith("kitbench::"):  # own operators choose their kernels by the device, and there is none
            args, kwargs = tree_map(plain, (args, kwargs))
        with no_dispatch():
            out = func(*args, **kwargs)
        index = ours[0]._index
        return tree_map(lambda x: CudaTensor.wrap(x, index) if isinstance(x, torch.Tensor) else x, out)


ACROSS = {"aten::copy_", "aten::_to_copy", "aten::is_pinned", "aten::set_", "aten::_has_compatible_shallow_copy_type"}
NONDETERMINISTIC = {
    f"aten::{name}"
    for name in (
        "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward", "bincount", "cumsum",
        "grid_sampler_2d_backward", "histc", "kthvalue", "max_unpool2d", "median", "nll_loss_forward", "nll_loss2d_forward",
        "put_", "reflection_pad1d_backward", "reflection_pad2d_backward", "upsample_bicubic2d_backward",
        "upsample_bilinear2d_backward", "upsample_linear1d_backward",
    )
}  # fmt: skip
"""What raises on CUDA where deterministic algorithms are asked for (documentation of torch 2.11 and 2.13)."""
INDEXING = {"aten::index.Tensor", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}
"""Indices may lie on the CPU."""


def plain(x: Any) -> Any:
    """The CPU tensor inside; anything else as it is."""
    if not isinstance(x, CudaTensor):
        return x
    with no_dispatch():
        return x.detach().as_subclass(torch.Tensor)


class _Move(torch.autograd.Function):
    """Between the devices, for gradients too."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, index: int | None) -> torch.Tensor:
        ctx.back = tensor._index if isinstance(tensor, CudaTensor) else None
        copy = plain(tensor).clone()
        return copy if index is None else CudaTensor.wrap(copy, index)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _Move.apply(gradients[0], ctx.back), None  # type: ignore[no-untyped-call]


def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to, where the tensor or its target may be on CUDA; its own rules for arguments."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    kwargs.pop("copy", None)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    here = tensor._index if isinstance(tensor, CudaTensor) else None
    there = here if device is None else index_of(device) if device.type == "cuda" else None
    result = tensor
    if there is not None and here is None and tensor.ndim:
        note(f"copy from {'pinned' if is_pinned(tensor) else 'pageable'} memory" + ", non-blocking" * non_blocking)
    if there != here:
        followed = tensor.requires_grad and torch.is_grad_enabled()
        result = _Move.apply(tensor, there) if followed else copied(tensor, there)  # type: ignore[no-untyped-call]
    if dtype is None and memory_format is None:
        return result
    with torch._C.DisableTorchFunction():
        return torch.Tensor.to(
            result, dtype=dtype or result.dtype, memory_format=memory_format or torch.preserve_format
        )


def copied(tensor: torch.Tensor, index: int | None) -> torch.Tensor:
    """A copy on CUDA device `index`, or on the CPU for None."""
    copy = plain(tensor).detach().clone()
    return copy if index is None else CudaTensor.wrap(copy, index)


class Devices(TorchFunctionMode):
    """Makes what is asked for on CUDA on the CPU, and has it say that it is on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            if func is torch.Tensor.cpu:
                args = (args[0], "cpu", *args[1:])
            elif func is torch.Tensor.cuda:
                args = (args[0], *(args[1:] or [kwargs.pop("device", None) or "cuda"]))
                args = (args[0], torch.device("cuda", args[1]) if isinstance(args[1], int) else args[1], *args[2:])
            return moved(*args, **kwargs)
        if func is torch.Tensor.pin_memory or func is torch.Tensor.is_pinned:
            return func(*args, **kwargs)
        if "device" not in kwargs or kwargs["device"] is None:
            return func(*args, **kwargs)
        wanted = torch.device(kwargs["device"])
        if wanted.type == "cuda":
            index = index_of(wanted)
            made = func(*tree_map(plain, args), **(tree_map(plain, kwargs) | {"device": "cpu"}))
            requires = made.requires_grad
            return CudaTensor.wrap(made, index).requires_grad_(requires)
        return func(*tree_map(plain, args), **tree_map(plain, kwargs))


_pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    with no_dispatch(), torch._C.DisableTorchFunction():
        copy = self.clone()
    _pinned.add(copy.untyped_storage())
    return copy


def is_pinned(self: torch.Tensor, device: Any = None) -> bool:
    return not isinstance(self, CudaTensor) and self.untyped_storage() in _pinned


class Event:
    """CUDA's event: the time at which the CPU got there."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.enable_timing, self.at = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if not (self.enable_timing and end.enable_timing and self.at and end.at):
            raise ValueError("Both events must be recorded, with enable_timing=True, before elapsed time is asked for.")
        return 1e3 * max(end.at - self.at, 1e-6)

    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def wait(self, stream: Any = None) -> None: ...


class Stream:
    """CUDA's stream, of a device that does at once what it is told."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cuda", kwargs.get("device_index", _current if device is None else index_of(device)))

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event


def number(device: Any) -> int:
    """What a compiled function of torch takes for a device: a number, of one that is there."""
    if type(device) is not int:
        raise TypeError(f"a compiled function of torch.cuda got {device!r} for a device, where it takes an int")
    return index_of(torch.device("cuda", device))


def set_device(device: int) -> int:
    global _current
    before, _current = _current, number(device)
    return before


def set_fraction(fraction: float, device: int) -> None:
    ALLOCATORS[number(device)].fraction = fraction


def reset_peak(device: int) -> None:
    allocator = ALLOCATORS[number(device)]
    allocator.live_peak, allocator.reserved_peak = allocator.live, allocator.reserved


def empty_cache() -> None:
    for allocator in ALLOCATORS:
        with allocator.lock:
            if allocator.reserved != allocator.live:
                allocator.reserve(allocator.live)


def properties(device: int) -> SimpleNamespace:
    number(device)
    return SimpleNamespace(
        name="Make-believe GPU", major=9, minor=0, total_memory=BYTES, multi_processor_count=132, L2_cache_size=50 << 20,
        warp_size=32, shared_memory_per_block_optin=232448, max_threads_per_multi_processor=2048,
    )  # fmt: skip


def memory_info(device: int) -> tuple[int, int]:
    allocator = ALLOCATORS[number(device)]
    return BYTES - allocator.reserved - allocator.others(), BYTES


def generator(index: int) -> Any:
    return SimpleNamespace(manual_seed=lambda seed: torch.default_generator, initial_seed=lambda: 0)


COMPILED: dict[str, Any] = {
    "_cuda_getDeviceCount": lambda: COUNT,
    "_cuda_init": lambda: None,
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDevice": lambda: _current,
    "_cuda_setDevice": set_device,
    "_cuda_exchangeDevice": lambda device: _current if device < 0 else set_device(device),
    "_cuda_maybeExchangeDevice": lambda device: _current if device < 0 else set_device(device),
    "_cuda_synchronize": lambda: None,
    "_cuda_emptyCache": empty_cache,
    "_cuda_setMemoryFraction": set_fraction,
    "_cuda_getMemoryFraction": lambda device: ALLOCATORS[number(device)].fraction,
    "_cuda_memoryStats": lambda device: ALLOCATORS[number(device)].stats(),
    "_cuda_resetPeakMemoryStats": reset_peak,
    "_cuda_resetAccumulatedMemoryStats": lambda device: number(device),
    "_cuda_sleep": lambda cycles: None,
    "_cuda_getCurrentRawStream": lambda device: 0 * number(device),
    "_cuda_isCurrentStreamCapturing": lambda: False,
    "_cuda_getArchFlags": lambda: "sm_80 sm_90",
    "_accelerator_getAccelerator": lambda: torch.device("cuda"),
    "_accelerator_getDeviceIndex": lambda: _current,
    "_accelerator_setDeviceIndex": set_device,
    "_accelerator_synchronizeDevice": lambda device: None,
    "_accelerator_emptyCache": empty_cache,
    "_accelerator_getStream": lambda device: Stream(),
    "_cuda_getCurrentStream": lambda device: (0, number(device), 1),
    "_cuda_getDefaultStream": lambda device: (0, number(device), 1),
}


def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """As torch's, with gloo in NCCL's place."""
    dist.BackendConfig(dist.Backend(backend or "undefined"))  # refuses what torch does not understand
    if "nccl" in (backend or ""):
        note(f"nccl on cuda:{_current}")
    _init_process_group((backend or "").replace("nccl", "gloo"), *args, **kwargs)


_init_process_group = dist.init_process_group


def logged(name: str, function: Any) -> Any:
    """The function, whose first use is noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        note(name)
        return function(*args, **kwargs)

    return call


_noted: set[str] = set()


def note(what: str) -> None:
    """Write it to the log, once a process."""
    if LOG is not None and what not in _noted:
        _noted.add(what)
        with open(LOG, "a") as file:  # noqa: PTH123
            file.write(f"{what}\n")


def install() -> None:
    """Give torch the devices. For the life of the process, and of those that it forks."""
    cuda = torch.cuda
    for name, function in COMPILED.items():
        setattr(torch._C, name, logged(name, function))
    cuda._exchange_device = torch._C._cuda_exchangeDevice
    cuda._maybe_exchange_device = torch._C._cuda_maybeExchangeDevice
    cuda.graphs._cuda_isCurrentStreamCapturing = torch._C._cuda_isCurrentStreamCapturing  # type: ignore[attr-defined]
    cuda._device_count_nvml = lambda: COUNT
    cuda._get_device_properties = logged("_get_device_properties", properties)  # type: ignore[attr-defined]
    runtime = SimpleNamespace(
        cudaMemGetInfo=logged("cudaMemGetInfo", memory_info), cudaError=SimpleNamespace(success=0)
    )
    cuda._cudart = runtime  # type: ignore[attr-defined]
    cuda.default_generators = tuple(generator(index) for index in range(COUNT))
    cuda.Event = Event  # type: ignore[assignment,misc]
    cuda.Stream = Stream  # type: ignore[assignment,misc]
    cuda.is_bf16_supported = lambda including_emulation=True: True
    dist.init_process_group = init_process_group
    dist.is_nccl_available = lambda: True
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign,assignment]
    torch.Tensor.is_pinned = is_pinned  # type: ignore[method-assign,assignment]
    # A parameter cannot change its class: unlike with CUDA, module.to() makes new ones.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    os.register_at_fork(after_in_child=after_fork)
    Devices().__enter__()  # type: ignore[no-untyped-call]
