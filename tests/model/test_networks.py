"""Whole networks with published weights against second implementations, and networks that take the noise level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kitbench.baselines import ffdnet, prenet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.model.noise_level import at_noise_level


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def flops(network: nn.Module, *arguments: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(("height", "width"), [(8, 6), (9, 6), (8, 7), (9, 7)])
def test_ffdnet_works_on_the_four_subimages_and_a_map_of_the_noise_level(height: int, width: int) -> None:
    network = ffdnet.Network(3, depth=3, width=5)
    x, sigma = torch.rand(2, 3, height, width), torch.tensor([0.1, 0.2]).view(2, 1, 1, 1)
    even = torch.zeros(2, 3, height + height % 2, width + width % 2)
    for row in range(even.shape[2]):
        for column in range(even.shape[3]):
            even[:, :, row, column] = x[:, :, min(row, height - 1), min(column, width - 1)]
    places = [(channel, i, j) for channel in range(3) for i in (0, 1) for j in (0, 1)]
    parts = [even[:, channel, i::2, j::2] for channel, i, j in places]
    parts.append(torch.ones_like(parts[0]) * sigma[:, 0])
    inside = torch.stack(parts, 1)
    state = network.state_dict()
    for number in (0, 2, 4):
        inside = F.conv2d(inside, state[f"model.{number}.weight"], state[f"model.{number}.bias"], padding=1)
        inside = inside if number == 4 else inside.clamp(min=0)
    expected = torch.zeros_like(even)
    for number, (channel, i, j) in enumerate(places):
        expected[:, channel, i::2, j::2] = inside[:, number]
    torch.testing.assert_close(network(x, sigma), expected[:, :, :height, :width])
    assert flops(network, x[:1], sigma[:1]) == 2 * network.macs(height, width)


def test_prenet_is_the_recurrence_of_its_paper() -> None:
    network = prenet.Network(3, stages=3, width=4)
    x, state = torch.rand(2, 3, 9, 7), network.state_dict()

    def conv(name: str, z: Tensor) -> Tensor:
        return F.conv2d(z, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    result, h, c = x, torch.zeros(2, 4, 9, 7), torch.zeros(2, 4, 9, 7)
    for _ in range(3):
        z = torch.cat((F.relu(conv("conv0.0", torch.cat((x, result), 1))), h), 1)
        forget, take, give = (1 / (1 + torch.exp(-conv(f"conv_{gate}.0", z))) for gate in "fio")
        c = forget * c + take * torch.tanh(conv("conv_g.0", z))
        h = give * torch.tanh(c)
        z = h
        for block in range(1, 6):
            inner = F.relu(conv(f"res_conv{block}.2", F.relu(conv(f"res_conv{block}.0", z))))
            z = F.relu(inner + z)
        result = x + conv("conv.0", z)
    torch.testing.assert_close(network(x), result)
    assert flops(network, x[:1]) == 2 * network.macs(9, 7)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("ffdnet", {"depth": 1}, "depth must be at least 2"),
        ("ffdnet", {"width": 0}, "width at least 1"),
        ("prenet", {"stages": 0}, "stages and width must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        methods.load_method(name).build_network(3, **settings)


class Blind(nn.Module):
    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        return x * (2 if features else 1)


class Required(nn.Module):
    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return x + level


class Optional(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor | None = None) -> Tensor:
        return x if sigma is None else x + sigma


class Three(nn.Module):
    def forward(self, x: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
        return x


class ByKeyword(nn.Module):
    def forward(self, x: Tensor, *, sigma: Tensor | None = None) -> Tensor:
        return x


class Third(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        return x


class NoImage(nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("network", "sigma", "added"),
    [
        (Blind(), 51.0, 0.0),
        (Required(), 51.0, 0.2),
        (Optional(), 51.0, 0.2),
        (Optional(), None, 0.0),
        (Blind(), None, 0.0),
        (ByKeyword(), None, 0.0),
    ],
)
def test_the_noise_level_is_handed_to_a_required_second_argument_or_one_named_sigma(
    network: nn.Module, sigma: float | None, added: float
) -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(at_noise_level(network, sigma, "mine")(x), x + added)


@pytest.mark.parametrize(
    ("network", "sigma", "expected"),
    [
        (Required(), None, "'mine' needs the noise level .level., which only tasks of kind denoise state"),
        (Three(), 25.0, r"forward must take \(x\), or \(x, sigma\) .* found \(x: .*sigma: .*mask: "),
        (NoImage(), 25.0, r"forward must take \(x\)"),
        (ByKeyword(), 25.0, r"forward must take \(x\), or \(x, sigma\) .* found \(x: .*\*, sigma: "),
        (Third(), 25.0, r"forward must take \(x\), or \(x, sigma\) .* found \(x: .*mask: .*sigma: "),
    ],
)
def test_a_forward_that_cannot_be_called_is_refused(network: nn.Module, sigma: float | None, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        at_noise_level(network, sigma, "mine")
