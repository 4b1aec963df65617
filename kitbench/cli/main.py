"""The command line, put together: its commands are in run.py, score.py, results.py, scale.py and data.py.

Commands parse, call and print. Slow modules are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from typing import Any

import click

from kitbench import __version__
from kitbench.cli import data, reach, results, run, scale, score
from kitbench.errors import ExitCode, InputError, RunError


class Cli(click.Group):
    """Prints the message of an InputError or RunError instead of a traceback, and exits with its code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.secho(f"kitbench: {error}", fg="red", err=True)
            ctx.exit(ExitCode.BAD_INPUT)
        except RunError as error:
            click.secho(f"kitbench: {error}", fg="red", err=True)
            ctx.exit(ExitCode.RUN_FAILED)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Which attention should restore my images, and does the k-NN one keep its promises?

    Trains and evaluates KiT (k-NN local attention) against global, window and local attention under identical recipes.
    Exit codes: 0 fine, 1 a check failed, 2 usage or bad input, 3 a run failed or was interrupted.
    """


for command in (
    run.run, run.tune, run.status, run.reproduce, score.eval_, score.restore, score.submit, score.explain,
    results.table, results.check, results.report, results.claims, results.curves, results.anchors, results.diff,
    scale.scale, reach.retrieval, reach.pools, data.data, data.list_,
):  # fmt: skip
    cli.add_command(command)
