"""Control: no attention, a depth-wise convolution in its place.

Papers: none as such; the token mixer of "A ConvNet for the 2020s" (Liu et al., CVPR 2022) between the projections of an
    attention.
Operator: value projection, depth-wise 7 x 7 convolution with zero padding, output projection.
Cost: 2 H W C^2 for the projections and 49 H W C for the convolution.
Departures: heads and shift have no meaning here and are ignored.
"""

from __future__ import annotations

from torch import Tensor, nn

SIZE = 7


class Attention(nn.Module):
    """Depth-wise convolution between two projections: [B, H, W, C] normalised tokens -> [B, H, W, C]."""

    def __init__(self, dim: int, heads: int, *, shift: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.value = nn.Linear(dim, dim)
        self.mix = nn.Conv2d(dim, dim, SIZE, padding=SIZE // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(self.value(x).permute(0, 3, 1, 2))  # NCHW in shape, channels-last in memory
        return self.proj(mixed.permute(0, 2, 3, 1))

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        return height * width * (2 * self.dim**2 + SIZE**2 * self.dim)
