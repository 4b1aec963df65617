"""Which patches a patch attends: exact k-NN, angular locality sensitive hashing, the random control.  No gradients.

A descriptor is one vector per patch; the neighbours of patch i are the k patches of its own image with the highest
cosine, patch i itself always first.  One index set serves all heads.  Source: our reading of the abstract of KiT (Lee
et al., CVPR 2022); the hashing is that of Reformer (Kitaev et al., ICLR 2020, section 2), sorted, cut into chunks, with
both adjacent chunks, and re-ranked by the true cosine.

N patches, D numbers per descriptor, k neighbours.  Index tensors are int64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BUCKETS = 128
BLOCK_ENTRIES = 1 << 20  # similarities held at once by the exact search: 4 MiB of float32


def describe(patches: Tensor, real: Tensor | None, kind: str) -> Tensor:
    """Unit descriptors [B, N, D] of patches [B, N, T, C], centred over the patches of an image; float32 or float64.

    kind: 'mean' (D = C, over real positions) or 'flat' (D = T * C, padding zero).  real: bool [N, T] or None.
    """
    patches = patches.detach()
    patches = patches if patches.dtype == torch.float64 else patches.float()
    if kind == "flat":
        if real is not None:
            patches = patches * real[None, :, :, None]
        descriptors = patches.flatten(2)
    elif real is None:
        descriptors = patches.mean(2)
    else:
        share = real.to(patches.dtype) / real.sum(1, keepdim=True)
        descriptors = torch.einsum("bntc,nt->bnc", patches, share)
    return F.normalize(descriptors - descriptors.mean(1, keepdim=True), dim=-1)


def exact(descriptors: Tensor, k: int) -> Tensor:
    """The k <= N most similar patches of each patch, itself first: [B, N, D] -> int64 [B, N, k].

    Holds at most max(B N, BLOCK_ENTRIES) similarities at once.
    """
    batch, count, _ = descriptors.shape
    rows = max(1, min(count, BLOCK_ENTRIES // (batch * count)))
    found = []
    for start in range(0, count, rows):
        block = descriptors[:, start : start + rows]
        similarity = block @ descriptors.mT  # [B, rows, N]
        similarity.diagonal(start, 1, 2).fill_(float("inf"))
        found.append(similarity.topk(k, dim=-1).indices)
    return torch.cat(found, dim=1)


def buckets(count: int, chunk: int) -> int:
    """Number of hash buckets for `count` patches: even, between 2 and 128, about `chunk` patches in each."""
    return max(2, min(count // chunk, MAX_BUCKETS)) // 2 * 2


def hash_order(descriptors: Tensor, rotation: Tensor, chunk: int) -> Tensor:
    """The patches of each image by their hash code under one rotation [D, >= buckets/2]: [B, N, D] -> int64 [B, N]."""
    projected = descriptors @ rotation[:, : buckets(descriptors.shape[1], chunk) // 2].to(descriptors.dtype)
    return torch.cat([projected, -projected], dim=-1).argmax(-1).argsort(dim=-1, stable=True)


def lsh(descriptors: Tensor, k: int, rotations: Tensor, chunk: int, adjacent: bool) -> Tensor:
    """Approximate k-NN by angular hashing: [B, N, D] -> int64 [B, N, k], itself first, without repeats.

    descriptors: of unit length, float32 or float64.  k: at most chunk.
    rotations: N(0, 1) [rounds, D, >= buckets/2], the first buckets/2 columns are used.  Each round sorts the patches by
    code and cuts the circular order into chunks; the candidates of a patch are those of its own chunk and, where
    `adjacent`, of the previous and the next one.  The last chunk is filled from the start of the circle.
    """
    batch, count, _ = descriptors.shape
    reach = 3 * chunk if adjacent else chunk
    if count <= reach:
        return exact(descriptors, k)
    chunks = -(-count // chunk)
    before = chunk if adjacent else 0
    circle = torch.arange(-before, chunks * chunk + before, device=descriptors.device) % count
    own = torch.arange(chunk, device=descriptors.device)
    indices, scores = [], []
    for rotation in rotations:
        order = hash_order(descriptors, rotation, chunk)[:, circle]  # [B, positions of the circle]
        laid = descriptors.gather(1, order[:, :, None].expand(-1, -1, descriptors.shape[-1]))
        queries = laid[:, before : before + chunks * chunk].unflatten(1, (chunks, chunk))
        candidates = laid.unfold(1, reach, chunk)  # [B, chunks, D, reach], overlapping views
        similarity = queries @ candidates  # [B, chunks, chunk, reach]
        similarity[:, :, own, own + before] = float("inf")
        score, place = similarity.topk(k, dim=-1)
        place = place + (torch.arange(chunks, device=place.device) * chunk)[:, None, None]
        found = order.gather(1, place.flatten(1)).view(batch, chunks * chunk, k)
        back = order[:, before : before + count].argsort(dim=-1)[:, :, None].expand(-1, -1, k)
        indices.append(found.gather(1, back))
        scores.append(score.flatten(1, 2).gather(1, back))
    return merge(torch.cat(indices, -1), torch.cat(scores, -1), k)


def merge(indices: Tensor, scores: Tensor, k: int) -> Tensor:
    """The k best of candidates [..., n] by score, each patch once.  Repeats of a patch have equal scores."""
    indices, order = indices.sort(dim=-1, stable=True)
    scores = scores.gather(-1, order)
    repeated = indices[..., 1:] == indices[..., :-1]
    scores = torch.cat([scores[..., :1], scores[..., 1:].masked_fill(repeated, float("-inf"))], -1)
    return indices.gather(-1, scores.topk(k, dim=-1).indices)


def random_neighbours(count: int, k: int, salt: Tensor) -> Tensor:
    """k distinct patches for each of `count`, itself first, the others uniform: int64 [count, k], 1 <= k <= count.

    salt: int64 [>= k - 1], on the device of the result, which is a pure function of it (integer hashing): no generator.
    """
    patch = torch.arange(count, device=salt.device)
    chosen = patch[:, None]
    for j in range(k - 1):
        draw = (mix(patch + salt[j]) % (count - 1 - j))[:, None]
        # The draw numbers the patches that are still free: step over the chosen ones in ascending order.
        for taken in chosen.sort(dim=-1).values.unbind(-1):
            draw = draw + (draw >= taken[:, None])
        chosen = torch.cat([chosen, draw], dim=-1)
    return chosen


def mix(value: Tensor) -> Tensor:
    """Hash int64 to int64 in [0, 2^31): multiply and xor-shift (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * -4658895280553007687
    value = (value ^ (value >> 27)) * -7723592293110705685
    return (value >> 32) & 0x7FFFFFFF


def recall(found: Tensor, truth: Tensor) -> float:
    """Share of the true neighbours, the patch itself excepted, that were found: [..., k] each, value in [0, 1]."""
    others = truth[..., 1:]
    if others.numel() == 0:
        return 1.0
    return (others[..., :, None] == found[..., None, 1:]).any(-1).double().mean().item()
