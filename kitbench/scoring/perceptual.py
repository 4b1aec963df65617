"""Whether LPIPS can be computed here, and whether weights that a user names are those that it needs."""

from __future__ import annotations

from pathlib import Path

from kitbench.errors import InputError
from kitbench.scoring.lpips import available


def lpips_missing(net: str, weights: str | None) -> str | None:
    """Why LPIPS with this backbone cannot be computed, in one sentence; None where it can.

    weights: as `LPIPS` takes them. Raises InputError where they are named, are not a folder, and cannot be used.
    """
    why = available(net, weights)
    if why is not None and weights and not Path(weights).expanduser().is_dir():
        raise InputError(why)
    return why
