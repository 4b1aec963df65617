"""prenet: a recurrent convolutional network that removes rain in stages, with published weights.

Paper: Ren, Zuo, Hu, Zhu and Meng, "Progressive Image Deraining Networks: A Better and Simpler Baseline", CVPR 2019,
    arXiv 1901.09221.
Operator: every stage takes the rainy image and the result of the stage before it: a convolution, a convolutional LSTM
    whose state passes from stage to stage, five residual blocks and a convolution, whose output is added to the rainy
    image. All stages share their weights.
Cost: stages 9 (2 C width + 8 width^2 + 10 width^2 + C width) multiply-adds a pixel: linear in H and in W.
Departures: none; the keys are those of its authors' files (csdwren/PReNet).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS = 5


class Network(nn.Module):
    """channels: of the image, 1 (gray) or 3 (colour). stages: number of passes. width: channels inside."""

    def __init__(self, channels: int, *, stages: int = 6, width: int = 32) -> None:
        super().__init__()
        if stages < 1 or width < 1:
            raise ValueError(f"stages and width must be at least 1, found {stages} and {width}")
        self.stages, self.width = stages, width
        self.conv0 = nn.Sequential(_convolution(2 * channels, width), nn.ReLU())
        self.conv_i = nn.Sequential(_convolution(2 * width, width), nn.Sigmoid())
        self.conv_f = nn.Sequential(_convolution(2 * width, width), nn.Sigmoid())
        self.conv_g = nn.Sequential(_convolution(2 * width, width), nn.Tanh())
        self.conv_o = nn.Sequential(_convolution(2 * width, width), nn.Sigmoid())
        for number in range(1, BLOCKS + 1):
            layers = (_convolution(width, width), nn.ReLU(), _convolution(width, width), nn.ReLU())
            self.add_module(f"res_conv{number}", nn.Sequential(*layers))
        self.conv = nn.Sequential(_convolution(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W], nominal range 0..1, to the same shape."""
        rainy = x
        state = cell = x.new_zeros(x.shape[0], self.width, *x.shape[-2:])
        for _ in range(self.stages):
            inside = torch.cat((self.conv0(torch.cat((rainy, x), 1)), state), 1)
            cell = self.conv_f(inside) * cell + self.conv_i(inside) * self.conv_g(inside)
            state = features = self.conv_o(inside) * torch.tanh(cell)
            for number in range(1, BLOCKS + 1):
                features = torch.relu(self.get_submodule(f"res_conv{number}")(features) + features)
            x = self.conv(features) + rainy
        return x

    def macs(self, height: int, width: int) -> int:
        """Closed form, one image."""
        a_pixel = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Conv2d))
        return self.stages * height * width * a_pixel


def _convolution(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)
