"""Commands that make runs: run, status, reproduce."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kitbench.cli.options import (
    DATA,
    DEVICE,
    JOBS,
    LPIPS,
    METHOD_FILE,
    METHODS,
    OUT,
    PATHS,
    PRESET,
    SET,
    SUITE,
    TEST_SET,
    TRAIN_SET,
    WholeRange,
    overrides_of,
    shared_by_torchrun,
)
from kitbench.cli.output import check_failed, make_console, show_grid, show_tables, show_tracebacks, wants_traceback
from kitbench.errors import ExitCode, InputError, RunError
from kitbench.text import counted

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@SUITE
@PRESET
@METHODS
@SET
@TRAIN_SET
@TEST_SET
@click.option("--seeds", help="Seeds, e.g. 0,1,2; by default those of the preset (0 in quick and smoke).")
@DATA
@OUT
@DEVICE
@click.option("--workers", type=WholeRange(0, 64), default=0, show_default=True, help="Processes that prepare batches.")
@LPIPS
@click.option(
    "--micro-batch", type=WholeRange(1), metavar="N",
    help="Most crops at a time on a device; their gradients add up to the batch's. Changes rounding only, "
         "except with method centres.",
)  # fmt: skip
@click.option("--track", multiple=True, metavar="NAME", help="tensorboard, wandb or mlflow too. Repeatable.")
@JOBS
@click.option("--gpus", help="Which GPUs to use, e.g. 0,1; with --launcher slurm, how many a run gets.")
@click.option(
    "--tuned", is_flag=True, help="Train each method at its own best learning rate, found by `kitbench tune`."
)
@click.option("--dry-run", is_flag=True, help="Print what would be run, and run nothing.")
@click.option("--launcher", type=click.Choice(["slurm"]), help="Submit the runs to Slurm instead of running them here.")
@click.option("--cpus", type=WholeRange(1), help="Slurm: CPU cores of a run.")
@click.option("--partition", help="Slurm: the partition that the runs are submitted to.")
@click.option(
    "--time", "minutes", type=WholeRange(1), metavar="MINUTES",
    help="Slurm: time limit of a job; at the limit it is queued again and continues from its checkpoint.",
)  # fmt: skip
@click.option("--only", hidden=True, metavar="CELL", help="One cell, e.g. colour/kit/0: what a Slurm job runs.")
@click.pass_context
def run(
    context: click.Context,
    /,
    suite: str,
    preset: str | None,
    method: tuple[str, ...],
    overrides: tuple[str, ...],
    train_set: tuple[str, ...],
    test_set: tuple[str, ...],
    seeds: str | None,
    out: Path,
    tuned: bool,
    dry_run: bool,
    launcher: str | None,
    only: str | None,
    cpus: int | None,
    partition: str | None,
    minutes: int | None,
    **given: Any,
) -> None:
    """Train and compare the methods of a suite; what is stored already is not run again."""
    for name, value in (("--cpus", cpus), ("--partition", partition), ("--time", minutes)):
        if value is not None and not launcher:
            raise InputError(f"{name} needs --launcher slurm.")
    resolved = _suite(suite, preset, overrides_of(overrides, train_set, test_set), method, _seeds(seeds))
    from kitbench.launch import commands, slurm
    from kitbench.runs import plan, queue
    from kitbench.runs.prepare import Options
    from kitbench.runs.tune import best_of_search
    from kitbench.system.processes import leads, started_by_torchrun

    if launcher and started_by_torchrun():
        raise InputError("--launcher slurm starts processes of its own; give the same command without torchrun.")
    _check_spread(given["jobs"], given["gpus"])
    options, console, again = Options(out, **given), _console(), _again(context)
    if tuned:
        if any(override.partition("=")[0].strip() == "recipe.lr" for override in overrides):
            raise InputError(
                "--tuned trains each method at its own best learning rate, and recipe.lr of --set would not be used; "
                "leave one of the two out."
            )
        options = replace(options, rates=best_of_search(resolved, out, options.data))
    if only:
        resolved = plan.restrict(resolved, only)
    if launcher == "slurm":
        cluster = commands.ClusterOptions(options.jobs, options.gpus, cpus, partition, minutes)
        _submitted(slurm.slurm(resolved, options, cluster, again, dry_run, console), out)
    elif dry_run:
        labels = [cell.label for cell in queue.planned_cells(resolved, options, console)]
        console.print(f"{counted(len(labels), 'cell')} to be run", highlight=False)
        commands.show(labels, again, console)
    else:
        # The table of a Slurm job would show one run.
        _run_here(resolved, options, console, shown=not only and leads())


def _check_spread(jobs: int | None, gpus: str | None) -> None:
    """Raises InputError where processes of torchrun share each run, and several runs at a time are asked for too."""
    for name, value, silent in (("--jobs", jobs, (None, 1)), ("--gpus", gpus, (None,))):
        if shared_by_torchrun() and value not in silent:
            raise InputError(
                f"{name} {value} spreads runs over processes of their own, but torchrun has started some that share "
                f"each run; leave out {name}, or give the command without torchrun."
            )


def _console() -> Console:
    """A console on which, of the processes that torchrun has started, the first alone prints."""
    from kitbench.system.processes import leads

    console = make_console()
    console.quiet = not leads()
    return console


def _suite(
    name: str, preset: str | None, overrides: tuple[str, ...], methods: tuple[str, ...], seeds: Sequence[int] = ()
) -> Any:
    """The suite with all choices applied; any shipped method may be among them."""
    from kitbench.model.methods import method_kinds
    from kitbench.spec.loading import load_suite

    return load_suite(name, preset, overrides, methods, seeds, method_kinds() if methods else {})


def _run_here(suite: Any, options: Any, console: Any, shown: bool) -> None:
    """Run the suite, print its table, and raise RunError where a cell failed."""
    from kitbench.runs import queue
    from kitbench.system.environment import how_to_go_on

    try:
        complete, failed = queue.run_suite(suite, options, console)
    except RunError as error:
        raise RunError(f"{error}. {how_to_go_on()}") from error
    if complete and shown:
        show_tables(complete, suite.stamps, options.out, console)
    if failed:
        if wants_traceback():
            show_tracebacks(options.out, failed)
        raise RunError(f"{len(failed)} of the suite's runs failed: " + "; ".join(failed))


def _submitted(jobs: list[str], out: Path) -> None:
    if jobs:
        click.echo(f"submitted {len(jobs)} jobs: {', '.join(jobs)}")
        click.echo(f"Look after them with: {shlex.join(['python', '-m', 'kitbench', 'status', str(out)])}")


@click.command()
@SUITE
@PRESET
@METHODS
@SET
@TRAIN_SET
@TEST_SET
@DATA
@OUT
@DEVICE
@click.option("--workers", type=WholeRange(0, 64), default=0, show_default=True, help="Processes that prepare batches.")
@click.option(
    "--rates",
    metavar="LR,LR,...",
    help="Learning rates to try; by default five, each twice the one before, around the recipe's.",
)
@click.option(
    "--seed",
    type=WholeRange(0, 2**31 - 1),
    default=1000,
    show_default=True,
    help="Seed of all trials; no compared run may have it.",
)
@JOBS
@click.option("--gpus", help="Which GPUs to use, e.g. 0,1.")
@click.option("--dry-run", is_flag=True, help="Print which trials would be run, and run nothing.")
def tune(
    suite: str,
    preset: str | None,
    method: tuple[str, ...],
    overrides: tuple[str, ...],
    train_set: tuple[str, ...],
    test_set: tuple[str, ...],
    data: Path | None,
    out: Path,
    device: str,
    workers: int,
    rates: str | None,
    seed: int,
    jobs: int | None,
    gpus: str | None,
    dry_run: bool,
) -> None:
    """Search the best learning rate of every method, alike for all, on validation images.

    What came out is kept in OUT; `run --tuned` then trains each method at its own best rate.
    """
    from kitbench.runs import tune as job
    from kitbench.runs.prepare import Options
    from kitbench.system.environment import how_to_go_on
    from kitbench.system.processes import leads
    from kitbench.verdict.tuning import tuning_table

    resolved = _suite(suite, preset, overrides_of(overrides, train_set, test_set), method)
    search = job.Search(job.rate_grid(resolved.recipe.lr, 5) if rates is None else _rates(rates), seed)
    _check_spread(jobs, gpus)
    options = Options(out, data, device, workers, None, jobs=jobs, gpus=gpus)
    if dry_run:
        trials = job.planned_trials(resolved, options, search, _console())
        count = f"{counted(len(trials), 'trial')} to be run" if trials else "all trials are stored"
        click.echo(f"{count}; more are run where a method's best rate lies at the grid's edge")
        for rate, label in trials:
            click.echo(f"learning rate {rate:<10g}{label}")
        return
    try:
        found = job.tune(resolved, options, search, _console())
    except job.NothingEnded:
        raise  # the same command would end alike
    except RunError as error:
        raise RunError(f"{error}. {how_to_go_on()}") from error
    for record in found if leads() else ():
        click.echo()
        click.echo(tuning_table(record))
        click.echo(f"wrote {out / job.record_name(resolved, record.mode)}")


def _rates(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if len(found) < 2 or not all(0 < rate <= 1 for rate in found):
        raise InputError(f"--rates takes two or more learning rates in (0, 1], like 1e-3,2e-3,4e-3; found {text!r}.")
    return found


def _again(context: click.Context) -> list[str]:
    """The arguments of `run` as one would type them for a single cell: without those that spread many."""
    spreading = {"launcher", "jobs", "gpus", "cpus", "partition", "minutes", "dry_run", "only"}
    words: list[str] = []
    for option in context.command.params:
        value = context.params.get(str(option.name))
        if option.name in spreading or value is None or value is False:
            continue
        for each in value if isinstance(value, tuple) else (value,):
            words += [option.opts[0]] if each is True else [option.opts[0], str(each)]
    return words


def _seeds(text: str | None) -> list[int]:
    try:
        return [] if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds takes whole numbers like 0,1,2; found {text!r}.") from error


@click.command()
@PATHS
def status(paths: tuple[Path, ...]) -> None:
    """Show which runs are queued, running, done and failed, with the time that is left, from their folders alone."""
    from rich.table import Table

    from kitbench.launch.status import status_rows, summary, survey

    lines = survey(paths)
    grid = Table(box=None, pad_edge=False)
    for column in ("state", "run", "done", "left", ""):
        grid.add_column(column, overflow="fold")
    for line in status_rows(lines):
        grid.add_row(*line)
    show_grid(grid, markup=False)
    click.echo(summary(lines))


@click.command()
@PATHS
@METHOD_FILE
@DATA
@DEVICE
@click.option("--workers", type=WholeRange(0, 64), default=0, help="Processes that prepare batches.")
@JOBS
@click.option("--out", type=click.Path(path_type=Path), help="Keep the new runs in this folder, and go on there.")
def reproduce(
    paths: tuple[Path, ...],
    method_file: Path | None,
    data: Path | None,
    device: str,
    workers: int,
    jobs: int | None,
    out: Path | None,
) -> None:
    """Make stored runs again, each from its own record alone: bit-identical, within the seed spread, or different.

    Exit code 1 where one is different.
    """
    from kitbench.apply import reproduce as job
    from kitbench.runs.prepare import Options
    from kitbench.store.folder import find
    from kitbench.system.environment import how_to_go_on

    runs, console, different = find(paths), make_console(), []
    for group in job.groups(runs):
        with job.folder_for(out) as place:
            options = Options(place, data, device, workers, None, jobs=jobs)
            try:
                outcomes = job.reproduce(group, options, method_file, console)
            except RunError as error:
                lost = "The new runs are deleted; with --out FOLDER they are kept, and the same command goes on there"
                raise RunError(f"{error}. {lost if out is None else how_to_go_on()}") from error
        for folder, outcome in zip(group, outcomes, strict=True):
            if outcome.verdict == "different":
                check_failed()
                different.append(folder.path.name)
            colour = {"bit-identical": "green", "different": "red"}.get(outcome.verdict)
            click.secho(f"{folder.path.name}: {outcome.verdict}: {outcome.why}", fg=colour)
            for note in outcome.notes:
                click.echo(f"  {note}")
            if outcome.verdict != "bit-identical":
                click.echo(f"  the first thing that differs: {outcome.first or 'nothing that is recorded'}")
    if different:
        click.echo(f"{len(different)} of {len(runs)} runs are different: {', '.join(different)}")
        raise SystemExit(ExitCode.CHECK_FAILED)
