"""The command line, put together from the commands of this package's other modules.

Commands parse, call and print. Slow modules are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import click

from kitbench import __version__
from kitbench.cli import data, exchange, reach, results, run, scale, score
from kitbench.cli.group import Group
from kitbench.cli.options import CHECK, TRACEBACK, shared_by_torchrun, traceback_option
from kitbench.errors import ExitCode, InputError, Interrupted, RunError, describe_error, is_disk_full, own_place

SHARED = ("run", "tune")
"""Commands whose work processes of torchrun share."""


class Cli(Group):
    """Prints one sentence instead of a traceback, unless --traceback was given, and exits with the code of its kind."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError as error:
            _leave_closed_pipe()
            raise SystemExit(ExitCode.RUN_FAILED) from error
        except OSError as error:  # --help and --version have printed where no space is left
            click.echo(f"kitbench: {describe_error(error)}", err=True)
            raise SystemExit(ExitCode.RUN_FAILED) from error

    def invoke(self, ctx: click.Context) -> Any:
        if os.environ.get("NO_COLOR"):  # no-color.org: click does not know it
            ctx.color = False
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise  # click's own
        except BrokenPipeError:  # `| head`: to click this is 1, the code of a failed check
            _leave_closed_pipe()
            ctx.exit(ctx.meta.get(CHECK, ExitCode.RUN_FAILED))
        except InputError as error:
            _leave(ctx, error, str(error), ExitCode.BAD_INPUT)
        except RunError as error:
            _leave(ctx, error, str(error), ExitCode.RUN_FAILED)
        except KeyboardInterrupt:  # which click gives the exit code of a failed check
            stopped = Interrupted("stopped; what was stored before is kept")
            _leave(ctx, stopped, str(stopped), ExitCode.RUN_FAILED)
        except SystemExit as error:
            if own_place(error) is None:
                raise  # of kitbench
            _leave(ctx, error, describe_error(error), ExitCode.RUN_FAILED)
        except Exception as error:  # noqa: BLE001 - of a method file, or a fault of kitbench
            whose = (
                "" if own_place(error) or is_disk_full(error) else "; kitbench did not expect this: please report it"
            )
            shown = "" if ctx.meta.get(TRACEBACK) else "; --traceback shows where"
            _leave(ctx, error, f"{describe_error(error)}{whose}{shown}", ExitCode.RUN_FAILED)


def _leave_closed_pipe() -> None:
    """Let nothing more be written to standard output, or Python fails when it closes the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(context: click.Context, error: BaseException, sentence: str, code: ExitCode) -> None:
    """Print a sentence, and the traceback where it is wanted and tells more than the sentence."""
    expected = isinstance(error, InputError | RunError)
    if context.meta.get(TRACEBACK) and (cause := error.__cause__ if expected else error) is not None:
        click.echo("".join(traceback.format_exception(cause)), err=True)
    click.secho(f"kitbench: {sentence}", fg="red", err=True)
    context.exit(code)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Which attention should restore my images, and does k-NN attention do what its paper claims?

    Trains and evaluates KiT (k-NN local attention) against global, window and local attention under identical recipes.
    Exit codes: 0 fine, 1 a check failed, 2 usage or bad input, 3 failed or interrupted.
    """
    if shared_by_torchrun() and context.invoked_subcommand not in SHARED:
        raise InputError(
            f"torchrun has started this process, but processes share the work of {' and '.join(SHARED)} alone; give "
            f"`kitbench {context.invoked_subcommand}` without it."
        )


for command in (
    run.run, run.tune, run.status, run.reproduce, score.eval_, score.restore, score.score, score.submit, score.explain,
    results.table, results.check, results.report, results.figures, results.claims, results.curves, results.anchors,
    results.diff, exchange.export, exchange.import_, scale.scale, reach.retrieval, reach.pools, data.data, data.list_,
):  # fmt: skip
    for one in (*command.commands.values(),) if isinstance(command, click.Group) else (command,):
        one.params.append(traceback_option())
    cli.add_command(command)
