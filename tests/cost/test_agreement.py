"""What a row says of its multiply-adds: where the closed form and the two counters agree, and where they do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kitbench.cost.agreement import state_macs
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.spec.suite import Backbone


def test_a_wrong_closed_form_of_a_cheap_attention_is_found_in_its_network():
    """Its multiply-adds are a thousandth of the network's, so that any error is less than 1 % of those."""
    method = methods.load_method("channel")
    config = Backbone(width=16, head_dim=8, blocks=(1, 1), attention_levels=(1,))
    model = UNet(3, config, method, method.resolve({}), seed=0).eval()
    assert state_macs(model, 3, 64, model.macs(64, 64)).note is None
    for _, attention in model.attentions():
        true = attention.macs
        attention.macs = lambda height, width, true=true: true(height, width) + true(height, width) // 50
    assert state_macs(model, 3, 64, model.macs(64, 64)).note.startswith("closed form 61.5 MMAC, counted 61.2")


class PlainTensor(nn.Module):
    """Its tensor is no buffer, so that it has data where all else is fake."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.ones(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.factor[0, 0].expand(x.shape[-1], x.shape[-1])


def test_what_cannot_be_counted_is_a_note_and_no_traceback_of_torch(caplog):
    assert state_macs(PlainTensor(), 3, 64, 0).note.startswith("closed form only: it could not be counted")
    assert caplog.text == ""


class AddedProducts(nn.Module):
    """[1, C, N, N] to [N, N] by an operator that torch's counter has a formula for, and fvcore has not."""

    def forward(self, x):
        return torch.addbmm(x[0, 0], x[0], x[0])


class Coarse(nn.Module):
    """A network for images whose sides are multiples of 256 px, too costly there for a second counter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 65, padding=32)

    def forward(self, x):
        if x.shape[-1] % 256:
            raise ValueError("not a multiple of 256")
        return self.layer(x)


def test_a_row_says_where_a_network_runs_at_no_size_that_takes_a_moment():
    found = state_macs(Coarse(), 3, 256, 9 * 65**2 * 256**2)
    assert found.counted == found.closed
    assert found.note == "checked by one counter only: it cannot be run at 192 px (ValueError)"


class Untraceable(nn.Module):
    def forward(self, x):
        if torch.jit.is_tracing():
            raise TypeError("not while tracing")
        return x


def test_a_row_says_where_the_two_counters_disagree():
    found = state_macs(AddedProducts(), 3, 64, 3 * 64**3)
    assert found.counted == 3 * 64**3
    assert found.note == (
        f"at 256 px torch's counter finds {3 * 256**3 / 1e6:.1f} MMAC, fvcore 0.0: in fvcore, no formula for aten::addbmm"
    )
    assert state_macs(AddedProducts(), 3, 64, None).note.endswith("no formula for aten::addbmm")


def test_a_row_says_where_fvcore_cannot_trace():
    note = state_macs(Untraceable(), 3, 64, 0).note
    assert note == "checked by one counter only: fvcore could not trace it (TypeError)"


@pytest.mark.parametrize(("name", "side"), [("window", 256), ("global", 64)])
def test_the_counters_are_compared_once_at_a_size_that_takes_a_moment(name, side):
    method = methods.load_method(name)
    config = Backbone(width=16, head_dim=8, blocks=(1, 1), attention_levels=(1,))
    model = UNet(3, config, method, method.resolve({}), seed=0).eval()
    sides = []
    model.register_forward_hook(
        lambda module, inputs, output: None if isinstance(output, FakeTensor) else sides.append(output.shape[-1])
    )
    assert state_macs(model, 3, 256, model.macs(256, 256)).note is None
    assert sides == [side]
