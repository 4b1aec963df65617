"""Control: KiT with random patches instead of the nearest ones.

Paper: none; a control for kitbench/attention/kit.py that shows whether retrieval matters.
Operator: KiT, but each patch attends to itself and k - 1 patches drawn uniformly: newly at each training step, fixed
    for evaluation, the same for all images of a batch.
Cost: that of KiT without its retrieval: 4 H W C^2 + 2 k P^2 H W C.
Departures: none.
"""

from __future__ import annotations

from typing import Literal

from kitbench.attention import kit


class Attention(kit.Attention):
    """KiT with retrieval 'random': [B, H, W, C] tokens -> [B, H, W, C].  Settings as in KiT where they apply."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        shift: bool = False,
        patch: int = 8,
        k: int = 4,
        aggregate: Literal["similarity", "mean", "descriptor"] = "similarity",
        tau: float = 0.1,
        support: Literal["patch", "aligned"] = "patch",
        size: int = 3,
    ) -> None:
        super().__init__(
            dim,
            heads,
            shift=shift,
            patch=patch,
            k=k,
            retrieval="random",
            aggregate=aggregate,
            tau=tau,
            support=support,
            size=size,
        )
