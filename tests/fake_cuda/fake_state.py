"""What the make-believe device holds: memory of each device, which one is the current one, and the log."""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from typing import Any

import torch

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
current = 0


def after_fork() -> None:
    """A child of fork holds nothing of the device."""
    global ALLOCATORS, current
    ALLOCATORS, current = [Allocator(index) for index in range(COUNT)], 0


def index_of(device: Any) -> int:
    """The number of a CUDA device; the current one where it has none. Raises as CUDA does where it is not there."""
    chosen = torch.device(device)
    index = current if chosen.index is None else chosen.index
    if not 0 <= index < COUNT:
        raise RuntimeError("CUDA error: invalid device ordinal")
    torch.cuda._lazy_init()
    return index


_noted: set[str] = set()


def note(what: str) -> None:
    """Write it to the log, once a process."""
    if LOG is not None and what not in _noted:
        _noted.add(what)
        with open(LOG, "a") as file:  # noqa: PTH123
            file.write(f"{what}\n")
