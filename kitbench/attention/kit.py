"""KiT: k-nearest-neighbour patch attention.

Paper: "KNN Local Attention for Image Restoration" (Lee, Choi, Sohn, Min), CVPR 2022, DOI 10.1109/CVPR52688.2022.00218.
Operator: the map is cut into P x P patches; locality sensitive hashing finds for each patch the k most similar patches
    of the image, itself first; the positions of the patch attend to all positions of those k patches ("pair-wise local
    attention"), with one softmax for each pair of patches and the pairs weighted by their log-sum-exp, which is one
    softmax over the k P^2 keys.
Cost: 4 H W C^2 for the projections, 2 k P^2 H W C for the attention, and the retrieval: hashing rounds (nb/2) H W C /
    P^2 with nb <= 128 buckets, and re-ranking 3 chunk rounds H W C / P^2 multiply-adds with the mean descriptor.
    Linear in the pixels H W (exact retrieval: (HW/P^2)^2 C).
Departures: only the abstract of the paper, the beginning of its introduction and part of a caption could be read.
    Every choice below that is a setting is our reading of them: patch side, k, hashing, descriptor, aggregation,
    support.  So are the shifted grid in alternate blocks (a cyclic roll by P/2, the map taken as a torus) and the
    relative position bias shared by all neighbours.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kitbench.attention import layout, retrieval
from kitbench.attention.operator import patch_attention


class Found(NamedTuple):
    """What the retrieval found for B images of N patches."""

    neighbours: Tensor
    """int64 [B, N, k], each patch itself first."""
    weights: Tensor | None
    """[B * N, k]; None for aggregate 'similarity'."""
    order: Tensor | None
    """int64 [B, N]: on CUDA, the patches by their hash code, so that those with common neighbours run side by side."""


class Attention(nn.Module):
    """k-nearest-neighbour patch attention: [B, H, W, C] normalised tokens -> [B, H, W, C]; float32, float64, bfloat16.

    dim: channels C.  heads: number of heads, a divisor of dim.  shift: roll the patch grid by patch // 2.
    patch: side P of a patch.  k: neighbours of a patch, itself among them; at most the number of patches is used.
    retrieval: 'lsh'; 'exact'; 'random' (the same for all images of a batch); 'chunk-only' (lsh without
    adjacent chunks).
    descriptor: 'mean' over the positions of a patch, or 'flat', all of them.  rounds, chunk: of the hashing.
    aggregate: of the pairs, by 'similarity' (log-sum-exp), 'mean', or 'descriptor' (softmax of cosine / tau).
    support: a position attends to the whole 'patch', or the size x size neighbourhood of its 'aligned' position in it.
    reuse: take the neighbours that the block before on this level found (the shifted grid then reuses them as they
    are). Raises ValueError unless heads divides dim, patch, k, rounds >= 1, chunk >= k, tau > 0, size is
    odd and positive.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shift: bool = False,
        patch: int = 8,
        k: int = 4,
        retrieval: Literal["lsh", "exact", "random", "chunk-only"] = "lsh",
        descriptor: Literal["mean", "flat"] = "mean",
        rounds: int = 4,
        chunk: int = 32,
        aggregate: Literal["similarity", "mean", "descriptor"] = "similarity",
        tau: float = 0.1,
        support: Literal["patch", "aligned"] = "patch",
        size: int = 3,
        reuse: bool = False,
    ) -> None:
        super().__init__()
        require(heads >= 1 and dim % heads == 0, f"heads must divide dim, but dim is {dim} and heads is {heads}")
        for name, value in (("patch", patch), ("k", k), ("rounds", rounds)):
            require(value >= 1, f"{name} must be at least 1, but is {value}")
        require(chunk >= k, f"chunk must be at least k, to offer k neighbours, but chunk is {chunk} and k is {k}")
        require(tau > 0, f"tau must be positive, but is {tau}")
        require(size >= 1 and size % 2 == 1, f"size must be odd and positive, but is {size}")
        self.dim, self.heads, self.patch, self.k = dim, heads, patch, k
        self.roll = patch // 2 if shift else 0
        self.retrieval, self.descriptor, self.rounds, self.chunk = retrieval, descriptor, rounds, chunk
        self.aggregate, self.tau = aggregate, tau
        self.margin = size // 2 if support == "aligned" else 0
        self.support, self.reuse = support, reuse
        self.leader: tuple[Attention, ...] = ()
        self.found: Tensor | None = None
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if support == "aligned":
            self.bias = layout.PositionBias(layout.footprint_index(patch, size), size * size, heads)
        else:
            self.bias = layout.PositionBias(layout.relative_index(patch), (2 * patch - 1) ** 2, heads)
        self.rotations: Tensor
        self.salt: Tensor
        if retrieval in ("lsh", "chunk-only"):
            width = dim if descriptor == "mean" else patch * patch * dim
            self.register_buffer("rotations", torch.randn(rounds, width, MAX_HALF))
        if retrieval == "random":
            self.register_buffer("salt", torch.randint(2**62, (k,)))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        if self.roll:
            x = x.roll((-self.roll, -self.roll), (1, 2))
        patches = layout.cut(x, self.patch)
        count = patches.shape[1]
        real = layout.real_positions(height, width, self.patch, 0, x.device)
        neighbours, weights, order = self.neighbours(patches, real)
        first = torch.arange(batch, device=x.device)[:, None, None] * count
        neighbours = (neighbours + first).view(batch * count, -1)
        order = None if order is None else (order + first[..., 0]).flatten()

        q, k, v = layout.project(self.qkv, x if self.support == "aligned" else patches)
        if self.support == "aligned":
            q = layout.cut(q, self.patch)
            k, v = layout.cut_halo(k, self.patch, self.margin), layout.cut_halo(v, self.patch, self.margin)
        q, k, v = (table.flatten(0, 1).unflatten(-1, (self.heads, -1)) for table in (q, k, v))  # [B * N, ., h, d]
        query_label, key_label = layout.padding_labels(batch, height, width, self.patch, self.margin, x.device)
        out = patch_attention(q, k, v, neighbours, self.bias(), query_label, key_label, weights, order)
        y: Tensor = self.proj(layout.join(out.reshape(batch, count, -1, channels), self.patch, height, width))
        return y.roll((self.roll, self.roll), (1, 2)) if self.roll else y

    def follow(self, previous: Attention) -> None:
        """With setting `reuse`: attend to the neighbours of `previous`, the block before on this level."""
        if self.reuse:
            self.leader = (previous,)  # a tuple, so that it does not become a submodule

    def neighbours(self, patches: Tensor, real: Tensor | None) -> Found:
        """Neighbours of patches [B, N, T, C].

        real: bool [N, T], the positions that are not padding, or None where all are real.
        """
        with torch.no_grad(), torch.autocast(patches.device.type, enabled=False):
            descriptors = retrieval.describe(patches, real, self.descriptor)
            found = self.leader[0].found if self.leader else self.search(descriptors)
            if found is None:
                raise RuntimeError("this block reuses the neighbours of the block before it, which has not run yet")
            if self.reuse:
                self.found = found
            order = None
            if patches.is_cuda and self.retrieval in ("lsh", "chunk-only"):
                order = retrieval.hash_order(descriptors, self.rotations[0], self.chunk)
            if self.aggregate == "similarity":
                return Found(found, None, order)
            if self.aggregate == "mean":
                return Found(found, descriptors.new_full(found.shape, 1 / found.shape[-1]).flatten(0, 1), order)
            batch = torch.arange(len(found), device=found.device)[:, None, None]
            cosine = torch.einsum("bnd,bnkd->bnk", descriptors, descriptors[batch, found])
            return Found(found, (cosine / self.tau).softmax(-1).flatten(0, 1), order)

    def search(self, descriptors: Tensor) -> Tensor:
        """Neighbours int64 [B, N, k] of descriptors [B, N, D].  In training the draws are new; otherwise those kept."""
        count, device = descriptors.shape[1], descriptors.device
        k = min(self.k, count)
        if self.retrieval == "exact":
            return retrieval.exact(descriptors, k)
        if self.retrieval == "random":
            salt = torch.randint(2**62, (self.k,), device=device) if self.training else self.salt
            return retrieval.random_neighbours(count, k, salt).expand(len(descriptors), -1, -1)
        rotations = torch.randn_like(self.rotations) if self.training else self.rotations
        return retrieval.lsh(descriptors, k, rotations, self.chunk, adjacent=self.retrieval == "lsh")

    def report(self, x: Tensor) -> dict[str, object]:
        """What a run's record keeps of the retrieval: see `retrieval_report`."""
        return retrieval_report(self, x)

    def attended(self, x: Tensor) -> tuple[Tensor, int]:
        """Which patches the forward pass attends to on x [B, H, W, C]: int64 [B, N, k], each itself first; columns.

        Patches are numbered row by row, in so many columns, on the rolled grid where the block has one.
        """
        if self.roll:
            x = x.roll((-self.roll, -self.roll), (1, 2))
        real = layout.real_positions(x.shape[1], x.shape[2], self.patch, 0, x.device)
        found = self.neighbours(layout.cut(x, self.patch), real).neighbours
        return found, layout.grid(x.shape[1], x.shape[2], self.patch)[1]

    def needed_macs(self, height: int, width: int) -> int:
        """Multiply-adds of one image that the definition needs: with aligned support, the keys of the footprints."""
        rows, columns = layout.grid(height, width, self.patch)
        footprint = (2 * self.margin + 1) ** 2 if self.support == "aligned" else self.patch**2
        excess = (self.patch + 2 * self.margin) ** 2 - footprint
        queries, k = rows * columns * self.patch**2, min(self.k, rows * columns)
        return self.macs(height, width) - 2 * queries * k * excess * self.dim

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one forward pass of one image: projections, attention, retrieval."""
        rows, columns = layout.grid(height, width, self.patch)
        count, positions = rows * columns, self.patch**2
        k = min(self.k, count)
        keys = (self.patch + 2 * self.margin) ** 2
        cut_before = self.support == "patch"  # whether q, k and v are computed on the padding too
        projected = count * positions if cut_before else height * width
        total = 3 * projected * self.dim**2 + height * width * self.dim**2
        total += 2 * count * positions * k * keys * self.dim
        width_of_descriptor = self.dim if self.descriptor == "mean" else positions * self.dim
        if not self.leader:
            total += self.retrieval_macs(count, width_of_descriptor)
        if self.aggregate == "descriptor":
            total += count * k * width_of_descriptor
        return total

    def retrieval_macs(self, count: int, width: int) -> int:
        """Multiply-adds of the search among `count` patches with descriptors of `width` numbers."""
        if self.retrieval == "random":
            return 0
        reach = 3 * self.chunk if self.retrieval == "lsh" else self.chunk
        if self.retrieval == "exact" or count <= reach:
            return count * count * width
        ranked = -(-count // self.chunk) * self.chunk
        return self.rounds * width * (count * (retrieval.buckets(count, self.chunk) // 2) + ranked * reach)


MAX_HALF = retrieval.MAX_BUCKETS // 2


def require(condition: bool, otherwise: str) -> None:
    """Raises ValueError with the sentence `otherwise` where a condition on the settings does not hold."""
    if not condition:
        raise ValueError(otherwise)


@torch.no_grad()
def retrieval_report(module: Attention, x: Tensor) -> dict[str, object]:
    """How well the retrieval of `module` finds the exact neighbours on normalised tokens x [B, H, W, C].

    'recall' is the share, in [0, 1], of the k - 1 most similar other patches that it finds, in the mode (training or
    evaluation) that the module is in; 'chance' is that of random neighbours.
    """
    if module.roll:
        x = x.roll((-module.roll, -module.roll), (1, 2))
    patches = layout.cut(x, module.patch)
    real = layout.real_positions(x.shape[1], x.shape[2], module.patch, 0, x.device)
    descriptors = retrieval.describe(patches, real, module.descriptor)
    count = patches.shape[1]
    k = min(module.k, count)
    found = module.search(descriptors)
    return {
        "retrieval": module.retrieval,
        "descriptor": module.descriptor,
        "k": k,
        "patches": count,
        "recall": retrieval.recall(found, retrieval.exact(descriptors, k)),
        "chance": (k - 1) / (count - 1) if count > 1 else 1.0,
    }
