"""The attentions of the suite `family` as benchmarks/attention.py measures them: near a number of keys per query."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from kitbench.model import methods

NAMES = ("channel", "overlap", "sparse", "nlsn", "centres", "categories", "graph")
UP_TO = 512  # pixels a side: some hold several maps for each key beside a query


def choose(name: str, wanted: int, pixels: int) -> tuple[dict[str, Any], int | None]:
    """Settings with which a query compares itself with about `wanted` keys on a map of `pixels` a side, and how many.

    wanted: at least 256.  All that a query is multiplied with counts: centres, entries of a dictionary, each round of
    hashing, candidates that are masked later.  None for attention over channels, which has no keys.
    """
    side = math.isqrt(wanted)
    if name == "channel":
        return {}, None
    if name == "overlap":
        edge, window = side // 2 * 2, side // 4 * 2
        return {"window": window, "overlap": (edge - window) / window}, edge**2
    if name == "sparse":  # a sparse block: its dense ones are window attention
        interval = max(1, round(pixels / math.sqrt(wanted)))
        return {"first": "sparse", "interval": interval}, round(pixels / interval) ** 2
    if name == "nlsn":
        rounds, chunk = 4, wanted // 12
        return {"rounds": rounds, "chunk": chunk}, 3 * rounds * chunk
    if name == "centres":
        centres, group = 32, (wanted - 32) // 2
        return {"centres": centres, "group": group}, 2 * group + centres
    if name == "categories":
        return {"entries": 64, "chunk": wanted - 64}, wanted
    grid = side // 2  # a quarter of the candidates; the others around a tile of 8 x 8, and a quarter of all is attended
    halo = (round(math.sqrt(wanted - grid**2)) - 8) // 2
    found = (8 + 2 * halo) ** 2 + grid**2
    return {"tile": 8, "halo": halo, "grid": grid, "k": found // 4}, found


def build(name: str, dim: int, heads: int, wanted: int, pixels: int) -> tuple[nn.Module, int | None]:
    """The attention with about `wanted` keys per query, and how many it has.  Raises InputError where there is none."""
    method = methods.load_method(name)
    settings, keys = choose(name, wanted, pixels)
    return method.build(dim, heads, False, **method.resolve(settings)), keys
