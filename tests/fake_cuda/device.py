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
import time
from types import SimpleNamespace
from typing import Any

import fake_state
import torch
import torch.distributed as dist
from fake_state import BYTES, COUNT, after_fork, index_of, note
from fake_tensors import Devices, is_pinned, pin_memory

waits = 0
"""How often the host has waited for the device."""


class Event:
    """CUDA's event: the time at which the CPU got there. The device is behind the host, and passes an event only when
    the host waits for it."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self.enable_timing, self.at, self.waits = enable_timing, 0.0, 0

    def record(self, stream: Any = None) -> None:
        self.at, self.waits = time.perf_counter(), waits

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if not (self.enable_timing and end.enable_timing and self.at and end.at):
            raise ValueError("Both events must be recorded, with enable_timing=True, before elapsed time is asked for.")
        return 1e3 * max(end.at - self.at, 1e-6)

    def synchronize(self) -> None:
        synchronize()

    def query(self) -> bool:
        return waits > self.waits

    def wait(self, stream: Any = None) -> None: ...


def synchronize() -> None:
    global waits
    waits += 1


class Stream:
    """CUDA's stream."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device(
            "cuda", kwargs.get("device_index", fake_state.current if device is None else index_of(device))
        )

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        synchronize()

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
    before, fake_state.current = fake_state.current, number(device)
    return before


def set_fraction(fraction: float, device: int) -> None:
    fake_state.ALLOCATORS[number(device)].fraction = fraction


def reset_peak(device: int) -> None:
    allocator = fake_state.ALLOCATORS[number(device)]
    allocator.live_peak, allocator.reserved_peak = allocator.live, allocator.reserved


def empty_cache() -> None:
    for allocator in fake_state.ALLOCATORS:
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
    allocator = fake_state.ALLOCATORS[number(device)]
    return BYTES - allocator.reserved - allocator.others(), BYTES


def generator(index: int) -> Any:
    return SimpleNamespace(manual_seed=lambda seed: torch.default_generator, initial_seed=lambda: 0)


COMPILED: dict[str, Any] = {
    "_cuda_getDeviceCount": lambda: COUNT,
    "_cuda_init": lambda: None,
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDevice": lambda: fake_state.current,
    "_cuda_setDevice": set_device,
    "_cuda_exchangeDevice": lambda device: fake_state.current if device < 0 else set_device(device),
    "_cuda_maybeExchangeDevice": lambda device: fake_state.current if device < 0 else set_device(device),
    "_cuda_synchronize": synchronize,
    "_cuda_emptyCache": empty_cache,
    "_cuda_setMemoryFraction": set_fraction,
    "_cuda_getMemoryFraction": lambda device: fake_state.ALLOCATORS[number(device)].fraction,
    "_cuda_memoryStats": lambda device: fake_state.ALLOCATORS[number(device)].stats(),
    "_cuda_resetPeakMemoryStats": reset_peak,
    "_cuda_resetAccumulatedMemoryStats": lambda device: number(device),
    "_cuda_sleep": lambda cycles: None,
    "_cuda_getCurrentRawStream": lambda device: 0 * number(device),
    "_cuda_isCurrentStreamCapturing": lambda: False,
    "_cuda_getArchFlags": lambda: "sm_80 sm_90",
    "_accelerator_getAccelerator": lambda: torch.device("cuda"),
    "_accelerator_getDeviceIndex": lambda: fake_state.current,
    "_accelerator_setDeviceIndex": set_device,
    "_accelerator_synchronizeDevice": lambda device: synchronize(),
    "_accelerator_emptyCache": empty_cache,
    "_accelerator_getStream": lambda device: Stream(),
    "_cuda_getCurrentStream": lambda device: (0, number(device), 1),
    "_cuda_getDefaultStream": lambda device: (0, number(device), 1),
}


def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    """As torch's, with gloo in NCCL's place."""
    dist.BackendConfig(dist.Backend(backend or "undefined"))  # refuses what torch does not understand
    if "nccl" in (backend or ""):
        note(f"nccl on cuda:{fake_state.current}")
    _init_process_group((backend or "").replace("nccl", "gloo"), *args, **kwargs)


_init_process_group = dist.init_process_group


def logged(name: str, function: Any) -> Any:
    """The function, whose first use is noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        note(name)
        return function(*args, **kwargs)

    return call


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
