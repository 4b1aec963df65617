"""Tensors of the make-believe device, and how they are made, moved and computed with."""

from __future__ import annotations

import weakref
from typing import Any

import fake_state
import torch
from fake_state import index_of, note
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    _index: int

    @staticmethod
    def wrap(tensor: torch.Tensor, index: int) -> CudaTensor:
        if isinstance(tensor, CudaTensor):
            return tensor
        fake_state.ALLOCATORS[index].hold(tensor.untyped_storage())
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
        if func is torch.ops.aten.zero_.default and args[0].dtype is torch.int8:
            return args[0]  # a timer's write over the L2 cache, of which only the time is of use
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
    with torch._C.DisableTorchFunction():  # else Devices takes `device=` for that of a tensor to be made
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
