"""Commands that read stored runs: table, check, report, claims, curves, anchors, diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kitbench.cli.options import MARKDOWN_OUT, PATHS, PROTOCOL, FiniteRange, RunPath, form_of
from kitbench.cli.output import check_failed, give, one_run
from kitbench.errors import ExitCode, InputError
from kitbench.text import counted

if TYPE_CHECKING:
    from kitbench.store.folder import RunFolder

TABLES = ("terminal", "markdown", "latex", "csv", "json")


@click.command()
@PATHS
@click.option(
    "--format",
    "form",
    type=click.Choice(TABLES),
    help="Form of the table; by default that of the suffix of --out, else terminal.",
)
@click.option("--protocol", help="Only rows of this protocol (id, or id.vN).")
@click.option("--out", type=click.Path(path_type=Path), help="Write to this file instead of the terminal.")
@click.option("--wide", is_flag=True, help="Terminal: all columns, however wide.")
@click.option("--against", metavar="METHOD", help="Instead: how far all others lie above this method, set by set.")
def table(
    paths: tuple[Path, ...], form: Any, protocol: str | None, out: Path | None, wide: bool, against: str | None
) -> None:
    """Print a table of stored runs, given by their folders or by folders that contain such folders."""
    from kitbench.store.folder import find
    from kitbench.verdict.render import render

    form = form_of(form, out, TABLES)
    if against is not None and form not in ("markdown", "terminal"):
        raise InputError(f"--against prints Markdown, not {form}; leave --format out, or end --out in .md.")
    runs = find(paths)
    if against is None:
        text = render(runs, form, protocol, wide)
    else:
        from kitbench.verdict.against import against_sheets
        from kitbench.verdict.sheets import sheet_markdown

        text = "\n".join(map(sheet_markdown, against_sheets(runs, against, protocol)))
    give(text, out)
    for failure in filter(None, (run.failure for run in runs)):
        click.secho(f"failed, so missing or incomplete in the table: {failure}", fg="red", err=True)


@click.command()
@PATHS
@click.option("--against", required=True, type=click.Path(path_type=Path), help="Reference file (JSON).")
@click.option("--update", is_flag=True, help="Replace the reference by these runs, and print what changes.")
@PROTOCOL
@click.option("--time-tolerance", type=FiniteRange(0), default=0.5, show_default=True,
              help="Allowed increase of the time of a step, as a share: 0.5 is 50 %.")  # fmt: skip
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML here, whatever the outcome.")
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
    """Compare stored runs with a reference: PSNR, SSIM, parameters, multiply-adds, memory, time.

    Imported runs are left out. Exit code 1 where a run is worse.
    """
    from kitbench.store.files import write_atomic
    from kitbench.verdict import reference, regression

    if update and (junit or summary):
        raise InputError("--update compares nothing, so there is nothing for --junit and --summary; leave them out.")
    _apart(against, update, junit, summary)
    if update:
        runs = _made_here(paths)
        new = reference.collect(runs, protocol)
        changed = [f"new: {counted(len(new.rows), 'row')}"]
        if against.exists():
            changed = reference.changes(reference.read_reference(against), new)
        click.echo("\n".join(changed or ["nothing changes"]))
        write_atomic(against, (new.model_dump_json(indent=1) + "\n").encode())
        click.echo(f"wrote {against}")
        return
    try:
        runs, stored = _made_here(paths), reference.read_reference(against)
        if protocol is not None and protocol not in (stored.protocol, stored.protocol.rpartition(".v")[0]):
            raise InputError(f"--protocol is {protocol}, but {against} is of {stored.protocol}; leave it out.")
        lines = regression.compare_with_reference(runs, stored, time_tolerance)
    except InputError as error:
        # A CI system shows these files: without them the step fails for no visible reason.
        said = (
            (junit, regression.junit_error(str(error))),
            (summary, f"## kitbench check: not possible\n\n{error}\n".encode()),
        )
        _write(*said)
        raise
    unlike = regression.made_differently(runs, stored)
    _write((junit, regression.junit(lines)), (summary, regression.check_summary(lines, unlike).encode()))
    failed = [line for line in lines if line.failed]
    if failed:
        check_failed()
    for line in failed:
        click.secho(f"FAILED {line}", fg="red")
    click.echo(f"{len(lines) - len(failed)} of {len(lines)} comparisons with {against} passed")
    if unlike:
        click.echo(f"made differently from the reference: {unlike}")
    absent, others = regression.not_compared(runs, stored)
    if absent:
        click.echo(f"not checked, because no run here has it: seed {', '.join(absent)} of {against}")
    if others:
        click.echo(f"not checked, because {against} has no such row: {', '.join(others)}")
    if failed:
        raise SystemExit(ExitCode.CHECK_FAILED)


def _write(*files: tuple[Path | None, bytes]) -> None:
    """Write those files that were asked for."""
    from kitbench.store.files import write_atomic

    for path, data in files:
        if path is not None:
            write_atomic(path, data)


def _apart(against: Path, update: bool, *outputs: Path | None) -> None:
    """Raises InputError where an output cannot be written, or is the reference or the other output."""
    from kitbench.store.files import writable_file

    written = [path for path in outputs if path is not None]
    for path in (*written, *([against] if update else [])):
        writable_file(path)
    if len({path.resolve() for path in (against, *written)}) <= len(written):
        raise InputError("Two of --against, --junit and --summary name one file; give each a file of its own.")


def _made_here(paths: tuple[Path, ...]) -> list[RunFolder]:
    """The runs at these paths that were not imported; says which were. Raises InputError where all were."""
    from kitbench.store.folder import find, without_imported

    runs = find(paths)
    own, imported = without_imported(runs)
    if not own:
        raise InputError(
            f"No run of your own is here, only {imported}; a reference is about your own runs: give the folder that "
            f"they are in."
        )
    if imported:
        click.echo(f"left out {imported}: a reference is about your own runs")
    return own


@click.command()
@PATHS
@PROTOCOL
@click.option("--out", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True,
              help="File to write.")  # fmt: skip
def report(paths: tuple[Path, ...], protocol: str | None, out: Path) -> None:
    """Write one self-contained HTML file: verdict, claims, tables, figures, settings, how to reproduce."""
    from kitbench.store.files import writable_file, write_atomic
    from kitbench.verdict.claims import load
    from kitbench.verdict.page.report import report as report_page

    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: the report is an HTML page; give a file that ends in .html.")
    writable_file(out)
    text = report_page(*load(paths), protocol)
    write_atomic(out, text.encode())
    click.echo(f"wrote {out} ({len(text) / 1e6:.1f} MB)")


@click.command()
@PATHS
@PROTOCOL
@click.option("--format", "form", type=click.Choice(["svg", "pdf"]), default="svg", show_default=True,
              help="Format of the files.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("figures"), show_default=True,
              help="Folder to write them into.")  # fmt: skip
def figures(paths: tuple[Path, ...], protocol: str | None, form: Any, out: Path) -> None:
    """Write the figures of the report into files: costs, differences, learning curves, ladders, sweeps."""
    from kitbench.store.files import writable, write_atomic
    from kitbench.verdict.claims import load
    from kitbench.verdict.page.report import figures as report_figures

    writable(out)
    for name, content in report_figures(*load(paths), protocol, form).items():
        path = out / f"{name}.{form}"
        write_atomic(path, content)
        click.echo(f"wrote {path}")


@click.command()
@PATHS
@PROTOCOL
@click.option("--brief", is_flag=True, help="Print one table: verdicts and figures, without the evidence.")
@MARKDOWN_OUT
def claims(paths: tuple[Path, ...], protocol: str | None, brief: bool, out: Path | None) -> None:
    """Test the six statements of the paper: supported, not supported, depends on the learning rate, or not decided."""
    from kitbench.verdict import claims_text
    from kitbench.verdict.claims import claims as decide
    from kitbench.verdict.claims import load

    found = decide(*load(paths), protocol)
    give(claims_text.overview(found) if brief else claims_text.markdown(found), out)


@click.command()
@PATHS
@PROTOCOL
@MARKDOWN_OUT
def curves(paths: tuple[Path, ...], protocol: str | None, out: Path | None) -> None:
    """Print how fast each method learns: time to target, budget ladders, searches of learning rates."""
    from kitbench.verdict.claims import load
    from kitbench.verdict.curves import curves_markdown

    runs, _, searches = load(paths)
    give(curves_markdown(runs, searches.records, protocol), out)


@click.command()
@PATHS
@MARKDOWN_OUT
def anchors(paths: tuple[Path, ...], out: Path | None) -> None:
    """Compare the scores of published weights, measured here, with the figures that their authors printed."""
    from kitbench.store.folder import find
    from kitbench.verdict.anchors import anchors as compared_with_print
    from kitbench.verdict.anchors import anchors_markdown

    give(anchors_markdown(compared_with_print(find(paths))), out)


@click.command()
@click.argument("a", type=RunPath(), metavar="RUN")
@click.argument("b", type=RunPath(), metavar="RUN2")
def diff(a: Path, b: Path) -> None:
    """Explain how two stored runs differ: data, code, settings, device, versions, flags, and their numbers."""
    from kitbench.store.folder import find
    from kitbench.verdict.differences import differences

    [one], [two] = (one_run(find([path]), str(path)) for path in (a, b))
    found = differences(one, two)
    for difference in found:
        click.echo(str(difference))
    click.echo(f"{len(found)} differences" if found else "no difference: weights, losses and scores are bit-identical")
