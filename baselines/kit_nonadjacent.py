"""Control: KiT that may not attend to the patches that touch the query patch.

Paper: none; a control for kitbench/attention/kit.py.
Question: what is left of KiT's gain when what a window could have seen too is taken from its pool?
Operator: KiT, but its neighbours are the patch itself and the k - 1 most similar of the patches that do not touch it,
    neither by a side nor by a corner.  The patch itself stays: without it a position would not see its own
    surroundings, and the comparison with KiT would be about that.  In shifted blocks the map is a torus, as in KiT, and
    patches touch across its border too.
Cost: that of KiT, 4 H W C^2 + 2 k P^2 H W C and the retrieval, whose products are KiT's: it keeps the k + 8 best, of
    which at most 8 touch, and drops those.
Departures: on a map where some patch has fewer than k - 1 patches that do not touch it, all patches attend to as many
    neighbours as that one; on one of 3 x 3 patches or fewer this is window attention.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kitbench.attention import kit, layout, retrieval

TOUCHING = 8


class Attention(kit.Attention):
    """KiT without adjacent patches: [B, H, W, C] tokens -> [B, H, W, C].

    Settings as in KiT where they apply; chunk must offer k + 8 patches.  Raises ValueError for settings out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shift: bool = False,
        patch: int = 8,
        k: int = 4,
        retrieval: Literal["lsh", "exact"] = "lsh",
        rounds: int = 4,
        chunk: int = 32,
    ) -> None:
        super().__init__(dim, heads, shift=shift, patch=patch, k=k, retrieval=retrieval, rounds=rounds, chunk=chunk)
        kit.require(
            chunk >= k + TOUCHING,
            f"chunk must be at least k + {TOUCHING}, to offer k neighbours that do not touch, but chunk is {chunk} and "
            f"k is {k}",
        )
        self.grid = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        self.set_grid(x)
        return super().forward(x)

    def set_grid(self, x: Tensor) -> None:
        """Note the rows and columns of patches of a map [B, H, W, C]: the search asks which patches touch."""
        # As plain numbers: while a network is traced, sizes are tensors.
        self.grid = layout.grid(int(x.shape[1]), int(x.shape[2]), self.patch)

    def attended(self, x: Tensor) -> tuple[Tensor, int]:
        """As KiT's."""
        self.set_grid(x)
        return super().attended(x)

    def search(self, descriptors: Tensor) -> Tensor:
        """Neighbours int64 [B, N, k] of descriptors [B, N, D] of the patches of the map that was given last."""
        return self.apart(self.candidates(descriptors, descriptors.shape[1]))

    def candidates(self, descriptors: Tensor, count: int) -> Tensor:
        """The min(k + 8, N) most similar patches of each patch, itself first: int64 [B, N, .]."""
        wanted = min(self.k + TOUCHING, count)
        if self.retrieval == "exact":
            return retrieval.exact(descriptors, wanted)
        rotations = torch.randn_like(self.rotations) if self.training else self.rotations
        return retrieval.lsh(descriptors, wanted, rotations, self.chunk, adjacent=True)

    def apart(self, found: Tensor) -> Tensor:
        """Of found patches [B, N, .] in order of similarity, itself first, the first k that do not touch: [B, N, k]."""
        rows, columns = self.grid
        if rows * columns != found.shape[1]:
            raise RuntimeError(f"the map that was given last has {rows} x {columns} patches, not {found.shape[1]}")
        query = torch.arange(rows * columns, device=found.device)[:, None]
        down = self.steps(found // columns - query // columns, rows)
        across = self.steps(found % columns - query % columns, columns)
        touching = (down <= 1) & (across <= 1) & (found != query)
        # Stable: those that do not touch, in the order of similarity, and then the others.
        return found.gather(-1, touching.long().argsort(dim=-1, stable=True)[..., : self.kept(rows, columns)])

    def steps(self, difference: Tensor, extent: int) -> Tensor:
        """Steps between patches of one axis, around the torus where the grid is shifted."""
        distance = difference.abs()
        return torch.minimum(distance, extent - distance) if self.roll else distance

    def kept(self, rows: int, columns: int) -> int:
        """Neighbours of a patch, itself among them: k, or as many as the patch that the most patches touch has."""
        return min(self.k, 1 + rows * columns - min(rows, 3) * min(columns, 3))

    def report(self, x: Tensor) -> dict[str, object]:
        """As KiT's: 'recall' is of the k - 1 most similar patches that do not touch, 'chance' that of random ones."""
        self.set_grid(x)
        if self.roll:
            x = x.roll((-self.roll, -self.roll), (1, 2))
        real = layout.real_positions(x.shape[1], x.shape[2], self.patch, 0, x.device)
        descriptors = retrieval.describe(layout.cut(x, self.patch), real, self.descriptor)
        count = descriptors.shape[1]
        found = self.search(descriptors)
        truth = self.apart(retrieval.exact(descriptors, min(self.k + TOUCHING, count)))
        others = count - min(self.grid[0], 3) * min(self.grid[1], 3)  # of a patch inside
        return {
            "retrieval": self.retrieval,
            "descriptor": self.descriptor,
            "k": found.shape[-1],
            "patches": count,
            "recall": retrieval.recall(found, truth),
            "chance": (found.shape[-1] - 1) / others if others else 1.0,
        }

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image: KiT's, with as many neighbours as are kept."""
        rows, columns = layout.grid(height, width, self.patch)
        count, positions = rows * columns, self.patch**2
        dropped = min(self.k, count) - self.kept(rows, columns)
        return super().macs(height, width) - 2 * count * positions**2 * dropped * self.dim
