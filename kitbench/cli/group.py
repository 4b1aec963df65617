"""A group of commands whose help shows the whole first sentence of each command."""

from __future__ import annotations

import click

LONGEST = 200
"""Characters of a summary."""


class Group(click.Group):
    """Wraps summaries over several lines; click cuts them off at the end of the line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(LONGEST)) for name, command in sorted(self.commands.items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
