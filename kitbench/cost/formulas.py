"""Formulas for operators that torch's FlopCounterMode lacks, and the operators without multiplications."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

Shape = Sequence[int]


def _cdist(x1: Shape, x2: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    return 2 * prod(out_shape) * x1[-1]  # a difference, squared and added: one multiply-add a coordinate


def _cdist_backward(grad: Shape, x1: Shape, x2: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    return 2 * prod(grad) * x1[-1]


def _matrix_vector(matrix: Shape, vector: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _addmv(base: Shape, matrix: Shape, vector: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _outer(base: Shape, a: Shape, b: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    return 2 * prod(out_shape)


def _added_product(base: Shape, a: Shape, b: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    return 2 * prod(a) * b[-1]


def _sdpa(q: Shape, k: Shape, v: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(q, k, v)
    return flops


def _sdpa_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any, out_shape: Shape = (), **kwargs: Any) -> int:
    flops: int = sdpa_backward_flop_count(grad, q, k, v)
    return flops


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, wanted: Any, *, out_shape: Shape = (),
) -> int:  # fmt: skip
    """The gradients of input and weight take as many multiply-adds as the forward pass each, with or without groups."""
    positions = prod(x[2:] if transposed else grad[2:])
    return 2 * x[0] * positions * prod(weight) * (bool(wanted[0]) + bool(wanted[1]))


def missing_formulas() -> dict[Any, Callable[..., int]]:
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
FREE = {
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


def is_free(func: Any, name: str) -> bool:
    """Whether an operator that was dispatched multiplies no tensors, so that it needs no formula."""
    return func.namespace == "aten" and (func.is_view or torch.Tag.pointwise in func.tags or name in FREE)
