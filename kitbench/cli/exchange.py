"""Commands that give runs to others, and take theirs: export, import."""

from __future__ import annotations

from pathlib import Path

import click

from kitbench.cli.options import OUT, PATHS
from kitbench.errors import InputError
from kitbench.text import counted


@click.command()
@PATHS
@click.option(
    "--out", required=True, type=click.Path(path_type=Path),
    help=".zip: runs, for `kitbench import`; .csv or .parquet: a row per run, test set, condition and protocol.",
)  # fmt: skip
@click.option("--by", help="Who made the runs, as tables of others will say; needed for a .zip.")
def export(paths: tuple[Path, ...], out: Path, by: str | None) -> None:
    """Write stored runs into one file: an archive that others can import, or a results file."""
    from pydantic import TypeAdapter, ValidationError

    from kitbench.apply.exchange import export_runs
    from kitbench.store.files import writable_file
    from kitbench.store.folder import find
    from kitbench.store.records import By
    from kitbench.store.results_file import results, write_results

    runs = find(paths)
    if out.suffix.lower() != ".zip":
        if out.suffix.lower() not in (".csv", ".parquet"):
            raise InputError(f"--out {out} must end in .zip (runs), .csv or .parquet (a results file).")
        if by is not None:
            raise InputError("--by says who made the runs of an archive (.zip); leave it out for a results file.")
        writable_file(out)
        found = results(runs)
        write_results(found, out)
        click.echo(f"wrote {out} ({counted(len(found), 'row')})")
        return
    try:
        named = TypeAdapter(By).validate_python(by)
    except ValidationError as error:
        fault = "is missing" if by is None else f"{by!r} names nobody"
        raise InputError(
            f"--by {fault}: say in one line of at most 80 characters, without | < > `, who made the runs."
        ) from error
    done = export_runs(runs, out, named)
    for name, why in done.left_out.items():
        click.echo(f"left out {name}: {why}")
    click.echo(f"wrote {out} ({counted(len(done.done), 'run')})")


@click.command(name="import")
@click.argument("archive", type=click.Path(path_type=Path))
@OUT
def import_(archive: Path, out: Path) -> None:
    """Add the runs of an archive by `kitbench export` to a folder of runs; tables mark them with who made them.

    Runs of another protocol, recipe or source are refused; runs that are already here stay as they are.
    """
    from kitbench.apply.exchange import import_runs

    done = import_runs(archive, out)
    for name, why in done.left_out.items():
        click.echo(f"left out {name}: {why}")
    for name in done.done:
        click.echo(f"wrote {out / name}")
    click.echo(f"{counted(len(done.done), 'run')} imported")
    if done.note:
        click.echo(done.note)
