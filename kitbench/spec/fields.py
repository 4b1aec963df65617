"""The base class of all validated records, types of common fields, and the digest of a value."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Mode = Literal["colour", "gray"]
CHANNELS: dict[Mode, int] = {"colour": 3, "gray": 1}
Setting = bool | int | float | str


class Frozen(BaseModel):
    """A model that is validated when made and immutable; an undeclared key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Grey = Annotated[float, Field(ge=0, le=255)]
Pixels = Annotated[float, Field(gt=0, le=64)]
Degrees = Annotated[float, Field(ge=-90, le=90)]
Share = Annotated[float, Field(ge=0, le=1)]


def digest(value: object) -> str:
    """SHA-256 (hex) of the canonical JSON of a value made of dicts, lists, strings, numbers and None."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
