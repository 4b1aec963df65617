"""Multiply-adds of what really runs, by torch's FlopCounterMode, at the level of dispatched operators.

Formulas are added for operators that it misses: the CPU's fused attention, Euclidean distances, matrix-vector products
(formulas.py), and products of tensors that are then summed, which is how an attention looks that is written with `*`
and `sum`. Works on real and on fake tensors, forward and backward. An operator that has no formula and is not known
to be free of multiplications lands in `uncounted`.

One multiply-add (MAC) is two FLOPs. Comparisons of sorts and exponentials of softmaxes are listed apart, never added.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from kitbench.cost.formulas import is_free, missing_formulas
from kitbench.cost.memory import OpenOperators, fake_copy, fake_mode


@dataclass(frozen=True)
class Count:
    """What one call of a function computes."""

    macs: int
    """Multiply-adds."""
    by_operator: Mapping[str, int] = field(default_factory=dict)
    """Multiply-adds of each counted operator; they sum to `macs`."""
    comparisons: int = 0
    """Of sorts (n log2 n per row), top-k (n log2 2k per row) and arg-max (n per row)."""
    exponentials: int = 0
    """Of softmaxes, fused ones included; a fused backward pass computes them again."""
    gathered_bytes: int = 0
    """Bytes written by gathers and indexed selections; by those inside own operators only where these are followed."""
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
    """Run `fn(*args)` and count its multiply-adds, those of backward passes inside it included.

    inside: count what runs in the bodies of own operators, instead of using the formulas registered for them.
    Works on real tensors, on meta tensors and under FakeTensorMode. Raises whatever `fn` raises.
    """
    observer = _Observer()
    counter = FlopCounterMode(display=False, custom_mapping=missing_formulas())
    # Compiled functions run eagerly here: dispatch modes cannot see inside a compiled graph.
    with (
        torch.compiler.set_stance("force_eager"),
        observer,
        counter,
        _Flex(observer),
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

    train: count a training step instead: forward and backward of the mean square, with the gradient of the input.
    inside: see `count`.
    """
    with fake_mode() as mode:
        fake = fake_copy(module, mode)
        x = torch.empty(shape, device=next((p.device for p in module.parameters()), None), requires_grad=train)

        def step() -> None:
            with torch.set_grad_enabled(train):
                y = fake(x)
            if train:
                y.square().mean().backward()

        return count(step, inside=inside)


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
_FUSED_BACKWARD = {f"{name}_backward" for name in _FUSED_ATTENTION}


class _Observer(TorchDispatchMode):
    """Counts what FlopCounterMode does not: operators without a formula, sorts, exponentials, products that are summed.

    A product of two tensors is a multiply-add if it is then added: by `sum`, `mean` or an addition, directly or through
    views. It is recognised by its storage. A product that is never added stays pending, and is reported as uncounted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.contractions: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.comparisons = self.exponentials = self.gathered_bytes = 0
        self._products: dict[int, tuple[StorageWeakRef, int]] = {}
        self._left = 0
        self._counted = flop_registry.keys() | missing_formulas().keys()

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
        if func._overloadpacket not in self._counted and not is_free(func, name):
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
        elif name in _FUSED_BACKWARD:
            self.exponentials += args[1].shape[:-1].numel() * args[2].shape[-2]
        elif name in ("patch_attention", "patch_attention_backward"):  # our own: kitbench/attention/operator.py
            q, k, neighbours = (args[0], args[1], args[3]) if name == "patch_attention" else (*args[1:3], args[6])
            keys = k.shape[1] * (1 if neighbours is None else neighbours.shape[1])
            self.exponentials += q.shape[:3].numel() * keys
        elif name in ("sort", "argsort", "argmax", "argmin", "topk", "nth_largest"):
            values = args[0]
            # sort.stable(self, *, stable, dim): the dimension that matters is all that differs
            row = max(1, values.shape[_dim(name, args)]) if values.dim() else 1
            steps = {"topk": 2 * args[1] if name == "topk" else 2, "argmax": 2, "argmin": 2}.get(name, row)
            self.comparisons += math.ceil(values.numel() * math.log2(max(2, steps)))


class _Flex(TorchDispatchMode):
    """Counts FlexAttention, which FlopCounterMode cannot run, by the blocks of its mask; its output is uninitialised.

    On fake tensors the number of blocks is unknown, and the capacity of the mask is counted.
    """

    supports_higher_order_operators = True

    def __init__(self, observer: _Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.observer = observer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.higher_order.flex_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, _, mask = args[:5]
        with _disable_current_modes():
            pairs = _flex_pairs(query, key, mask)
        self.observer.contractions["flex_attention"] += pairs * (query.shape[-1] + value.shape[-1])
        self.observer.exponentials += pairs
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        return query.new_empty((*query.shape[:-1], value.shape[-1])), rows, rows.clone()


def _flex_pairs(query: Tensor, key: Tensor, mask: Any) -> int:
    """Pairs of a query and a key that the blocks of a BlockMask.as_tuple() hold, over batch and heads."""
    _, _, partial_count, partial_index, full_count, full_index, *_ = mask
    *_, rows, columns, _ = mask
    block: int = min(rows, query.shape[-2]) * min(columns, key.shape[-2])
    blocks: int = 0
    for counts, indices in ((partial_count, partial_index), (full_count, full_index)):
        if counts is not None:
            repeats = query.shape[:-2].numel() // counts.shape[:-1].numel()  # a mask may serve all heads and images
            room = indices.shape[-1] * counts.numel()
            blocks += repeats * (room if isinstance(counts, FakeTensor) else int(counts.sum()))
    whole: int = query.shape[:-2].numel() * -(-query.shape[-2] // rows) * -(-key.shape[-2] // columns)
    return min(blocks, whole) * block


def _dim(name: str, args: Any) -> int:
    place = 2 if name == "topk" else 1
    return args[place] if len(args) > place and isinstance(args[place], int) else -1


def _is_product(args: Any) -> bool:
    """Whether both factors are tensors of more than one number (a scale is no product), or one is squared."""
    return len(args) >= 2 and all(isinstance(factor, Tensor) and factor.numel() > 1 for factor in args[:2])
