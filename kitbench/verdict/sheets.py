"""Tables as texts, which Markdown and the report show alike."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Sheet:
    """A table as texts."""

    caption: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def sheet_markdown(sheet: Sheet) -> str:
    """The table with its caption above and its notes below."""
    align = ["left"] + ["right"] * (len(sheet.header) - 1)
    align[-1:] = ["left"] if sheet.header[-1:] == ("Order",) else align[-1:]
    table = tabulate(sheet.lines, sheet.header, "pipe", disable_numparse=True, colalign=align) if sheet.lines else ""
    return "\n\n".join([f"**{sheet.caption}**", *([table] if table else []), *sheet.notes]) + "\n"
