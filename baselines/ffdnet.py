"""ffdnet: a convolutional denoiser that is told the noise level, with published weights.

Paper: Zhang, Zuo and Zhang, "FFDNet: Toward a Fast and Flexible Solution for CNN based Image Denoising", IEEE
    Transactions on Image Processing 27 (9), 2018, arXiv 1710.04026.
Operator: the image is rearranged into its four 2x2 subimages, and one map that holds sigma everywhere is added as a
    channel. 3x3 convolutions with ReLU between them give the four subimages of the result.
Cost: 9/4 ((4 C + 1) width + (depth - 2) width^2 + 4 C width) multiply-adds a pixel: linear in H and in W.
Departures: batch normalisation is merged into the convolutions, as in the files that KAIR (cszn/KAIR) publishes, whose
    keys these are (`model.0`, `model.2`, ...). Colour: depth 12, width 96, the defaults; gray: depth 15, width 64.
    Odd sides are continued by their last row and column, and the result is cut to size, as in KAIR.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """channels: of the image, 1 (gray) or 3 (colour). depth: number of convolutions. width: channels between them."""

    def __init__(self, channels: int, *, depth: int = 12, width: int = 96) -> None:
        super().__init__()
        if depth < 2 or width < 1:
            raise ValueError(f"depth must be at least 2 and width at least 1, found {depth} and {width}")
        widths = [4 * channels + 1, *[width] * (depth - 1), 4 * channels]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
        self.model = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Float [B, C, H, W], nominal range 0..1 but not clipped, to the same shape.

        sigma: [B, 1, 1, 1], standard deviation of the noise on the same scale as x (grey levels / 255).
        """
        height, width = x.shape[-2:]
        quarters = F.pixel_unshuffle(F.pad(x, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        level = sigma.expand(-1, -1, *quarters.shape[-2:])
        restored: Tensor = self.model(torch.cat((quarters, level), 1))
        return F.pixel_shuffle(restored, 2)[..., :height, :width]

    def macs(self, height: int, width: int) -> int:
        """Closed form, one image."""
        places = ((height + 1) // 2) * ((width + 1) // 2)
        return places * sum(layer.weight.numel() for layer in self.model if isinstance(layer, nn.Conv2d))
