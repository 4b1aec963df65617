"""Peak memory: known allocations, closed forms, and prediction against measurement."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kitbench.cost.memory import peak, peak_bytes, predict_peak_bytes
from kitbench.model import methods

CPU = torch.device("cpu")
MIB = 1 << 20


def test_the_peak_is_what_lives_at_one_time():
    def run():
        a = torch.empty(3 * MIB, dtype=torch.uint8)
        del a
        b = torch.empty(2 * MIB, dtype=torch.uint8)
        c = torch.empty(2 * MIB, dtype=torch.uint8)
        return b, c

    assert peak_bytes(run, CPU) == pytest.approx(4 * MIB, abs=4096)


def test_what_lived_before_is_not_counted():
    held = torch.empty(8 * MIB, dtype=torch.uint8)
    assert peak_bytes(lambda: held + 1, CPU) == pytest.approx(8 * MIB, abs=4096)
    assert peak(lambda: held + 1, CPU).reserved is None


def test_temporaries_inside_kernels_are_seen():
    x = torch.randn(512, 512).t()  # the kernel copies it to make it contiguous
    assert peak_bytes(lambda: x.sort(-1), CPU) > MIB + 2 * MIB


def test_an_error_inside_is_passed_on():
    def fail():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        peak_bytes(fail, CPU)


def infer(module, x):
    with torch.no_grad():
        return module(x)


def train(module, x):
    x = x.detach().requires_grad_()
    module(x).square().mean().backward()
    module.zero_grad(set_to_none=True)


@pytest.mark.parametrize("step", [infer, train])
@pytest.mark.parametrize("name", ["kit", "global", "window", "conv"])
def test_prediction_is_close_to_the_measurement(name, step):
    module = methods.load_method(name).build(64, 4, False)
    x = torch.randn(1, 96, 96, 64)
    step(module, x)
    measured = peak_bytes(lambda: step(module, x), CPU)
    assert predict_peak_bytes(step, module, (1, 96, 96, 64)) == pytest.approx(measured, rel=0.13)


def test_materialised_attention_needs_its_logits():
    """(3 + 2hN/C) u in inference, u one feature map: q, k, v, and two matrices of logits."""
    module = methods.load_method("global").build(64, 4, False, form="materialised")
    u = 32 * 32 * 64 * 4
    expected = (3 + 2 * 4 * 32 * 32 / 64) * u
    assert predict_peak_bytes(infer, module, (1, 32, 32, 64)) == pytest.approx(expected, rel=0.02)


def test_prediction_of_a_huge_map_allocates_nothing():
    module = methods.load_method("global").build(64, 4, False, form="materialised")
    assert predict_peak_bytes(infer, module, (1, 4096, 4096, 64)) > 1 << 50  # pebibytes


def test_gradients_are_added_in_place_as_the_engine_does():
    class Fan(nn.Module):
        """Its peak is in the backward pass: a sum of gradients and the next one; never a new sum beside both."""

        def forward(self, x):
            return sum(x.flip(axis).sum() for axis in range(3))

    x = torch.randn(1, 1024, 1024)
    measured = peak_bytes(lambda: train(Fan(), x), CPU)
    assert measured == pytest.approx(2 * x.nbytes, rel=0.001)
    assert predict_peak_bytes(train, Fan(), x.shape) == pytest.approx(measured, rel=0.001)


def test_prediction_leaves_the_module_alone():
    module = methods.load_method("kit").build(32, 1, False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    predict_peak_bytes(train, module, (1, 32, 32, 32))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_peaks_are_allocated_and_reserved():
    device = torch.device("cuda")
    found = peak(lambda: torch.empty(64 * MIB, dtype=torch.uint8, device=device), device)
    assert found.allocated == 64 * MIB
    assert found.reserved is not None
    assert found.reserved >= 64 * MIB
