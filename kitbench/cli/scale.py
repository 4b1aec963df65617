"""The command that measures cost against resolution: scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kitbench.cli.options import FiniteRange, WholeRange, listed
from kitbench.cli.output import make_console
from kitbench.errors import RunError


@click.command()
@click.option(
    "--method", "--methods", "method", multiple=True, metavar="NAME|FILE", callback=listed,
    default=("conv", "kit", "global:form=materialised", "global:form=sdpa", "window", "local"), show_default=True,
    help="A name or a .py file, with settings NAME:key=value:key=value. Several: repeat, or A,B.",
)  # fmt: skip
@click.option("--sizes", default="64:4096", show_default=True, help="Sides in pixels: A:B (doubling) or A,B,C.")
@click.option("--what", default="infer,train", show_default=True, help="infer, train, or infer,train for both.")
@click.option("--scope", type=click.Choice(["attention", "block", "model"]), default="attention", show_default=True,
              help="What is measured: the attention alone, a block of the network, or the whole network.")  # fmt: skip
@click.option("--dim", type=WholeRange(1), default=32, show_default=True, help="Channels (attention, block).")
@click.option("--heads", type=WholeRange(1), default=1, show_default=True, help="Heads (attention, block).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--memory", help="Memory limit of a point, e.g. 8GiB; by default 80 % of what is free.")
@click.option(
    "--budget", default="8GiB", show_default=True, help="Report the largest image that fits into this memory."
)
@click.option("--patience", type=FiniteRange(0, min_open=True), default=1.5, show_default=True,
              help="Seconds: a point whose single call would take longer is predicted, not measured.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/scale"), show_default=True,
              help="Folder for the measurements and plots.")  # fmt: skip
def scale(method: tuple[str, ...], what: str, **options: Any) -> None:
    """Measure FLOPs, memory and time against resolution as far as this machine allows, and predict them beyond.

    Exit code 3 where a method failed at every size for another reason than memory or time.
    """
    from kitbench.cost.sweep.options import SweepOptions
    from kitbench.cost.sweep.run import run_scale
    from kitbench.verdict.scaling.page import broken, sweep_summary, write_sweep

    console = make_console()
    chosen = SweepOptions(methods=method, what=tuple(what.split(",")), **options)  # type: ignore[arg-type]
    sweep = run_scale(chosen, console)
    write_sweep(sweep, chosen.out)
    click.echo()
    click.echo(sweep_summary(sweep))
    for kind in ("json", "csv", "md", "png", "svg"):
        click.echo(f"wrote {chosen.out / f'scale.{kind}'}")
    if found := broken(sweep):
        raise RunError("; ".join(found))
