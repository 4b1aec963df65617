"""Commands about how far an attention reaches: retrieval (true neighbours under noise) and pools (sizes of tiles)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from kitbench.cli.options import (
    DATA,
    DEVICE,
    LPIPS,
    MARKDOWN_OUT,
    METHOD_FILE,
    PATHS,
    PROTOCOL,
    RunPath,
    listed,
    one_spelling,
)
from kitbench.cli.output import give, make_console, one_run
from kitbench.errors import InputError, RunError
from kitbench.text import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

SMALLEST = 32
"""Pixels of a tile's side."""
ALL_SIZES = "64,128,256,512,whole"


@click.command()
@click.argument("paths", nargs=-1, type=RunPath(), metavar="[RUNS]...")
@click.option("--run", "folder", type=RunPath(), metavar="RUN", help="Search in the features of this trained run too.")
@METHOD_FILE
@PROTOCOL
@DEVICE
@click.option("--sigma", default="0,15,25,50", show_default=True, help="Noise levels, in 8-bit grey levels.")
@MARKDOWN_OUT
def retrieval(
    paths: tuple[Path, ...],
    folder: Path | None,
    method_file: Path | None,
    protocol: str | None,
    device: str,
    sigma: str,
    out: Path | None,
) -> None:
    """Measure how often the true copy of a patch is found under noise, and what stored RUNS gain from copies.

    The images are the generated sets Repetition and Repetition-none, where every patch's copies are known.
    """
    from kitbench.apply.retrieval import measure_recall, recall_sheets
    from kitbench.apply.trained import load_trained
    from kitbench.store.files import writable_file
    from kitbench.store.folder import find
    from kitbench.system.environment import choose_device
    from kitbench.verdict.repetition import gain_sheets
    from kitbench.verdict.sheets import sheet_markdown

    sigmas = _levels(sigma)
    if protocol is not None and not paths:
        raise InputError("--protocol chooses among the scores of stored RUNS; name some, or leave it out.")
    if out is not None:
        writable_file(out)
    gained = gain_sheets(find(paths), protocol) if paths else []
    chosen = choose_device(device)
    model = None
    if folder is not None:
        [run_folder] = one_run(find([folder]))
        model, _ = load_trained(run_folder, method_file, chosen)
    sheets = [*recall_sheets(measure_recall(sigmas, model, chosen)), *gained]
    give("\n".join(map(sheet_markdown, sheets)), out)


def _levels(text: str) -> list[float]:
    """Noise levels as they are typed: 0,15,25."""
    try:
        levels = [float(word) for word in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0 <= level <= 255 for level in levels):
        raise InputError(f"--sigma takes noise levels from 0 to 255, like 0,15,25; found {text!r}.")
    return list(dict.fromkeys(levels))


@click.command()
@PATHS
@click.option(
    "--tile", "tiles", show_default=ALL_SIZES,
    help="Sides of the tiles in pixels. If given, only these are scored and printed; otherwise the "
         "default ones are scored, and all that are stored are printed.",
)  # fmt: skip
@click.option(
    "--test-set", "data_sets", multiple=True, metavar="SET", callback=listed,
    help="Only this set. Several: repeat, or A,B.",
)  # fmt: skip
@click.option("--stored", is_flag=True, help="Score nothing, print what is stored.")
@DATA
@METHOD_FILE
@DEVICE
@LPIPS
@MARKDOWN_OUT
def pools(
    paths: tuple[Path, ...],
    tiles: str | None,
    data_sets: tuple[str, ...],
    stored: bool,
    data: Path | None,
    method_file: Path | None,
    device: str,
    lpips_weights: str | None,
    out: Path | None,
) -> None:
    """Score trained runs again in tiles of several sizes, and print PSNR against size: does a wider pool help?

    Nothing is trained. Each size is a protocol of its own; the evaluations are stored in the folders of the runs, and
    those that are stored already are not made again.
    """
    from rich.progress import Progress

    from kitbench.store.files import writable_file
    from kitbench.store.folder import find
    from kitbench.verdict.pools import pool_sheets
    from kitbench.verdict.sheets import sheet_markdown

    sizes, data_sets = _sizes(ALL_SIZES if tiles is None else tiles), one_spelling(data_sets)
    if out is not None:
        writable_file(out)
    runs = find(paths)
    if not stored:
        from kitbench.apply.pools import PoolScoring
        from kitbench.system.environment import choose_device, how_to_go_on
        from kitbench.system.interrupt import interruptible

        scoring = PoolScoring(sizes, data_sets, data, choose_device(device), method_file, lpips_weights)
        trained = [run for run in runs if run.run.seed is not None]
        todo = [run for run in trained if scoring.missing(run)]  # refuses before anything is written
        try:
            if todo:
                with interruptible(how_to_go_on) as stop, Progress(console=make_console()) as progress:
                    stop.idle = False
                    for run in todo:
                        made = scoring.score(run, stop, _bar(progress, run.path.name))
                        progress.console.print(
                            f"{run.path}: {counted(made, 'evaluation')}", highlight=False, soft_wrap=True
                        )
        except RunError as error:
            raise RunError(f"{error}. {how_to_go_on()}") from error
    give("\n".join(map(sheet_markdown, pool_sheets(runs, data_sets, () if tiles is None else sizes))), out)


def _bar(progress: Progress, title: str) -> Callable[[int, int], None]:
    """A bar, and what moves it."""
    bar = progress.add_task(title, total=None)
    return lambda done, total: progress.update(bar, completed=done, total=total)


def _sizes(text: str) -> list[int]:
    """Sides of tiles as they are typed, `64,128,whole`: pixels, 0 for whole images; two or more, to be compared."""
    words = [word.strip() for word in text.split(",")]
    if not all(word == "whole" or (word.isdecimal() and int(word) >= SMALLEST) for word in words):
        raise InputError(
            f"--tile takes sides in pixels, at least {SMALLEST}, or whole, like 64,128,whole; found {text!r}."
        )
    sizes = list(dict.fromkeys(0 if word == "whole" else int(word) for word in words))
    if len(sizes) < 2:
        raise InputError(f"--tile takes two sides or more, which are compared, like 64,whole; found {text!r}.")
    return sizes
