"""The claims as text: one table, and a page with the evidence."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from kitbench.text import capitalised
from kitbench.verdict.claims import Claim


def markdown(found: Sequence[Claim]) -> str:
    """The claims as a page: a table of all, then the evidence of each."""
    lines = ["# The claims, one by one", "", overview(found)]
    for claim in found:
        lines += [f"## {claim.number}. {claim.statement}", "", f"**{claim.verdict}**", ""]
        for part in claim.parts:
            lines.append(f"- {part.question} **{capitalised(part.words)}.**")
            lines += [f"  - {capitalised(fact)}." for fact in part.facts]
            if part.runs:
                lines.append(f"  - Runs: {', '.join(part.runs)}.")
            if part.command:
                lines.append(f"  - Next step: `{part.command}`")
        lines.append("")
    return "\n".join(lines)


def overview(found: Sequence[Claim]) -> str:
    """A table of the statements, their questions, the verdicts, and what was measured."""
    lines = []
    for claim in found:
        lines.append((f"**{claim.number}. {claim.statement}**", f"**{claim.verdict}**", ""))
        lines += [(part.question, part.short, part.measured) for part in claim.parts]
    header = ("Statement, and questions that decide it", "Verdict", "Measured")
    return tabulate(lines, header, "pipe", disable_numparse=True) + "\n"
