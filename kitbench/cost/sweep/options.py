"""The options of `kitbench scale`, and parsing of their texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.spec.fields import Setting
from kitbench.store.sweeps import Scope, What

DEFAULT_METHODS = ("conv", "kit", "global:form=materialised", "global:form=sdpa", "window", "local")
DEFAULT_SIZES = "64:4096"


@dataclass(frozen=True)
class SweepOptions:
    """The options of `kitbench scale`."""

    methods: tuple[str, ...] = DEFAULT_METHODS
    """NAME, FILE.py, or either with settings: NAME:key=value:key=value."""
    sizes: str = DEFAULT_SIZES
    """Sides in pixels: A:B (doubling) or a list A,B,C."""
    what: tuple[What, ...] = ("infer", "train")
    scope: Scope = "attention"
    dim: int = 32
    heads: int = 1
    device: str = "auto"
    out: Path = Path("results/scale")
    memory: str | None = None
    """Memory limit of a point, e.g. 8GiB; by default 80 % of what is free."""
    budget: str = "8GiB"
    """Memory for which the largest image is reported."""
    patience: float = 1.5
    """Seconds: a point whose single call would take longer is predicted, not measured."""
    rounds: int = 7
    """Undisturbed rounds of timing."""
    seconds: float = 8.0
    """For the rounds of one size and one of `what`."""


def parse_method(text: str) -> tuple[str, dict[str, Setting]]:
    """`kit:k=8:retrieval=exact` -> ("kit", {"k": 8, "retrieval": "exact"}). Raises InputError."""
    name, *rest = text.split(":")
    settings: dict[str, Setting] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"Method {text!r}: {item!r} is not a setting; write NAME:key=value:key=value.")
        settings[key] = _value(value)
    return name, methods.load_method(name).resolve(settings) and settings


def _value(text: str) -> Setting:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_sizes(text: str) -> list[int]:
    """`64:512` -> [64, 128, 256, 512]; `64,96` -> [64, 96]. Raises InputError."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        sizes = list(_doubling(int(match[1]), int(match[2])))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        sizes = sorted({int(part) for part in text.split(",")})
    else:
        raise InputError(f"--sizes {text!r} is not valid; give A:B, which doubles from A to B, or a list A,B,C.")
    if not sizes or sizes[0] < 8 or sizes[-1] > 1 << 16:
        raise InputError(f"--sizes {text!r} must be between 8 and 65536, the smaller end first.")
    return sizes


def _doubling(first: int, last: int) -> Iterator[int]:
    while 0 < first <= last:
        yield first
        first *= 2


def parse_bytes(text: str) -> int:
    """`8GiB`, `512 MiB`, `24GB`, `24G`, `1000000B` -> bytes. Raises InputError, for a number without a unit too."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]?)(iB|B)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0 or not (match[2] or match[3]):
        raise InputError(f"{text!r} is not an amount of memory with its unit; write for example 8GiB or 512MiB.")
    base = 1000 if (match[3] or "iB").lower() == "b" and match[2] else 1024
    unit: int = base ** " KMGTP".index(match[2].upper() or " ")
    return round(float(match[1]) * unit)
