"""Control: no attention, a gated depth-wise convolution in its place.

Papers: none as such; the token mixer of "A ConvNet for the 2020s" (Liu et al., CVPR 2022) with a multiplicative gate
    as in "Simple Baselines for Image Restoration" (Chen et al., ECCV 2022), between the projections of an attention.
Operator: value and gate projections, depth-wise 7 x 7 convolution of the values with zero padding, times the gate,
    output projection. The gate makes it depend on the content, like attention, but without comparing positions.
Cost: 3 H W C^2 for the projections, 49 H W C for the convolution.
Departures: heads and shift have no meaning here and are ignored.
"""

from __future__ import annotations

from torch import Tensor, nn

SIZE = 7


class Attention(nn.Module):
    """Gated depth-wise convolution between projections: [B, H, W, C] normalised tokens -> [B, H, W, C]."""

    def __init__(self, dim: int, heads: int, *, shift: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.value_gate = nn.Linear(dim, 2 * dim)
        self.mix = nn.Conv2d(dim, dim, SIZE, padding=SIZE // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.value_gate(x).chunk(2, dim=-1)
        mixed = self.mix(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y: Tensor = self.proj(mixed * gate)
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image; the gate's product is a scaling, not a multiply-add."""
        return height * width * (3 * self.dim**2 + SIZE**2 * self.dim)
