"""dncnn: a plain convolutional denoiser with published weights, which validate the Gaussian denoising protocol.

Paper: Zhang, Zuo, Chen, Meng and Zhang, "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image
    Denoising", IEEE Transactions on Image Processing 26 (7), 2017.
Operator: 3x3 convolutions with ReLU between them predict the noise, which is subtracted from the input. Sigma is not
    an input.
Cost: 9 (2 C width + (depth - 2) width^2) multiply-adds a pixel: linear in H and in W.
Departures: batch normalisation is merged into the convolutions, as in the files that KAIR (cszn/KAIR) publishes, whose
    keys these are (`model.0`, `model.2`, ...). depth 17 for one sigma, 20 for its blind models.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class Network(nn.Module):
    """channels: of the image, 1 (gray) or 3 (colour). depth: number of convolutions. width: channels between them."""

    def __init__(self, channels: int, *, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        if depth < 2 or width < 1:
            raise ValueError(f"depth must be at least 2 and width at least 1, found {depth} and {width}")
        widths = [channels, *[width] * (depth - 1), channels]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
        self.model = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, H, W], nominal range 0..1 but not clipped, to the same shape."""
        noise: Tensor = self.model(x)
        return x - noise

    def macs(self, height: int, width: int) -> int:
        """Closed form, one image."""
        return height * width * sum(layer.weight.numel() for layer in self.model if isinstance(layer, nn.Conv2d))
