"""Ablation: KiT whose patch grid is the same in every block.

Paper: none; a variant of kitbench/attention/kit.py that shows the effect of the shifted grid, a choice of our reading.
Operator: KiT without the shift of every second block.
Cost: that of KiT.
Departures: none.
"""

from __future__ import annotations

from typing import Any

from kitbench.attention import kit


class Attention(kit.Attention):
    """KiT that takes `shift` and ignores it: [B, H, W, C] tokens -> [B, H, W, C].  Settings as in KiT."""

    def __init__(self, dim: int, heads: int, *, shift: bool = False, **settings: Any) -> None:
        super().__init__(dim, heads, **settings)
