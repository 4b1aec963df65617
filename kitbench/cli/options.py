"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

DATA = click.option(
    "--data", type=click.Path(path_type=Path), envvar="KITBENCH_DATA", show_envvar=True,
    help="Folder that contains data sets; by default, photographs that ship with scikit-image.",
)  # fmt: skip
SUITE = click.option("--suite", required=True, help="A suite's name (kitbench list), or the path of a .toml file.")
PRESET = click.option("--preset", help="smoke, quick or full; by default the one that the suite names.")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one setting, e.g. recipe.steps=2000. Repeatable.",
)
OUT = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("results"), show_default=True, help="Folder for the runs."
)
LPIPS = click.option(
    "--lpips-weights",
    metavar="FILE",
    envvar="KITBENCH_LPIPS_WEIGHTS",
    show_envvar=True,
    help="Backbone weights for LPIPS.",
)
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
JOBS = click.option(
    "--jobs", type=click.IntRange(1), envvar="KITBENCH_JOBS", show_envvar=True,
    help="Runs at a time; by default as many as cores and memory, GPUs, or Slurm allow. 1: one after another.",
)  # fmt: skip
PATHS = click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
PROTOCOL = click.option("--protocol", help="Only rows of this protocol (id, or id.vN).")
RUN = click.option("--run", "folder", required=True, type=click.Path(path_type=Path), help="Folder of a trained run.")
METHOD_FILE = click.option(
    "--method", "method_file", type=click.Path(path_type=Path), help="Python file of a method that is not shipped."
)
TRACEBACK = "kitbench.traceback"
"""Key of click's `meta` under which it is kept whether tracebacks are wanted."""


def traceback_option() -> click.Option:
    """The option --traceback, which every command has."""

    def keep(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        context.meta[TRACEBACK] = value

    return click.Option(
        ["--traceback"], is_flag=True, expose_value=False, callback=keep,
        help="Print the Python traceback of an error too.",
    )  # fmt: skip
