"""IPG, image processing graph: the most similar positions, more of them where there is detail.

Paper: "Image Processing GNN: Breaking Rigidity in Super-Resolution" (Tian et al., CVPR 2024).
Question: do single positions, chosen exactly and more of them where there is detail, beat the whole patches of KiT?
Operator: the candidates of a position are a square around its tile (local sample) and a regular grid over the map
    (global sample).  Of these it attends to those of highest cosine, itself always: k on average, its own number, the
    degree, growing with its detail, the difference from the mean of its 2 x 2 block summed over channels.
Cost: 4 H W C^2 for the projections and 3 S H W C for similarities and attention over the S = (tile + 2 halo)^2 +
    grid^2 candidates: what is not attended is masked.  Linear in H and W.
Departures: our reading where the paper leaves it open: both samples in one softmax (its code: in turn, block by block);
    the degree grows with the rank of the detail in the image, from 1 to 2 k - 1, so that its mean is k on every image
    (its code: in proportion to the detail, with a budget for each window); detail against a mean and not a bilinear
    copy of half the size; all positions share one grid (its code: each has the one that runs through it); scaled dot
    products without position bias (its code: cosines times a learned factor, and a bias computed from the positions);
    edges are found in every block (its code: once for a group of blocks); no convolutions and gates around the
    aggregation.  Candidates as similar as the last attended one are attended too; where there are fewer candidates than
    the degree, all are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitbench.attention import chunks, layout
from kitbench.attention.selection import nth_largest


class Attention(nn.Module):
    """Attention over a graph of similar positions: [B, H, W, C] normalised tokens -> [B, H, W, C].

    k: mean degree.  tile: side of the squares of positions that share their candidates.  halo: margin of the local
    sample around a tile.  grid: side of the global sample; a map that is narrower gives all it has.  Raises ValueError
    for settings out of range.
    """

    def __init__(
        self, dim: int, heads: int, *, shift: bool = False, k: int = 64, tile: int = 8, halo: int = 4, grid: int = 8
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, but dim is {dim} and heads is {heads}")
        for name, value, least in (("k", k, 1), ("tile", tile, 1), ("halo", halo, 0), ("grid", grid, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")
        self.dim, self.heads, self.k, self.tile, self.halo, self.grid = dim, heads, k, tile, halo, grid
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        q, k, v = layout.project(self.qkv, x)
        places = grid_places(height, width, self.grid, x.device)
        keys, values = (self.candidates(table, places) for table in (k, v))
        queries = layout.cut(q, self.tile).flatten(0, 1)
        q, k, v = (table.unflatten(-1, (self.heads, -1)).transpose(1, 2) for table in (queries, keys, values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.edges(x, places).flatten(0, 1)[:, None])
        tiles = out.transpose(1, 2).flatten(-2).unflatten(0, (batch, -1))
        y: Tensor = self.proj(layout.join(tiles, self.tile, height, width))
        return y

    def candidates(self, table: Tensor, places: Tensor) -> Tensor:
        """The local and the global sample of each of the M tiles of a table [B, H, W, C]: [B * M, S, C]."""
        near = layout.cut_halo(table, self.tile, self.halo)
        far = table.flatten(1, 2)[:, places]
        return torch.cat([near, far[:, None].expand(-1, near.shape[1], -1, -1)], 2).flatten(0, 1)

    @torch.no_grad()
    def edges(self, x: Tensor, places: Tensor) -> Tensor:
        """Which candidates the T positions of each of the M tiles of [B, H, W, C] attend to: bool [B, M, T, S]."""
        with torch.autocast(x.device.type, enabled=False):
            height, width = x.shape[1:3]
            unit = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
            own, near = layout.cut(unit, self.tile), layout.cut_halo(unit, self.tile, self.halo)
            far = unit.flatten(1, 2)[:, places]
            apart = (own.flatten(1, 2) @ far.mT).unflatten(1, own.shape[1:3])
            similarity = torch.cat([own @ near.mT, apart], -1)
            similarity.masked_fill_(~self.attendable(height, width, places)[:, None], float("-inf"))
            similarity.masked_fill_(self.itself(places), float("inf"))
            degree = layout.cut(degrees(x, self.k)[..., None], self.tile)  # [B, M, T, 1]; padding has 0
            least: Tensor = nth_largest(similarity, degree.clamp(1, similarity.shape[-1]))
            attended: Tensor = similarity >= least.clamp(min=-2)  # below every cosine, above what cannot be attended
            return attended

    def attendable(self, height: int, width: int, places: Tensor) -> Tensor:
        """Which candidates of a tile are positions of the map, and not in its local sample already: bool [M, S]."""
        rows, columns = layout.grid(height, width, self.tile)
        inside = layout.real_positions(height, width, self.tile, self.halo, places.device)
        if inside is None:
            inside = torch.ones(rows * columns, self.tile**2, dtype=torch.bool, device=places.device)
        tiles = torch.arange(rows * columns, device=places.device)[:, None]
        local = torch.ones(len(tiles), len(places), dtype=torch.bool, device=places.device)
        row, y = (torch.div(number, per, rounding_mode="floor") for number, per in ((tiles, columns), (places, width)))
        for tile, place in ((row, y), (tiles % columns, places % width)):
            first = tile * self.tile - self.halo
            local = local & (place >= first) & (place < first + self.tile + 2 * self.halo)
        return torch.cat([inside, ~local], 1)

    def itself(self, places: Tensor) -> Tensor:
        """Which candidate each position of a tile is itself: bool [T, S]."""
        edge = self.tile + 2 * self.halo
        side = torch.arange(self.tile, device=places.device) + self.halo
        own = (side[:, None] * edge + side).flatten()
        return own[:, None] == torch.arange(edge**2 + len(places), device=places.device)

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image."""
        rows, columns = layout.grid(height, width, self.tile)
        candidates = (self.tile + 2 * self.halo) ** 2 + min(self.grid, height) * min(self.grid, width)
        compared = rows * columns * self.tile**2 * candidates
        return 4 * height * width * self.dim**2 + 3 * compared * self.dim


def grid_places(height: int, width: int, grid: int, device: torch.device) -> Tensor:
    """Row-major places of a regular grid over a map, in the middle of its cells: int64 [<= grid^2]."""
    y, x = (
        (torch.arange(1, 2 * min(grid, extent), 2, device=device) * extent).div(
            2 * min(grid, extent), rounding_mode="floor"
        )
        for extent in (height, width)
    )
    return (y[:, None] * width + x).flatten()


def degrees(x: Tensor, k: int) -> Tensor:
    """How many positions each one of [B, H, W, C] attends to, 1 to 2 k - 1 by the rank of its detail: int64 [B, H, W].

    The sum over an image is exactly k H W: the ranks r and H W - 1 - r have degrees that add up to 2 k.
    """
    batch, height, width, _ = x.shape
    planes = x.detach().permute(0, 3, 1, 2)
    means = F.avg_pool2d(planes, 2, ceil_mode=True, count_include_pad=False)
    smooth = means.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width]
    detail = (planes - smooth).abs().sum(1).flatten(1)
    rank = chunks.inverse(chunks.rows_of(detail.argsort(dim=-1, stable=True))).view(batch, -1)
    rank -= torch.arange(batch, device=x.device)[:, None] * height * width
    degree = torch.div((2 * rank + 1) * (2 * k - 1), 2 * height * width, rounding_mode="floor") + 1
    return degree.view(batch, height, width)
