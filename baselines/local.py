"""Plain local attention: every position attends to its own s x s neighbourhood.

Papers: "Stand-Alone Self-Attention in Vision Models" (Ramachandran et al., NeurIPS 2019); "Local Relation Networks" (Hu
    et al., ICCV 2019).
Operator: a sliding, convolution-like s x s footprint around each position, with a learned relative position bias.
Cost: 4 H W C^2 for the projections and 2 s^2 H W C for the attention.  Executed as 8 x 8 query tiles over their halos
    of (s + 7)^2 keys with one fixed mask, 2 (s + 7)^2 H W C, which is several times faster than unfolding the keys.
Departures: positions outside the image are not attended (the papers pad with zeros, which then take part in the
    softmax); a bias for each offset where SASA adds learned row and column embeddings to the keys.
"""

from __future__ import annotations

from torch import Tensor, nn

from kitbench.attention import layout
from kitbench.attention.operator import patch_attention

TILE = 8


class Attention(nn.Module):
    """Local attention: [B, H, W, C] normalised tokens -> [B, H, W, C].

    size: odd side s of the neighbourhood.  Raises ValueError for settings out of range.
    """

    def __init__(self, dim: int, heads: int, *, shift: bool = False, size: int = 7) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, but is {size}")
        self.dim, self.heads, self.size = dim, heads, size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias = layout.PositionBias(layout.footprint_index(TILE, size), size**2, heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        margin = self.size // 2
        q, k, v = layout.project(self.qkv, x)
        q = layout.cut(q, TILE)
        k, v = layout.cut_halo(k, TILE, margin), layout.cut_halo(v, TILE, margin)
        q, k, v = (table.flatten(0, 1).unflatten(-1, (self.heads, -1)) for table in (q, k, v))  # [B * N, ., h, d]
        query_label, key_label = layout.padding_labels(batch, height, width, TILE, margin, x.device)
        out = patch_attention(q, k, v, None, self.bias(), query_label, key_label)
        y: Tensor = self.proj(layout.join(out.reshape(batch, -1, TILE**2, channels), TILE, height, width))
        return y

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds executed in one forward pass of one image: tiles with their halos."""
        rows, columns = layout.grid(height, width, TILE)
        keys = (TILE + self.size - 1) ** 2
        return 4 * height * width * self.dim**2 + 2 * rows * columns * TILE**2 * keys * self.dim

    def needed_macs(self, height: int, width: int) -> int:
        """Multiply-adds of one image that the definition needs: size^2 keys a position."""
        return height * width * self.dim * (4 * self.dim + 2 * self.size**2)
