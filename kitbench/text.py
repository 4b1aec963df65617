"""Durations, amounts of memory, and sentences as text."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def byte_size(amount: float) -> str:
    """`350 MiB`, `71.2 GiB`, `8.0 PiB`."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    place = 0
    while amount >= 1024 and place < len(units) - 1:
        amount, place = amount / 1024, place + 1
    return f"{amount:.3g} {units[place]}" if amount < 100 else f"{amount:.0f} {units[place]}"


def shown(value: float, digits: int, sign: str = "") -> str:
    """With so many decimals; what would be printed as zero and is not, with one significant digit. sign: "+" or ""."""
    text = f"{value:{sign}.{digits}f}"
    return text if float(text) or not value else f"{value:{sign}.0e}"


def significant(value: float, digits: int = 3) -> str:
    """With so many significant digits, never as a power of ten: `2.5`, `32,800`."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def counted(number: int, what: str) -> str:
    """`1 image`, `12 images`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def capitalised(text: str) -> str:
    """The text with its first letter in upper case, all others as they are."""
    return text[:1].upper() + text[1:]
