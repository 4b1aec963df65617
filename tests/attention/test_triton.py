"""The Triton kernels: in Triton's interpreter where there is no GPU, through the operator where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from kitbench.attention import reference
from kitbench.attention.operator import gather_reason, patch_attention

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_CUDA = torch.cuda.is_available()


def arguments(patches: int, queries: int, keys: int, heads: int, width: int, n: int, labels: bool, device: str) -> dict:
    torch.manual_seed(0)
    q = torch.randn(patches, queries, heads, width)
    k, v = torch.randn(2, patches, keys, heads, width)
    neighbours = torch.stack([torch.randperm(patches)[:n] for _ in range(patches)])
    bias = torch.randn(heads, queries, keys)
    bias[:, :, 1::3] = -torch.inf
    built = {"q": q, "k": k, "v": v, "neighbours": neighbours, "bias": bias, "query_label": None, "key_label": None}
    if labels:
        built["query_label"] = torch.ones(patches, queries, dtype=torch.bool)
        built["key_label"] = torch.rand(patches, keys) < 0.6
        built["key_label"][neighbours[:, 0], 0] = True
    built = {name: table if table is None else table.to(device) for name, table in built.items()}
    for name in ("q", "k", "v", "bias"):
        built[name].requires_grad_()
    return built


SHAPES: list[tuple[int, int, int, int, int, int, bool]] = [
    (5, 16, 16, 1, 16, 2, False),
    (6, 9, 25, 2, 5, 3, True),
    (4, 16, 100, 1, 8, 2, True),
]


def check_kernels() -> None:
    """Kernels against the reference on CPU tensors, in the interpreter: it must be on before triton is imported."""
    from kitbench.attention import triton_kernels

    for shape in SHAPES:
        built = arguments(*shape, "cpu")
        leaves = [built[name] for name in ("q", "k", "v", "bias")]
        expected = reference.patch_attention(**built)
        upstream = torch.randn_like(expected)
        expected_gradients = torch.autograd.grad(expected, leaves, upstream)
        with torch.no_grad():
            out, lse = triton_kernels.forward(**built)
            gradients = triton_kernels.backward(grad=upstream, out=out, lse=lse, **built)
        torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.skipif(not HAS_TRITON or HAS_CUDA, reason="needs the triton package, and no GPU")
def test_kernels_equal_the_reference_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA or not HAS_TRITON, reason="needs a CUDA device and the triton package")
@pytest.mark.parametrize("shape", [*SHAPES, (64, 64, 64, 2, 32, 4, False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_operator_reads_by_index_on_cuda(
    shape: tuple[int, int, int, int, int, int, bool], dtype: torch.dtype, tolerance: float
) -> None:
    built = arguments(*shape, "cuda")
    names = ("q", "k", "v", "bias")
    narrow = {**built, **{name: built[name].detach().to(dtype).requires_grad_() for name in names}}
    assert gather_reason(narrow["q"]) is None
    expected, found = reference.patch_attention(**built), patch_attention(**narrow)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(found, [narrow[name] for name in names], upstream.to(dtype))
    theirs = torch.autograd.grad(expected, [built[name] for name in names], upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b).norm() <= tolerance * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")
def test_gather_path_on_cuda_equals_the_reference() -> None:
    built = {
        name: table.detach().double().requires_grad_() if table is not None and table.is_floating_point() else table
        for name, table in arguments(6, 9, 25, 2, 5, 3, True, "cuda").items()
    }
    assert "float64" in str(gather_reason(built["q"]))
    torch.testing.assert_close(patch_attention(**built), reference.patch_attention(**built), rtol=0, atol=1e-10)


def test_gather_path_says_why_it_is_taken() -> None:
    assert "need CUDA" in str(gather_reason(torch.zeros(2, 4, 1, 8)))


if __name__ == "__main__":
    check_kernels()
