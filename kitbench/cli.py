"""The command line: parse, call, print. Heavy rooms are imported inside the commands, so --help answers at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kitbench import __version__
from kitbench.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.progress import Progress

FAILED = 3


class Cli(click.Group):
    """Turns what kitbench refuses into one sentence and exit code 2, and what failed into exit code 3."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.secho(f"kitbench: {error}", fg="red", err=True)
            ctx.exit(2)
        except RunError as error:
            click.secho(f"kitbench: {error}", fg="red", err=True)
            ctx.exit(FAILED)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Which attention should restore my images, and does the k-NN one keep its promises?

    Trains and evaluates KiT (k-NN local attention) against global, window and local attention under identical recipes.
    Exit codes: 0 fine, 1 a check failed, 2 usage or bad input, 3 a run failed or was interrupted.
    """


DATA = click.option(
    "--data", type=click.Path(path_type=Path), envvar="KITBENCH_DATA", show_envvar=True,
    help="Folder that holds data sets; without it, photographs that ship with scikit-image.",
)  # fmt: skip
SUITE = click.option("--suite", required=True, help="A suite's name (kitbench list), or the path of a .toml file.")
PRESET = click.option("--preset", help="smoke, quick or full; the suite's own default without it.")
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


@cli.command()
@SUITE
@PRESET
@click.option(
    "--method", "method", multiple=True, help="Run only this method: a name, or the path of a .py file. Repeatable."
)
@SET
@click.option("--seeds", help="Seeds, e.g. 0,1,2.")
@DATA
@OUT
@DEVICE
@click.option(
    "--workers", type=click.IntRange(0, 64), default=0, show_default=True, help="Processes that prepare batches."
)
@LPIPS
@click.option(
    "--micro-batch", type=click.IntRange(1), metavar="N",
    help="Most crops at a time on a device; their gradients add up to the batch's. Moves rounding only.",
)  # fmt: skip
@click.option("--track", multiple=True, metavar="NAME", help="tensorboard, wandb or mlflow too. Repeatable.")
@click.option(
    "--launcher", type=click.Choice(["local", "slurm"]),
    help="Spread the runs over worker processes here, or submit them to Slurm. One after another without it.",
)  # fmt: skip
@click.option(
    "--jobs", type=click.IntRange(1), help="Runs at a time; by default one a GPU, one a core, or as Slurm allows."
)
@click.option("--gpus", help="local: which GPUs, e.g. 0,1. slurm: how many a run.")
@click.option("--cpus", type=click.IntRange(1), help="Cores a run.")
@click.option("--partition", help="Of Slurm.")
@click.option(
    "--time", "minutes", type=click.IntRange(1), metavar="MINUTES", help="Slurm's time limit; a run goes on behind it."
)
@click.option("--dry-run", is_flag=True, help="Print what a launcher would run, and run nothing.")
@click.option("--only", hidden=True, metavar="CELL", help="One cell, e.g. colour/kit/0: what a worker runs.")
@click.pass_context
def run(
    context: click.Context,
    suite: str,
    preset: str | None,
    method: tuple[str, ...],
    overrides: tuple[str, ...],
    seeds: str | None,
    data: Path | None,
    out: Path,
    device: str,
    workers: int,
    lpips_weights: str | None,
    micro_batch: int | None,
    track: tuple[str, ...],
    launcher: str | None,
    only: str | None,
    **where: Any,
) -> None:
    """Train and compare the methods of a suite; what is stored already is not run again."""
    from kitbench.suite import load

    if not launcher:
        for option in context.command.params:
            if where.get(str(option.name)):
                raise InputError(f"{option.opts[0]} is of --launcher; give --launcher local or slurm too.")
    resolved = load(suite, preset, overrides, method, _seeds(seeds))
    from kitbench import launch
    from kitbench.job import Options
    from kitbench.processes import started_by_torchrun
    from kitbench.run import how_to_go_on
    from kitbench.run import run as run_suite

    if only:
        resolved = launch.restrict(resolved, only)
    if launcher and started_by_torchrun():
        raise InputError("--launcher starts processes of its own; give the same command without torchrun.")
    options = Options(out, data, device, workers, lpips_weights, micro_batch, track)
    console = _console()
    try:
        if launcher == "slurm":
            jobs = launch.slurm(resolved, options, launch.Spread(**where), _again(context), console)
            if jobs:
                click.echo(f"submitted {len(jobs)} jobs: {', '.join(jobs)}")
                click.echo(f"Look after them with: {shlex.join(['python', '-m', 'kitbench', 'status', str(out)])}")
            return
        if launcher == "local":
            complete, failed = launch.local(resolved, options, launch.Spread(**where), _again(context), console)
        else:
            complete, failed = run_suite(resolved, options, console)
    except RunError as error:
        raise RunError(f"{error}. {how_to_go_on()}") from error
    if complete and not only:  # the table of a worker would show one run
        _show(complete, resolved.stamps, out, console)
    if failed:
        raise RunError(f"{len(failed)} of the suite's runs failed: " + "; ".join(failed))


def _show(complete: list[Any], stamps: list[str], out: Path, console: Console) -> None:
    """The table of each protocol that these runs were scored under, and how to get it again."""
    from kitbench.verdict.table import render

    scored = {evaluation.stamp for folder in complete for evaluation in folder.evaluations()}
    shown = [stamp for stamp in stamps if stamp in scored]
    for stamp in shown:
        click.echo()
        click.echo(render(complete, "terminal", stamp), color=console.is_terminal or None)
    for folder in complete:
        click.echo(f"wrote {folder.path}")
    for stamp in shown:
        again = shlex.join(["python", "-m", "kitbench", "table", str(out), "--protocol", stamp])
        click.echo(f"The table again, from the stored runs: {again}")


def _again(context: click.Context) -> list[str]:
    """The arguments of `run` as one would type them for a worker: without those of the launcher."""
    launchers = {"launcher", "jobs", "gpus", "cpus", "partition", "minutes", "dry_run", "only"}
    words: list[str] = []
    for option in context.command.params:
        value = context.params.get(str(option.name))
        if option.name not in launchers and value is not None:
            for each in value if isinstance(value, tuple) else (value,):
                words += [option.opts[0], str(each)]
    return words


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise InputError(f"--seeds takes whole numbers like 0,1,2; found {text!r}.") from error


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["markdown", "latex", "csv", "json", "terminal"]),
    default="terminal",
    show_default=True,
)
@click.option("--protocol", help="Only rows of this protocol (id, or id.vN).")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file instead of the terminal.")
def table(paths: tuple[Path, ...], form: Any, protocol: str | None, out: Path | None) -> None:
    """Build a table from stored runs: folders of runs, or folders that hold such folders."""
    from kitbench.store import find
    from kitbench.verdict.table import render

    runs = find(paths)
    _give(render(runs, form, protocol), out)
    for failure in filter(None, (run.failure for run in runs)):
        click.secho(f"failed, so not or not wholly in the table: {failure}", fg="red", err=True)


@cli.command()
@click.option(
    "--methods", default="kit,global:form=materialised,global:form=sdpa,window,local", show_default=True,
    help="Names or .py files, with settings: NAME:key=value:key=value.",
)  # fmt: skip
@click.option("--sizes", default="64:4096", show_default=True, help="Sides in pixels: A:B (doubling) or A,B,C.")
@click.option("--what", default="infer,train", show_default=True, help="infer, train or both.")
@click.option("--scope", type=click.Choice(["attention", "block", "model"]), default="attention", show_default=True)
@click.option("--dim", type=click.IntRange(1), default=32, show_default=True, help="Channels (attention, block).")
@click.option("--heads", type=click.IntRange(1), default=1, show_default=True, help="Heads (attention, block).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--memory", help="Most that a point may take, e.g. 8GiB; 80 % of what is free without it.")
@click.option("--budget", default="8GiB", show_default=True, help="Report the largest image that fits in it.")
@click.option("--patience", type=click.FloatRange(0, min_open=True), default=1.5, show_default=True,
              help="Seconds: points of which one call would take longer are predicted.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/scale"), show_default=True)
def scale(methods: str, what: str, **options: Any) -> None:
    """FLOPs, memory and time against resolution, measured as far as this machine goes, predicted beyond.

    Exit code 3 where a method failed at every size (not for want of memory or time); the same command tries it again.
    """
    from kitbench.cost.report import broken, summary
    from kitbench.cost.scale import Options, run_scale

    console = _console()
    chosen = Options(methods=tuple(methods.split(",")), what=tuple(what.split(",")), **options)  # type: ignore[arg-type]
    sweep = run_scale(chosen, console)
    click.echo()
    click.echo(summary(sweep))
    for kind in ("json", "csv", "md", "png", "svg"):
        click.echo(f"wrote {chosen.out / f'scale.{kind}'}")
    if found := broken(sweep):
        raise RunError("; ".join(found))


PATHS = click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))


@cli.command()
@PATHS
def status(paths: tuple[Path, ...]) -> None:
    """Show which runs are queued, running, done and failed, with the time that is left, from their folders alone."""
    from rich.table import Table

    from kitbench.status import render, summary, survey

    lines = survey(paths)
    grid = Table(box=None, pad_edge=False)
    for column in ("state", "run", "done", "left", ""):
        grid.add_column(column, overflow="fold")
    for line in render(lines):
        grid.add_row(*line)
    _console().print(grid, highlight=False, markup=False)
    click.echo(summary(lines))


PROTOCOL = click.option("--protocol", help="Only rows of this protocol (id, or id.vN).")


@cli.command()
@PATHS
@click.option("--against", required=True, type=click.Path(path_type=Path), help="Reference file (JSON).")
@click.option("--update", is_flag=True, help="Write the reference anew from these runs, and print what it changes.")
@PROTOCOL
@click.option("--time-tolerance", type=click.FloatRange(0), default=0.5, show_default=True,
              help="How much slower a step may be, as a share, in units of the calibration run.")  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML here.")
@click.option("--summary", type=click.Path(path_type=Path), help="Write a Markdown summary here.")
def check(
    paths: tuple[Path, ...],
    against: Path,
    update: bool,
    protocol: str | None,
    time_tolerance: float,
    junit: Path | None,
    summary: Path | None,
) -> None:
    """Compare stored runs with a reference: PSNR, SSIM, FLOPs, parameters, memory, time. Exit code 1 on any failure."""
    from kitbench.store import find, writable, write_atomic
    from kitbench.verdict import check as checks

    runs = find(paths)
    if update:
        new = checks.collect(runs, protocol)
        writable(against.parent)
        try:
            told = checks.changes(checks.read(against), new) if against.exists() else [f"new: {len(new.rows)} rows"]
        except InputError as error:
            told = [f"replaces what could not be compared: {error}"]
        click.echo("\n".join(told or ["nothing changes"]))
        write_atomic(against, (new.model_dump_json(indent=1) + "\n").encode())
        click.echo(f"wrote {against}")
        return
    lines = checks.compare(runs, checks.read(against), time_tolerance)
    for path, data in ((junit, checks.junit(lines)), (summary, checks.summary(lines).encode())):
        if path is not None:
            writable(path.parent)
            write_atomic(path, data)
    failed = [line for line in lines if line.failed]
    for line in failed:
        click.secho(f"FAILED {line}", fg="red")
    click.echo(f"{len(lines) - len(failed)} of {len(lines)} comparisons with {against} hold")
    if failed:
        raise SystemExit(1)


@cli.command()
@PATHS
@PROTOCOL
@click.option("--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True)
def report(paths: tuple[Path, ...], protocol: str | None, out: Path) -> None:
    """Write one self-contained HTML file: verdict, claims, tables, pictures, settings, how to reproduce."""
    from kitbench.store import writable, write_atomic
    from kitbench.verdict import report as page
    from kitbench.verdict.claims import load

    text = page.report(*load(paths), protocol)
    writable(out.parent)
    write_atomic(out, text.encode())
    click.echo(f"wrote {out} ({len(text) / 1e6:.1f} MB)")


@cli.command()
@PATHS
@PROTOCOL
@click.option("--out", type=click.Path(path_type=Path), help="Write Markdown to this file instead of the terminal.")
def claims(paths: tuple[Path, ...], protocol: str | None, out: Path | None) -> None:
    """Put the paper's six statements to the test: supported, not supported, or not decided by these runs."""
    from kitbench.verdict import claims as judge

    runs, sweeps = judge.load(paths)
    text = judge.markdown(judge.claims(runs, sweeps, protocol))
    _give(text, out)


RUN = click.option("--run", "folder", required=True, type=click.Path(path_type=Path), help="Folder of a trained run.")
METHOD_FILE = click.option(
    "--method", "method_file", type=click.Path(path_type=Path), help="Python file of a method that is not shipped."
)


@cli.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@RUN
@METHOD_FILE
@DEVICE
@click.option("--tile", type=click.IntRange(0), help="Side of the tiles; 0 for the whole picture. Chosen by size.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results; beside the pictures without it.")
@click.option("--overwrite", is_flag=True, help="Replace results that are there already.")
def restore(
    images: tuple[Path, ...],
    folder: Path,
    method_file: Path | None,
    device: str,
    tile: int | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Apply a trained run to your own pictures: PNG, JPEG, TIFF, 8 or 16 bits, with alpha, of any size."""
    from kitbench import restore as job
    from kitbench.environment import choose_device
    from kitbench.store import find, writable

    if tile and tile < 32:
        raise InputError(f"--tile {tile} is too small; give 0 for the whole picture, or at least 32.")
    for place in {out} if out is not None else {path.parent for path in images}:
        writable(place)
    [run_folder] = _one_run(find([folder]))
    for path in job.run(list(images), run_folder, method_file, choose_device(device), tile, out, overwrite):
        click.echo(f"wrote {path}")


def _one_run(found: list[Any]) -> list[Any]:
    if len(found) > 1:
        raise InputError(f"--run names a folder of {len(found)} runs; give one, for example {found[0].path}.")
    return found


@cli.command()
@click.argument("name", metavar="SET")
@RUN
@METHOD_FILE
@DATA
@DEVICE
@click.option("--out", required=True, type=click.Path(path_type=Path), help="SIDD-benchmark: a .csv; DND: a .zip.")
def submit(name: str, folder: Path, method_file: Path | None, data: Path | None, device: str, out: Path) -> None:
    """Restore a set whose server keeps the targets (SIDD-benchmark, DND), and write the file that the server takes."""
    from rich.progress import Progress

    from kitbench import submit as job
    from kitbench.data.cards import card, locate
    from kitbench.environment import choose_device
    from kitbench.restore import load
    from kitbench.store import find, writable

    chosen = card(name)
    place = locate(chosen, data)
    if place is None:
        raise InputError(f"Data set {name} is not in {data} (looked for {', '.join(chosen.folders)}). {chosen.ask}")
    writable(out.parent)
    [run_folder] = _one_run(find([folder]))
    device_ = choose_device(device)
    model, run_ = load(run_folder, method_file, device_)
    if run_.mode != "colour":
        raise InputError(f"{run_folder.path} was trained on gray images, {name} is in colour; give another run.")
    with Progress(console=_console()) as progress:
        bar = progress.add_task(name, total=None)
        job.submit(
            chosen, place, job.denoiser(model, device_), out,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    click.echo(f"wrote {out}; {chosen.ask}")


@cli.command(name="eval")
@click.option(
    "--method", required=True, metavar="NAME|FILE", help="A network (class Network), or a training-free method."
)
@click.option(
    "--weights", type=click.Path(path_type=Path), help="The network's weights: .safetensors, or of torch.save."
)
@click.option("--key", help="Which state dict in that file, where it holds several.")
@SUITE
@PRESET
@SET
@DATA
@OUT
@DEVICE
@LPIPS
def eval_(
    method: str,
    weights: Path | None,
    key: str | None,
    suite: str,
    preset: str | None,
    overrides: tuple[str, ...],
    data: Path | None,
    out: Path,
    device: str,
    lpips_weights: str | None,
) -> None:
    """Score a network with given weights on a suite's test sets, under its protocol, into rows like all others."""
    from kitbench import pretrained
    from kitbench.job import Options
    from kitbench.run import how_to_go_on

    given = None if weights is None else pretrained.Weights(weights, key)
    options = Options(out, data, device, 0, lpips_weights)
    console = _console()
    try:
        resolved, complete = pretrained.run(suite, preset, overrides, method, given, options, console)
    except RunError as error:
        raise RunError(f"{error}. {how_to_go_on()}") from error
    _show(complete, resolved.stamps, out, console)


@cli.command()
@PATHS
@click.option("--out", type=click.Path(path_type=Path), help="Write Markdown to this file instead of the terminal.")
def anchors(paths: tuple[Path, ...], out: Path | None) -> None:
    """Set the scores of published weights beside what their authors printed."""
    from kitbench.store import find
    from kitbench.verdict import anchors as beside

    _give(beside.markdown(beside.anchors(find(paths))), out)


@cli.command()
@click.argument("image", type=click.Path(path_type=Path))
@RUN
@METHOD_FILE
@DEVICE
@click.option("--at", required=True, metavar="X,Y", help="Pixel whose patch is explained: column, row, from 0.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("explain.png"), show_default=True)
def explain(image: Path, folder: Path, method_file: Path | None, device: str, at: str, out: Path) -> None:
    """Draw on IMAGE which patches the patch at a pixel attends, for every k-NN attention of a trained run."""
    import re

    from kitbench.environment import choose_device
    from kitbench.store import find, writable
    from kitbench.verdict import explain as job

    place = re.fullmatch(r"(\d+),(\d+)", at)
    if not place:
        raise InputError(f"--at takes X,Y in pixels, for example 120,80; found {at!r}.")
    writable(out.parent)
    [run_folder] = _one_run(find([folder]))
    found = job.explain(image, run_folder, method_file, int(place[1]), int(place[2]), choose_device(device), out)
    for choice in found:
        click.echo(f"{choice.name}: {', '.join(f'{left},{top}' for left, top, _ in choice.squares)}")
    click.echo(f"wrote {out}")


@cli.command()
@PATHS
@METHOD_FILE
@DATA
@DEVICE
@click.option("--workers", type=click.IntRange(0, 64), default=0, help="Processes that prepare batches.")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the new runs in this folder, and go on there.")
def reproduce(
    paths: tuple[Path, ...], method_file: Path | None, data: Path | None, device: str, workers: int, out: Path | None
) -> None:
    """Make stored runs again, each from its own record alone: bit-identical, within the seed spread, or different.

    Exit code 1 where one is different.
    """
    from kitbench import reproduce as job
    from kitbench.job import Options
    from kitbench.store import find

    runs, console, different = find(paths), _console(), []
    for folder in runs:
        siblings = [other for other in find([folder.path.absolute().parent]) if other.path.name != folder.path.name]
        with job.folder_for(out) as place:
            options = Options(place, data, device, workers, None)
            outcome = job.reproduce(folder, siblings, options, method_file, console)
        colour = {"bit-identical": "green", "different": "red"}.get(outcome.verdict)
        click.secho(f"{folder.path.name}: {outcome.verdict}: {outcome.why}", fg=colour)
        for note in outcome.notes:
            click.echo(f"  {note}")
        if outcome.verdict != "bit-identical":
            click.echo(f"  the first thing that differs: {outcome.first or 'nothing that is recorded'}")
        if outcome.verdict == "different":
            different.append(folder.path.name)
    if different:
        click.echo(f"{len(different)} of {len(runs)} runs are different: {', '.join(different)}")
        raise SystemExit(1)


@cli.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
def diff(a: Path, b: Path) -> None:
    """Explain how two stored runs differ: data, code, settings, device, versions, flags, and their numbers."""
    from kitbench.store import find
    from kitbench.verdict.diff import differences

    [one], [two] = (_one_run(find([path])) for path in (a, b))
    found = differences(one, two)
    for difference in found:
        click.echo(str(difference))
    click.echo(f"{len(found)} differences" if found else "no difference: weights, losses and scores are bit-identical")


@cli.group()
def data() -> None:
    """Data sets: list them, see where they are looked for, check their files, fetch what may be fetched."""


SETS = click.argument("names", nargs=-1, metavar="[SET]...")


@data.command(name="list")
@DATA
def data_list(data: Path | None) -> None:
    """Every set that has a card: task, size, whether it is there, and its terms."""
    from rich.table import Table

    from kitbench.data.cards import cards, check_root, described, locate

    check_root(data)
    grid = Table("name", "tests", "images", "present", "about", "terms", box=None, pad_edge=False)
    for name, card in cards().items():
        folder = locate(card, data)
        found = described(card, folder).name if folder else ""
        present = {"": "no", name: "yes"}.get(found, f"{found} is")
        grid.add_row(name, ", ".join(card.tasks), str(card.count), present, card.title, card.licence)
    _console().print(grid)


@data.command()
@SETS
@DATA
def where(names: tuple[str, ...], data: Path | None) -> None:
    """Where each set is looked for, where it was found, and where people get it."""
    from kitbench.data.cards import described, locate

    for card in _cards(names):
        folder = locate(card, data)
        places = [f"package {card.package}"] if card.package else [str((data or Path("DIR")) / f) for f in card.folders]
        found = str(folder) if folder else "not found"
        if folder and (other := described(card, folder)).name != card.name:
            found = f"not found; {folder} holds {other.name}"
        click.echo(f"{card.name}: {found}")
        click.echo(f"  looked for  {', '.join(places)}")
        click.echo(f"  as          {card.tree}")
        click.echo(f"  from        {card.home} {card.ask}".rstrip())


@data.command(name="check")
@SETS
@DATA
def data_check(names: tuple[str, ...], data: Path | None) -> None:
    """Name each missing, extra or altered file of the sets that are there, or of those named. Exit code 1 if any."""
    from kitbench.data.audit import audit
    from kitbench.data.cards import check_root, locate, present

    check_root(data)
    failed = False
    for card in _cards(names):
        folder = locate(card, data) if names else present(card, data)
        if folder is None:
            if names:
                place = data or "a data folder, as none was given with --data"
                click.secho(f"{card.name}: not in {place} (looked for {', '.join(card.folders)})", fg="red")
                failed = True
            continue
        problems = audit(card, folder)
        failed |= bool(problems)
        what = "pairs" if card.pairs else "images"
        proof = f"checksums of their {card.checksum.removesuffix('s')}s" if card.sha256 else "number and size alone"
        if problems:
            click.secho(f"{card.name}: {len(problems)} faults in {folder}", fg="red")
            click.echo("\n".join(f"  {problem}" for problem in problems))
        else:
            click.echo(f"{card.name}: {card.count} {what} in {folder}, as its card says, by {proof}")
    if failed:
        raise SystemExit(1)


@data.command(name="fetch")
@click.argument("names", nargs=-1, required=True, metavar="SET...")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), envvar="KITBENCH_DATA", show_envvar=True,
    help="Folder to put the sets in.",
)  # fmt: skip
def data_fetch(names: tuple[str, ...], data: Path) -> None:
    """Download sets from the addresses on their cards: goes on where it stopped, checks, unpacks safely."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from kitbench.data.fetch import fetch

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    for card in _cards(names):
        click.echo(f"{card.name}: {card.title}. Terms: {card.licence}.")
        with Progress(*columns, TimeRemainingColumn(), console=_console()) as progress:
            folder, fetched = fetch(card, data, _bars(progress))
        click.echo(f"{card.name}: {'now' if fetched else 'already'} in {folder}")


def _bars(progress: Progress) -> Callable[[str, int, int | None], None]:
    """A bar for each file that is being fetched."""
    bars: dict[str, Any] = {}

    def report(file: str, done: int, total: int | None) -> None:
        if file not in bars:
            bars[file] = progress.add_task(file, total=total)
        progress.update(bars[file], completed=done, total=total)

    return report


def _cards(names: tuple[str, ...]) -> list[Any]:
    from kitbench.data.cards import card, cards

    return [card(name) for name in names] if names else list(cards().values())


@cli.command(name="list")
@DATA
def list_(data: Path | None) -> None:
    """Show suites, methods, data sets (present or not), recipes and protocols."""
    from rich.table import Table

    from kitbench import methods, suite
    from kitbench.data.cards import cards, present

    console = _console()

    def show(title: str, columns: list[str], lines: list[list[str]]) -> None:
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=False)
        for column in columns:
            grid.add_column(column, overflow="fold")
        for line in lines:
            grid.add_row(*line)
        console.print(grid)
        console.print()

    names = suite.suite_names()
    raws = {name: suite.read_toml(name, "suites", Path()) for name in names}
    show("Suites", ["name", "presets", "about"], [[n, ", ".join(r["presets"]), r["title"]] for n, r in raws.items()])
    show(
        "Methods",
        ["name", "kind", "about"],
        [[n, kind, text.splitlines()[0]] for n, (kind, text) in methods.cards().items()],
    )
    where = {name: present(card, data) for name, card in cards().items()}
    show(
        f"Data sets (data folder: {data or 'none; give one with --data or KITBENCH_DATA'})",
        ["name", "images", "present", "about"],
        [
            [n, str(c.count), "with scikit-image" if c.package and where[n] else "yes" if where[n] else "no", c.title]
            for n, c in cards().items()
        ],
    )
    show(
        "Recipes",
        ["name", "time", "hardware", "about"],
        [[r.name, r.card.time, r.card.hardware, r.card.summary] for r in suite.recipes()],
    )
    show("Protocols", ["name", "about"], [[p.stamp, p.summary] for p in suite.protocols()])


def _give(text: str, out: Path | None) -> None:
    """Print a text, or write it to a file, whole or not at all."""
    from kitbench.store import writable, write_atomic

    if out is None:
        click.echo(text, nl=False)
    else:
        writable(out.parent)
        write_atomic(out, text.encode())
        click.echo(f"wrote {out}")


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)
