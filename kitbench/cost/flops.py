"""Multiply-adds of what really runs, counted by two independent counters, and their agreement with a closed form.

1. torch's FlopCounterMode, at the level of dispatched operators, with formulas for those that it misses: the CPU's
   fused attention, Euclidean distances, matrix-vector products, and products of tensors that are then summed, which is
   how an attention looks that is written with `*` and `sum`. Works on real and on fake tensors, forward and backward.
2. fvcore, on the traced graph, with handles for the same operators. Forward only.

Own operators (`torch.library.custom_op`) bring their formula with `torch.utils.flop_counter.register_flop_formula`: the
one registration serves both counters. An operator that neither multiplies nor is known to be free of multiplications
lands in `uncounted`, and `reconcile` names it where closed form and count differ.

One multiply-add (MAC) is two FLOPs. Comparisons of sorts and exponentials of softmaxes are listed apart, never added.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from kitbench.cost.memory import OpenOperators, fake_copy

aten = torch.ops.aten

TOLERANCE = 0.01


@dataclass(frozen=True)
class Count:
    """What one call of a function computes."""

    macs: int
    """Multiply-adds."""
    by_operator: Mapping[str, int] = field(default_factory=dict)
    """Multiply-adds of each counted operator; they sum to `macs`."""
    comparisons: int = 0
    """Of sorts (n log2 n a row), top-k (n log2 2k a row) and arg-max (n a row)."""
    exponentials: int = 0
    """Of softmaxes, fused ones included."""
    gathered_bytes: int = 0
    """Bytes written by gathers and indexed selections."""
    uncounted: Mapping[str, int] = field(default_factory=dict)
    """Operators without a formula that may multiply: name -> numbers written. Products never summed are among them."""

    @property
    def gmacs(self) -> float:
        """Billions of multiply-adds."""
        return self.macs / 1e9

    @property
    def gflops(self) -> float:
        """Billions of floating-point operations, two a multiply-add."""
        return 2 * self.macs / 1e9


def count(fn: Callable[..., object], *args: Any, inside: bool = False) -> Count:
    """Run `fn(*args)` under torch's FlopCounterMode and count its multiply-adds, backward passes inside it included.

    inside: count what runs in the bodies of own operators, in the place of the formulas registered for them.
    Works on real tensors, on meta tensors and under FakeTensorMode. Raises whatever `fn` raises.
    """
    observer = _Observer()
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    # Compiled functions run eagerly meanwhile: no mode can see inside a compiled graph.
    with (
        torch.compiler.set_stance("force_eager"),
        observer,
        counter,
        _Flex(observer.contractions),
        OpenOperators() if inside else nullcontext(),
    ):
        fn(*args)
    by_operator = Counter({str(op): flops // 2 for op, flops in counter.get_flop_counts().get("Global", {}).items()})
    by_operator += observer.contractions
    return Count(
        macs=by_operator.total(),
        by_operator=dict(by_operator),
        comparisons=observer.comparisons,
        exponentials=observer.exponentials,
        gathered_bytes=observer.gathered_bytes,
        uncounted=dict(observer.uncounted + observer.pending()),
    )


def count_module(module: nn.Module, shape: tuple[int, ...], train: bool = False, inside: bool = False) -> Count:
    """Count one forward pass of `module` on a float32 input of `shape`, without computing anything (fake tensors).

    train: count a training step in its stead, forward and backward of the mean square, gradient of the input included.
    inside: see `count`.
    """
    with FakeTensorMode() as mode:
        fake = fake_copy(module, mode)
        x = torch.empty(shape, device=next((p.device for p in module.parameters()), None), requires_grad=train)

        def step() -> None:
            with torch.set_grad_enabled(train):
                y = fake(x)
            if train:
                y.square().mean().backward()

        return count(step, inside=inside)


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


def reconcile(closed_form_macs: int, counted_macs: int, uncounted: Mapping[str, int]) -> str | None:
    """None where closed form and count agree to 1 %; otherwise one sentence that marks the row."""
    if abs(counted_macs - closed_form_macs) <= TOLERANCE * closed_form_macs:
        return None
    found = f"closed form {closed_form_macs / 1e6:.1f} MMAC, counted {counted_macs / 1e6:.1f}"
    if not uncounted:
        return f"{found}: no operator was left uncounted, so the closed form is wrong"
    names = ", ".join(sorted(uncounted, key=lambda name: -uncounted[name])[:4])
    return f"{found}: nobody counted {names}"


def _cdist(x1: Any, x2: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(out_shape) * x1[-1]  # a difference, squared and added: one multiply-add a coordinate


def _cdist_backward(grad: Any, x1: Any, x2: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(grad) * x1[-1]


def _matrix_vector(matrix: Any, vector: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _addmv(base: Any, matrix: Any, vector: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _outer(base: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(out_shape)


def _added_product(base: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * prod(a) * b[-1]


def _sdpa(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _sdpa_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _convolution_backward(
    grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, wanted: Any, *, out_shape: Any = None,
) -> int:  # fmt: skip
    """Each of the gradients of input and weight takes as many multiply-adds as the forward pass, groups or not."""
    positions = prod(x[2:] if transposed else grad[2:])
    return 2 * x[0] * positions * prod(weight) * (bool(wanted[0]) + bool(wanted[1]))


def _formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of operators for which FlopCounterMode has no formula, or (grouped convolution, backward) a wrong one."""
    ours: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
        aten._scaled_dot_product_fused_attention_overrideable: _sdpa,
        aten._scaled_dot_product_fused_attention_overrideable_backward: _sdpa_backward,
        aten._euclidean_dist: _cdist,
        aten._cdist_forward: _cdist,
        aten._cdist_backward: _cdist_backward,
        aten.mv: _matrix_vector,
        aten.dot: _matrix_vector,
        aten.vdot: _matrix_vector,
        aten.addmv: _addmv,
        aten.addr: _outer,
        aten.addcmul: _outer,
        aten.addcmul_: _outer,
        aten.addbmm: _added_product,
        aten.baddbmm_: _added_product,
        aten.addmm_: _added_product,
    }
    missing = {op: formula for op, formula in ours.items() if op not in flop_registry}
    return missing | {aten.convolution_backward: _convolution_backward}


# Operators that move, compare, reduce or draw numbers: no product of two tensors in them. Element-wise operators (which
# torch tags), views and creations need no entry.
_FREE = {
    "_fused_dropout", "_index_put_impl_", "_local_scalar_dense", "_log_softmax", "_log_softmax_backward_data",
    "_reshape_alias", "_safe_softmax", "_softmax", "_softmax_backward_data", "_to_copy", "_unique2", "_unsafe_index",
    "_unsafe_index_put", "_unsafe_view", "alias", "all", "amax", "amin", "any", "arange", "argmax", "argmin", "argsort",
    "avg_pool2d", "avg_pool2d_backward", "bernoulli", "bernoulli_", "bincount", "bucketize", "cat", "clone", "col2im",
    "constant_pad_nd", "copy_", "count_nonzero", "cummax", "cumsum", "detach", "dropout", "embedding",
    "embedding_dense_backward", "empty", "empty_like", "empty_strided", "equal", "exponential_", "eye", "fill_", "flip",
    "full", "full_like", "gather", "histc", "im2col", "index", "index_add", "index_add_", "index_copy", "index_copy_",
    "index_fill", "index_fill_", "index_put", "index_put_", "index_select", "isfinite", "isin", "item", "linspace",
    "logsumexp", "logcumsumexp", "masked_fill", "masked_fill_", "masked_scatter", "masked_select", "max",
    "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "mean", "median", "min", "mode", "multinomial",
    "native_batch_norm", "native_batch_norm_backward", "native_dropout", "native_dropout_backward", "native_group_norm",
    "native_group_norm_backward", "native_layer_norm", "native_layer_norm_backward", "new_empty", "new_empty_strided",
    "new_full", "new_ones", "new_zeros", "nonzero", "normal_", "one_hot", "ones", "ones_like", "pixel_shuffle",
    "pixel_unshuffle", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm",
    "reflection_pad2d", "reflection_pad2d_backward", "repeat", "repeat_interleave", "replication_pad2d",
    "replication_pad2d_backward", "resize_", "roll", "rot90", "scalar_tensor", "scatter", "scatter_", "scatter_add",
    "scatter_add_", "scatter_reduce", "searchsorted", "select_backward", "select_scatter", "set_", "slice_backward",
    "slice_scatter", "sort", "split_with_sizes_copy", "stack", "std", "sum", "topk", "tril", "triu", "unfold_backward",
    "unfold_copy", "uniform_", "upsample_nearest2d", "upsample_nearest2d_backward", "var", "var_mean", "zero_", "zeros",
    "zeros_like", "linalg_vector_norm", "norm", "argwhere", "cummin", "diagonal_copy", "kthvalue",
}  # fmt: skip

_SUMS = {"sum", "mean"}
_ADDS = {"add", "add_", "sub", "sub_", "index_add", "index_add_"}
_PRODUCTS = {"mul", "mul_"}
_GATHERS = {"gather", "index", "index_select", "embedding", "_unsafe_index", "take", "take_along_dim"}
_FUSED_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}


class _Observer(TorchDispatchMode):
    """Sees every operator below FlopCounterMode: what that has no formula for, sorts, exponentials, written-out sums.

    A product of two tensors is a multiply-add if it is then added: by `sum`, `mean` or an addition, straight or through
    views. It is followed by its storage. A product that is never added is left pending, and reported as uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.contractions: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.comparisons = self.exponentials = self.gathered_bytes = 0
        self._products: dict[int, tuple[StorageWeakRef, int]] = {}
        self._left = 0
        self._counted = flop_registry.keys() | _formulas().keys()

    def pending(self) -> Counter[str]:
        """Numbers written by products of tensors that nothing added up."""
        left = self._left + sum(size for _, size in self._products.values())
        return Counter({"aten.mul": left} if left else {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out
        name = func._overloadpacket.__name__
        written = sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        self._note_work(name, args, out)
        if func.namespace == "aten" and name in _PRODUCTS and _is_product(args):
            self._remember(out)
        elif func.namespace == "aten" and name in _SUMS | _ADDS:
            for term in args:
                if isinstance(term, Tensor):
                    self._contract(term, f"aten.mul, {name.rstrip('_')}")
        if func._overloadpacket not in self._counted and not _is_free(func, name):
            self.uncounted[str(func._overloadpacket)] += written
        return out

    def _remember(self, product: Tensor) -> None:
        storage = product.untyped_storage()
        previous = self._products.pop(storage._cdata, None)
        self._left += previous[1] if previous else 0
        self._products[storage._cdata] = (StorageWeakRef(storage), product.numel())

    def _contract(self, term: Tensor, label: str) -> None:
        found = self._products.pop(term.untyped_storage()._cdata, None)
        if found:
            self.contractions[label] += found[1]

    def _note_work(self, name: str, args: Any, out: Any) -> None:
        if name in _GATHERS:
            self.gathered_bytes += out.numel() * out.element_size()
        elif name in ("_softmax", "_safe_softmax", "_log_softmax", "exp", "exp_", "logsumexp"):
            self.exponentials += args[0].numel()
        elif name in _FUSED_ATTENTION:
            self.exponentials += args[0].shape[:-1].numel() * args[1].shape[-2]
        elif name in ("sort", "argsort", "argmax", "argmin", "topk"):
            values = args[0]
            # sort.stable(self, *, stable, dim): the dimension that matters is all that differs
            row = max(1, values.shape[_dim(name, args)]) if values.dim() else 1
            steps = {"sort": row, "argsort": row, "topk": 2 * args[1] if name == "topk" else 2}.get(name, 2)
            self.comparisons += math.ceil(values.numel() * math.log2(max(2, steps)))


class _Flex(TorchDispatchMode):
    """Counts FlexAttention by the blocks of its mask, which FlopCounterMode cannot run; the output is left empty.

    On fake tensors the number of blocks is unknown, and the room that the mask has for them is counted.
    """

    supports_higher_order_operators = True

    def __init__(self, macs: Counter[str]) -> None:
        super().__init__()
        self.macs = macs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.higher_order.flex_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, _, mask = args[:5]
        with _disable_current_modes():
            pairs = _flex_pairs(query, key, mask)
        self.macs["flex_attention"] += pairs * (query.shape[-1] + value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return query.new_empty((*query.shape[:-1], value.shape[-1])), rows, rows.clone()


def _flex_pairs(query: Tensor, key: Tensor, mask: Any) -> int:
    """Pairs of a query and a key that the blocks of a BlockMask.as_tuple() hold, over batch and heads."""
    _, _, partial_count, partial_index, full_count, full_index, *_ = mask
    *_, rows, columns, _ = mask
    block = min(rows, query.shape[-2]) * min(columns, key.shape[-2])
    blocks = 0
    for counts, indices in ((partial_count, partial_index), (full_count, full_index)):
        if counts is not None:
            repeats = query.shape[:-2].numel() // counts.shape[:-1].numel()  # a mask may serve all heads and images
            room = indices.shape[-1] * counts.numel()
            blocks += repeats * (room if isinstance(counts, FakeTensor) else int(counts.sum()))
    whole = query.shape[:-2].numel() * -(-query.shape[-2] // rows) * -(-key.shape[-2] // columns)
    return min(blocks, whole) * block


def _dim(name: str, args: Any) -> int:
    place = 2 if name == "topk" else 1
    return args[place] if len(args) > place and isinstance(args[place], int) else -1


def _is_product(args: Any) -> bool:
    """Whether both factors are tensors of more than one number (a scale is no product), or one is squared."""
    return len(args) >= 2 and all(isinstance(factor, Tensor) and factor.numel() > 1 for factor in args[:2])


def _is_free(func: Any, name: str) -> bool:
    return func.namespace == "aten" and (func.is_view or torch.Tag.pointwise in func.tags or name in _FREE)


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
    return name in _FREE | _FREE_COMPOSITES or any(o.is_view or torch.Tag.pointwise in o.tags for o in overloads)


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


def _attention_macs(q: Any, k: Any, v: Any) -> int:
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
    return value.type().sizes()


def _shapes(values: Any) -> list[list[int]]:
    return [_shape(value) for value in values]
