"""Families of protocols that differ in the size of their tiles alone: the pools that an attention chooses from."""

from __future__ import annotations

import re
import tomllib

from kitbench.spec.shipped import builtin
from kitbench.spec.suite import Protocol

WHOLE = 0
"""A protocol's `tile` for whole images."""


def pool_overlap(tile: int) -> int:
    """Least overlap of tiles in pixels: a quarter of their side, at most 32."""
    return min(32, tile // 4)


def pool_protocol(protocol: Protocol, tile: int) -> Protocol:
    """The member with tiles of this side (0: whole images) of a protocol's family; all other keys are the protocol's.

    So is the version, but a shipped protocol of the member's name and content is that member. Raises pydantic's
    ValidationError for a tile below 32.
    """
    base = re.sub(r"-tile\d*$", "", protocol.id)
    keys = protocol.model_dump(exclude={"id", "version", "summary", "tile", "overlap", "placement"})
    member = Protocol(
        id=f"{base}-tile{tile}" if tile else base, version=protocol.version, tile=tile, overlap=pool_overlap(tile),
        placement="even" if tile else "edge", **keys,
        summary=f"As {base}, restored in tiles of {tile} px at equal distances." if tile else f"As {base}.",
    )  # fmt: skip
    text = builtin("protocols").get(member.id)
    shipped = Protocol.model_validate(tomllib.loads(text)) if text is not None else None
    if shipped is not None and shipped == member.model_copy(
        update={"summary": shipped.summary, "version": shipped.version}
    ):
        return shipped
    return member


def pool_family(protocol: Protocol) -> str | None:
    """The stamp of the family's protocol for whole images; None for a protocol that is no member of its family."""
    member = pool_protocol(protocol, protocol.tile)
    return pool_protocol(protocol, WHOLE).stamp if member.stamp == protocol.stamp else None


def size_text(tile: int) -> str:
    """`64 px`, or `whole`."""
    return f"{tile} px" if tile else "whole"
