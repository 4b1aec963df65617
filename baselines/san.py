"""SAN, pairwise self-attention: vector attention over a small footprint.

Paper: "Exploring Self-Attention for Image Recognition" (Zhao, Jia, Koltun, CVPR 2020), section 3.1, relation of
    subtraction.
Operator: for each pair of a position i and a position j of its s x s footprint a small network turns phi(x_i) -
    psi(x_j), joined by the offset between them, into one weight for each group of channels; the weights are normalised
    by a softmax over j and multiply the values, channel by channel.
Cost: 2 H W C^2 for value and output, 2 H W C r for phi and psi with r = C / 8, and s^2 H W ((r + 2) r + r C / 8 + C)
    for the pairs. Memory s^2 H W (2 r + C / 8) numbers: the network's inputs are held for the backward pass.
Departures: no batch normalisation inside the network; the offset enters as it is, not through a learned map; positions
    outside the image are not attended; heads and shift have no meaning here and are ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARE = 8  # channels that share one weight


class Attention(nn.Module):
    """Pairwise vector attention: [B, H, W, C] normalised tokens -> [B, H, W, C].

    size: odd side s of the footprint.  Raises ValueError for settings out of range, and where 8 does not divide dim.
    """

    def __init__(self, dim: int, heads: int, *, shift: bool = False, size: int = 7) -> None:
        super().__init__()
        if dim % SHARE:
            raise ValueError(f"dim must be a multiple of {SHARE}, but is {dim}")
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, but is {size}")
        self.dim, self.size, self.relation = dim, size, dim // SHARE
        self.phi = nn.Linear(dim, self.relation)
        self.psi = nn.Linear(dim, self.relation)
        self.value = nn.Linear(dim, dim)
        self.expand = nn.Linear(self.relation + 2, self.relation)
        self.weigh = nn.Linear(self.relation, dim // SHARE)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        margin = self.size // 2
        around = (0, 0, margin, margin, margin, margin)
        keys, values = F.pad(self.psi(x), around), F.pad(self.value(x).unflatten(-1, (-1, SHARE)), (0, 0, *around))
        inside = F.pad(torch.ones(height, width, 1, dtype=torch.bool, device=x.device), around)
        places = [(slice(y, y + height), slice(z, z + width)) for y in range(self.size) for z in range(self.size)]
        step = torch.linspace(-1, 1, self.size, device=x.device, dtype=keys.dtype) if margin else keys.new_zeros(1)
        offsets = torch.cartesian_prod(step, step).view(-1, 2)  # [s^2, 2]
        difference = self.phi(x)[:, :, :, None] - torch.stack([keys[:, y, z] for y, z in places], 3)
        pairs = torch.cat([difference, offsets.expand(*difference.shape[:-1], 2)], -1)  # [B, H, W, s^2, r + 2]
        logits = self.weigh(self.expand(pairs.relu()).relu())  # [B, H, W, s^2, C / 8]
        outside = torch.stack([~inside[y, z] for y, z in places], 2)
        weights = logits.masked_fill(outside, float("-inf")).softmax(3)
        out = torch.zeros_like(values[:, :height, :width])
        for place, (y, z) in enumerate(places):
            out = out + weights[:, :, :, place, :, None] * values[:, y, z]
        mixed: Tensor = self.proj(out.flatten(-2))
        return mixed

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image.  Counters do not see the products of weights and values."""
        relation, dim = self.relation, self.dim
        pair = (relation + 2) * relation + relation * (dim // SHARE) + dim
        return height * width * (2 * dim**2 + 2 * dim * relation + self.size**2 * pair)
