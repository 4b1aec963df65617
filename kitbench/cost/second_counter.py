"""fvcore, a second counter of multiply-adds: unlike torch's it works on the traced graph, forward only.

Handles are added for the operators that it misses. Our own operators (`torch.library.custom_op`) bring their formula
with `torch.utils.flop_counter.register_flop_formula`: the one registration serves both counters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from kitbench.cost.formulas import FREE, Shape, aten


def count_fvcore(module: nn.Module, *args: Tensor) -> tuple[int, set[str]]:
    """fvcore's count of one forward pass on real tensors: multiply-adds, and the operators that it has no handle for.

    Layer and group norms, which fvcore counts as 5 operations a number, are left out: they are not multiply-adds.
    """
    analysis = _import_fvcore()(module, args).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    free = ("aten::layer_norm", "aten::group_norm", "aten::batch_norm", "aten::instance_norm")
    handles = _fvcore_handles() | dict.fromkeys(free, lambda inputs, outputs: 0)
    analysis.set_op_handle(*[item for pair in handles.items() for item in pair])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)  # tracing is what fvcore does
        return int(analysis.total()), {op for op in analysis.unsupported_ops() if not _is_free_in_graphs(op)}


def _import_fvcore() -> Any:
    with warnings.catch_warnings():
        # fvcore compiles its losses with torch.jit at import, which torch has deprecated.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis
    return FlopCountAnalysis


def _is_free_in_graphs(kind: str) -> bool:
    """Whether a node of a traced graph, for which there is no handle, holds no multiply-add."""
    namespace, _, name = kind.partition("::")
    packet = getattr(aten, name, None)
    if namespace != "aten" or packet is None:
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return name in FREE | _FREE_COMPOSITES or any(o.is_view or torch.Tag.pointwise in o.tags for o in overloads)


_FREE_COMPOSITES = {
    "__and__", "__lshift__", "__or__", "__rshift__", "__xor__", "contiguous", "expand_as", "log_softmax", "pad",
    "reshape", "size", "softmax", "swapaxes", "take_along_dim", "tensor_split", "type_as", "unflatten", "where",
    "flatten", "movedim", "numel", "chunk", "ScalarImplicit", "Int", "IntImplicit", "lift_fresh", "floor_divide",
}  # fmt: skip


def _fvcore_handles() -> dict[str, Callable[[Any, Any], int]]:
    """Handles for what fvcore misses, and every formula registered with FlopCounterMode for an operator of our own."""
    handles: dict[str, Callable[[Any, Any], int]] = {
        "aten::matmul": _graph_matmul,
        "aten::scaled_dot_product_attention": lambda inputs, outputs: _attention_macs(*_shapes(inputs[:3])),
        "aten::cdist": lambda inputs, outputs: prod(_shape(outputs[0])) * _shape(inputs[0])[-1],
        "aten::baddbmm": lambda inputs, outputs: prod(_shape(outputs[0])) * _shape(inputs[1])[-1],
        "aten::addcmul": lambda inputs, outputs: prod(_shape(outputs[0])),
        "aten::mv": lambda inputs, outputs: prod(_shape(inputs[0])),
        "aten::dot": lambda inputs, outputs: prod(_shape(inputs[0])),
    }
    handles |= dict.fromkeys(("aten::sum", "aten::mean", "aten::add", "aten::sub"), _graph_sum)
    for op, formula in flop_registry.items():
        name = getattr(op, "_qualified_op_name", "aten::")
        if not name.startswith("aten::"):
            handles[name] = _adapted(formula)
    return handles


def _adapted(formula: Callable[..., int]) -> Callable[[Any, Any], int]:
    def handle(inputs: Any, outputs: Any) -> int:
        arguments = [_argument(value) for value in inputs]
        results = [torch.empty(_shape(value), device="meta") for value in outputs]
        return formula(*arguments, out_val=results[0] if len(results) == 1 else results) // 2

    return handle


def _argument(value: Any) -> Any:
    """A traced value as the formula takes it: a tensor by its shape alone, a constant as it is."""
    if value.isCompleteTensor():
        return torch.empty(_shape(value), device="meta")
    return value.toIValue()


def _attention_macs(q: Shape, k: Shape, v: Shape) -> int:
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _graph_matmul(inputs: Any, outputs: Any) -> int:
    """fvcore's own handle ignores a batch that the left side is broadcast over."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _graph_sum(inputs: Any, outputs: Any) -> int:
    """Products among the terms of an addition, found through views."""
    total = 0
    for value in inputs:
        node = value.node()
        while node.kind() in _GRAPH_VIEWS:
            node = next(iter(node.inputs())).node()
        if node.kind() in ("aten::mul", "aten::mul_"):
            factors = [list(_shape(f)) for f in list(node.inputs())[:2] if f.isCompleteTensor()]
            if len(factors) == 2 and all(prod(f) > 1 for f in factors):
                total += prod(_shape(next(iter(node.outputs()))))
    return total


_GRAPH_VIEWS = {
    "aten::view", "aten::reshape", "aten::unsqueeze", "aten::squeeze", "aten::permute", "aten::transpose",
    "aten::unflatten", "aten::flatten", "aten::contiguous", "aten::slice", "aten::select", "aten::movedim",
}  # fmt: skip


def _shape(value: Any) -> list[int]:
    sizes: list[int] = value.type().sizes()
    return sizes


def _shapes(values: Any) -> list[list[int]]:
    return [_shape(value) for value in values]
