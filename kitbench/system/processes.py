"""The processes that share one run: `torchrun --nproc-per-node N -m kitbench run ...`, by torch's own means.

Outside torchrun there is one process, and nothing here does anything. Under it every process reads the same data and
takes the same decisions: those that depend on files are taken by the first process, which alone writes records.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
_TIMES = itertools.count()
"""How often this process has joined others; as often as each of them."""


@dataclass(frozen=True)
class World:
    """This process among those that share the run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of `count` things: neighbours, of sizes that differ by one at most, nothing twice."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, ask: Callable[[], bool]) -> Callable[[], bool]:
        """Whether any process says yes: all are asked now; the result, where it is called, waits for them."""
        if self.size == 1:
            return ask
        answer = torch.tensor(int(ask()))  # on the CPU: waits for no device
        pending = dist.all_reduce(answer, op=dist.ReduceOp.MAX, async_op=True)

        def known() -> bool:
            pending.wait()
            return bool(answer)

        return known

    def agree(self, value: T) -> T:
        """What the first process says; the value is anything that pickle takes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, values: list[T]) -> list[T]:
        """The values of all processes, one process after another, at every one of them."""
        if self.size == 1:
            return values
        boxes: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(boxes, values)
        return [value for box in boxes for value in box]


def process_context() -> ForkServerContext | SpawnContext:
    """How processes of our own are started: by a fork server, which imports once for all, where the system has one.

    A plain fork would copy the state of torch's threads.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def current() -> World:
    """This process among those that it has joined."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def pieces(share: range, most: int | None) -> list[range]:
    """A share cut into pieces of at most `most`; None: in one piece."""
    return [share[first : first + most] for first in range(0, len(share), most)] if most else [share]


def started_by_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def leads() -> bool:
    """Whether this process speaks for the command: the only one, or the first of those that torchrun has started."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def own_gpus() -> int:
    """How many processes torchrun has started on this machine, where there is a GPU for each of them; else 0."""
    if not started_by_torchrun() or not torch.cuda.is_available():
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return processes if processes <= torch.cuda.device_count() else 0


@contextmanager
def joined() -> Iterator[World]:
    """Join the other processes that torchrun has started while the block runs; alone where it has not.

    NCCL needs a GPU for each process; where several share one (--device cuda:0), and on the CPU, they speak by gloo.
    """
    if not started_by_torchrun():
        yield World()
        return
    nccl = own_gpus() > 0 and dist.is_nccl_available()
    if nccl:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # In float64 some weight gradients have another memory format than their parameters: a copy more, no other number.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # A command may join several times, one suite after another: addresses of an earlier time must not be met again.
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"kitbench-{next(_TIMES)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank, world_size=size)
    yield current()
    dist.destroy_process_group()  # not after an error: the others may be waiting, and torchrun ends them
