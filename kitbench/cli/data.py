"""Commands about data sets (data ...), and the list of suites, methods, data sets, recipes and protocols (list)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import click

from kitbench.cli.group import Group
from kitbench.cli.options import DATA
from kitbench.cli.output import check_failed, make_console, show_grid
from kitbench.errors import ExitCode, InputError, Interrupted
from kitbench.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress


SETS_AT_A_TIME = 4
"""Sets that are fetched at the same time."""


@click.group(cls=Group)
def data() -> None:
    """Data sets: list them, see where they are looked for, check their files, download those that may be downloaded."""


SETS = click.argument("names", nargs=-1, metavar="[SET]...")


@data.command(name="list")
@DATA
def data_list(data: Path | None) -> None:
    """List all known sets: tasks, number of images, whether the set is present, and its terms."""
    from rich.table import Table

    from kitbench.data.cards import cards
    from kitbench.data.locate import check_root, described, locate

    check_root(data)
    grid = Table("name", "tests", "images", "present", "about", "terms", box=None, pad_edge=False)
    for name, card in cards().items():
        folder = locate(card, data)
        found = described(card, folder).name if folder else ""
        present = {"": "no", name: "yes"}.get(found, f"no, but {found}")
        grid.add_row(name, ", ".join(card.tasks), card.contents.partition(" ")[0], present, card.title, card.licence)
    show_grid(grid)


@data.command()
@SETS
@DATA
def where(names: tuple[str, ...], data: Path | None) -> None:
    """Show where each set is looked for, where it was found, and where to get it."""
    from kitbench.data.locate import check_root, described, locate

    check_root(data)
    for card in _cards(names):
        folder = locate(card, data)
        places = [str((data or Path("DIR")) / f) for f in ([card.own] if card.own else card.folders)]
        if card.package or card.generated:
            places = [f"package {card.package}" if card.package else "nowhere: kitbench generates it"]
        found = str(folder) if folder else "not found"
        if folder and (other := described(card, folder)).name != card.name:
            found = f"not found; {folder} holds {other.name}"
        click.echo(f"{card.name}: {found}")
        click.echo(f"  looked for  {', '.join(places)}")
        click.echo(f"  as          {card.tree}")
        if card.home:
            click.echo(f"  from        {card.home} {card.ask}".rstrip())


@data.command(name="check")
@SETS
@DATA
def data_check(names: tuple[str, ...], data: Path | None) -> None:
    """List every missing, extra or altered file of the named sets, or of all that are present. Exit code 1 if any."""
    from kitbench.data.audit import audit
    from kitbench.data.locate import check_root, locate, named_root, present
    from kitbench.data.own import files_beside, left_out

    check_root(data)
    if data is not None and not names:
        found = [locate(card, data) for card in _cards(names)]
        if not any(folder is not None and folder.is_relative_to(data) for folder in found):
            raise InputError(
                f"No data set is in {named_root(data)}; `kitbench data where` names the folders that are looked for."
            )
    failed = False
    for card in _cards(names):
        folder = locate(card, data) if names else present(card, data)
        if folder is None:
            if names:
                place = data or "any data folder: give one with --data"
                check_failed()
                click.secho(f"{card.name}: not in {place} (looked for {', '.join(card.folders)})", fg="red")
                failed = True
            continue
        problems = audit(card, folder)
        failed |= bool(problems)
        proof = f"checksums of {card.checksum.removesuffix('s')}s" if card.sha256 else "number and size only"
        if problems:
            check_failed()
            faults = counted(len(problems), "fault")
            click.secho(f"{card.name}: {faults} in {folder}", fg="red")
            click.echo("\n".join(f"  {problem}" for problem in problems))
        elif card.own:
            click.echo(f"{card.name}: {card.contents}, all readable")
        else:
            click.echo(f"{card.name}: {card.contents} in {folder}, as its card states (compared: {proof})")
        if card.own and (others := files_beside(card)):
            click.echo(f"  {left_out(others)}")
    if failed:
        raise SystemExit(ExitCode.CHECK_FAILED)


@data.command(name="fetch")
@click.argument("names", nargs=-1, required=True, metavar="SET...")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), envvar="KITBENCH_DATA", show_envvar=True,
    help="Folder in which to store the sets.",
)  # fmt: skip
def data_fetch(names: tuple[str, ...], data: Path) -> None:
    """Download sets from the addresses on their cards, continuing where an earlier download stopped, and check them."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from kitbench.data.fetch import fetch

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    cards = _cards(names)
    for card in cards:
        click.echo(f"{card.name}: {card.title}. Terms: {card.licence}.")
    pool, stopped = ThreadPoolExecutor(SETS_AT_A_TIME), Event()
    try:
        with Progress(*columns, TimeRemainingColumn(), console=make_console()) as progress:
            # Two sets may have files of one name.
            asked = [pool.submit(fetch, card, data, _bars(progress, stopped)) for card in cards]
            wait(asked)
    except KeyboardInterrupt as pressed:
        stopped.set()
        raise Interrupted("stopped; the same command continues the downloads") from pressed
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    failed = []
    for card, one in zip(cards, asked, strict=True):
        error = one.exception()
        if error is not None:
            failed.append(error)
            continue
        folder, fetched = one.result()
        click.echo(f"{card.name}: {'now' if fetched else 'already'} in {folder}")
    for error in failed[1:]:
        click.secho(f"kitbench: {error}", fg="red", err=True)
    if failed:
        raise failed[0]


def _bars(progress: Progress, stopped: Event) -> Callable[[str, int, int | None], None]:
    """A bar for each file of a set that is being fetched; once `stopped` is set, its thread ends at the next piece."""
    bars: dict[str, Any] = {}

    def report(file: str, done: int, total: int | None) -> None:
        if stopped.is_set():
            raise Interrupted("stopped")
        if file not in bars:
            bars[file] = progress.add_task(file, total=total)
        progress.update(bars[file], completed=done, total=total)

    return report


def _cards(names: tuple[str, ...]) -> list[Any]:
    from kitbench.data.cards import cards
    from kitbench.data.own import card_of_set

    return [card_of_set(name) for name in names] if names else list(cards().values())


def _presence(card: Any, present: bool) -> str:
    if card.generated:
        return "generated"
    return "with scikit-image" if card.package and present else "yes" if present else "no"


@click.command(name="list")
@DATA
def list_(data: Path | None) -> None:
    """Show suites, methods, data sets (present or not), recipes and protocols."""
    from rich.markup import escape
    from rich.table import Table

    from kitbench.data.cards import cards
    from kitbench.data.locate import check_root, present
    from kitbench.model import methods
    from kitbench.spec import loading, shipped

    check_root(data)

    def show(title: str, columns: list[str], lines: list[list[str]]) -> None:
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False, expand=False)
        for column in columns:
            grid.add_column(column, overflow="fold")
        for line in lines:
            grid.add_row(*line)
        show_grid(grid)
        click.echo()

    names = shipped.suite_names()
    raws = {name: loading.read_toml(name, "suites", Path()) for name in names}
    show("Suites", ["name", "presets", "about"], [[n, ", ".join(r["presets"]), r["title"]] for n, r in raws.items()])
    show(
        "Methods",
        ["name", "kind", "about"],
        [[n, kind, text.splitlines()[0]] for n, (kind, text) in methods.method_cards().items()],
    )
    where = {name: present(card, data) for name, card in cards().items()}
    show(
        f"Data sets (data folder: {escape(str(data or 'none; give one with --data or KITBENCH_DATA'))})",
        ["name", "images", "present", "about"],
        [[n, c.contents.partition(" ")[0], _presence(c, where[n] is not None), c.title] for n, c in cards().items()],
    )
    show(
        "Recipes",
        ["name", "time", "hardware", "about"],
        [[r.name, r.card.time, r.card.hardware, r.card.summary] for r in loading.recipes()],
    )
    show("Protocols", ["name", "about"], [[p.stamp, p.summary] for p in loading.protocols()])
