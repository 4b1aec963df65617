"""What benchmarks/attention.py measures: KiT, windows and global attention as modules and as bare operators.

The attentions of the suite `family`, as modules, are made in attention_family.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import attention_family
import torch
import torch.nn.functional as F
from kitbench.baselines import global_
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kitbench.attention import kit, layout, reference
from kitbench.attention.operator import patch_attention

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
REFERENCE_UP_TO = 512
GLOBAL_UP_TO = 128
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Case:
    """One shape and type: `k` neighbours of 64 positions, or windows of 64 k positions."""

    dim: int
    k: int
    pixels: int
    dtype: str

    @property
    def heads(self) -> int:
        return self.dim // 32

    @property
    def map_bytes(self) -> int:
        """Of H W C numbers of the tables' type."""
        return self.pixels**2 * self.dim * DTYPES[self.dtype].itemsize

    def macs(self, scope: str, mode: str, operator: str) -> int:
        """Multiply-adds of kit, or of window attention with as many keys."""
        area = self.pixels**2
        attention = 2 * area * 64 * min(self.k, area // 64) * self.dim
        projections = search = 0
        if scope == "module":
            projections = 4 * area * self.dim**2
            if operator == "kit":
                search = kit.Attention(self.dim, self.heads, k=self.k).retrieval_macs(area // 64, self.dim)
        forward, backward = attention + projections + search, 2 * projections + attention * 5 // 2
        return {"forward": forward, "backward": backward, "training": forward + backward}[mode]

    def least_bytes(self, scope: str, mode: str) -> int:
        """What must be read and written at least."""
        forward, backward = {"module": (10, 18), "operator": (4, 8), "cutting": (8, 12)}[scope]
        return self.map_bytes * {"forward": forward, "backward": backward, "training": forward + backward}[mode]


class Window(nn.Module):
    """Windows of 16 x 16, for more keys several side by side: baselines/window.py without shift or padding."""

    def __init__(self, dim: int, heads: int, keys: int, form: str) -> None:
        super().__init__()
        self.heads, self.keys = heads, keys
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        index = layout.relative_index(16)
        self.bias = layout.PositionBias(index, int(index.max()) + 1, heads) if form != "no bias" else None
        self.attend = registered_windows if form == "registered" else fused_windows

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        bias = None if self.bias is None else self.bias()
        out = self.attend(*self.tables(x), bias)
        y: Tensor = self.proj(layout.join(out.reshape(1, -1, 256, channels), 16, height, width))
        return y

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [windows, keys, h, d]."""
        windows = layout.cut(x, 16).reshape(-1, self.keys, x.shape[-1])
        q, k, v = (table.unflatten(-1, (self.heads, -1)) for table in layout.project(self.qkv, windows))
        return q, k, v


def registered_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention within each row of the tables [M, L, h, d] by the registered operator; bias [h, 256, 256].

    Windows side by side have the bias of a window and itself.  On CUDA the kernels read each window's neighbours by
    index; elsewhere a row is one patch.
    """
    assert bias is not None
    beside = q.shape[1] // 256
    if q.device.type == "cuda" and beside > 1:
        return indexed_windows(q, k, v, bias)
    return patch_attention(q, k, v, None, repeated(bias, beside))


def indexed_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same with patches of 256 positions, which have all windows of their row for neighbours."""
    count, length = q.shape[:2]
    beside = length // 256
    first = torch.arange(count * beside, device=q.device) // beside * beside
    neighbours = first[:, None] + torch.arange(beside, device=q.device)
    wq, wk, wv = (table.reshape(-1, 256, *table.shape[2:]) for table in (q, k, v))
    return patch_attention(wq, wk, wv, neighbours, bias).reshape(q.shape)


def fused_windows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same by torch's operator, with or without bias."""
    beside = q.shape[1] // 256
    mask = None if bias is None else repeated(bias, beside)[None].to(q.dtype)
    if mask is not None and not torch.is_grad_enabled():
        mask = mask.detach()  # a view of a parameter asks for a gradient even so, and torch then takes the slow path
    q, k, v = (table.transpose(1, 2) for table in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def repeated(bias: Tensor, beside: int) -> Tensor:
    """The bias [h, 256, 256] of windows side by side, [h, 256 n, 256 n]."""
    return bias if beside == 1 else bias.repeat(1, beside, beside)


class ReadableKit(kit.Attention):
    """KiT through the readable reference."""

    def forward(self, x: Tensor) -> Tensor:
        def gathered(*arguments: Any) -> Tensor:
            return reference.patch_attention(*arguments[:-1])  # the last is an order, which changes no result

        with mock.patch.object(kit, "patch_attention", gathered):
            return super().forward(x)


class Failure(Exception):
    """An operator failed, and why."""


@dataclass
class Operator:
    """What is measured: `run` gives the output, `leaves` are what it is differentiated for."""

    run: Callable[[], Tensor]
    leaves: list[Tensor]
    backends: tuple[SDPBackend, ...] = ()
    """Torch's kernels that it may use, the fastest first; none where it uses its own."""
    optional: bool = False
    """Whether it is no failure where the backends do not take it."""
    keys: int | None = None
    """Keys per query, where they are not those of the case."""
    backend: SDPBackend | None = None
    """The one that it uses, once `prepared`."""

    def output(self) -> Tensor:
        # Every other kernel is off, so that torch raises an error where this one does not take the tables.
        with contextlib.nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return self.run()

    def forward(self) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return self.output()

        return call

    def training(self) -> Callable[[], object]:
        with torch.no_grad():
            upstream = torch.randn_like(self.output())
        return lambda: torch.autograd.grad(self.output(), self.leaves, upstream)

    def backward(self) -> Callable[[], object]:
        out = self.output()
        upstream = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, self.leaves, upstream, retain_graph=True)

    def prepared(self, mode: str) -> Callable[[], object]:
        """The call of a pass, made once, with the first backend that takes it.  Raises Failure where none does."""
        make = {"forward": self.forward, "training": self.training, "backward": self.backward}[mode]
        if not self.backends:
            call = make()
            call()
            return call
        refused = []
        for backend in self.backends:
            self.backend = backend
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # why torch refuses a kernel comes as warnings
                    call = make()
                    call()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                refused.append(f"{backend.name}: {one_line(error)}")
            else:
                return call
        raise Failure("; ".join(refused))


def one_line(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0]
    return said if isinstance(error, Failure) else f"{type(error).__name__}: {said}"[:300]


def modules(case: Case, x: Tensor) -> dict[str, Operator]:
    """Whole attentions on the map x [1, H, W, C]."""
    keys = 64 * case.k
    built: dict[str, tuple[nn.Module, tuple[SDPBackend, ...]]] = {
        "kit": (kit.Attention(case.dim, case.heads, k=case.k), ()),
        "window": (Window(case.dim, case.heads, keys, "registered"), ()),
        "window sdpa": (Window(case.dim, case.heads, keys, "sdpa"), (*FUSED, SDPBackend.MATH)),
        "window no bias": (Window(case.dim, case.heads, keys, "no bias"), FUSED),
    }
    if case.dtype == "float32" and case.pixels <= REFERENCE_UP_TO:
        built["reference"] = (ReadableKit(case.dim, case.heads, k=case.k), ())
    if case.dtype == "float32" and case.pixels <= GLOBAL_UP_TO:
        built["global sdpa"] = (global_.Attention(case.dim, case.heads), FUSED)
    number: dict[str, int | None] = {}
    if case.pixels <= attention_family.UP_TO:
        for name in attention_family.NAMES:
            module, number[name] = attention_family.build(name, case.dim, case.heads, keys, case.pixels)
            built[name] = (module, ())

    def running(module: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
                y: Tensor = module(leaf)
                return y

        return run

    found, leaf = {}, x.clone().requires_grad_()
    for name, (module, backends) in built.items():
        leaves = [leaf, *module.parameters()]
        found[name] = Operator(running(module.to(x.device)), leaves, backends, keys=number.get(name))
    return found


@torch.no_grad()
def bare(case: Case, x: Tensor, scope: str) -> dict[str, Operator]:
    """Of scope 'operator' or 'cutting': operators on ready tables, made from the map x as the modules make them."""

    def leaf(table: Tensor) -> Tensor:
        return table.detach().to(DTYPES[case.dtype]).contiguous().requires_grad_()

    knn = kit.Attention(case.dim, case.heads, k=case.k).to(x.device)
    patches = layout.cut(x, knn.patch)
    retrieved = knn.neighbours(patches, None)
    neighbours, order = retrieved.neighbours[0], None if retrieved.order is None else retrieved.order[0]
    q, k, v = (leaf(table[0].unflatten(-1, (case.heads, -1))) for table in layout.project(knn.qkv, patches))
    bias = knn.bias().detach().requires_grad_()
    window = Window(case.dim, case.heads, 64 * case.k, "registered").to(x.device)
    wq, wk, wv = (leaf(table) for table in window.tables(x))  # [windows, keys, h, d]
    assert window.bias is not None
    window_bias = window.bias().detach().requires_grad_()
    if scope == "operator":
        found = {
            "kit": Operator(lambda: patch_attention(q, k, v, neighbours, bias, order=order), [q, k, v, bias]),
            "window": Operator(lambda: registered_windows(wq, wk, wv, window_bias), [wq, wk, wv, window_bias]),
            "window sdpa": Operator(
                lambda: fused_windows(wq, wk, wv, window_bias), [wq, wk, wv, window_bias], (*FUSED, SDPBackend.MATH)
            ),
            "window no bias": Operator(lambda: fused_windows(wq, wk, wv, None), [wq, wk, wv], FUSED),
        }
        if x.device.type == "cuda":
            found["window cudnn"] = Operator(
                lambda: fused_windows(wq, wk, wv, None), [wq, wk, wv], (SDPBackend.CUDNN_ATTENTION,), optional=True
            )
        return found
    image = leaf(x)

    def joined(out: Tensor, patch: int) -> Tensor:
        return layout.join(out.reshape(1, -1, patch**2, case.dim), patch, case.pixels, case.pixels)

    def cut_kit() -> Tensor:
        queries = layout.cut(image, knn.patch)[0].unflatten(-1, (case.heads, -1))
        return joined(patch_attention(queries, k, v, neighbours, bias, order=order), knn.patch)

    def cut_window() -> Tensor:
        return joined(fused_windows(layout.cut(image, 16).reshape(wq.shape), wk, wv, None), 16)

    return {
        "kit": Operator(cut_kit, [image, k, v, bias]),
        "window no bias": Operator(cut_window, [image, wk, wv], FUSED),
        "cut and join": Operator(lambda: joined(layout.cut(image, knn.patch), knn.patch), [image]),
    }


def searching(case: Case, x: Tensor) -> Operator:
    """The retrieval of kit alone, which has no backward pass."""
    module = kit.Attention(case.dim, case.heads, k=case.k).to(x.device)
    patches = layout.cut(x, module.patch)
    return Operator(lambda: module.neighbours(patches, None)[0], [])


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products of float32 in TensorFloat-32 or not, on CUDA; the kernels follow the same flag."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def tokens(case: Case, device: torch.device) -> Tensor:
    """A map [1, H, W, C] of smooth structure with noise, normalised as before an attention."""
    torch.manual_seed(0)
    side, shape = case.pixels, (1, case.dim, case.pixels, case.pixels)
    coarse = F.interpolate(torch.randn(1, case.dim, side // 8, side // 8), (side, side), mode="bilinear")
    return F.layer_norm((coarse + 0.3 * torch.randn(shape)).permute(0, 2, 3, 1), (case.dim,)).contiguous().to(device)
