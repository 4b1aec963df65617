"""Commands about how far an attention reaches: retrieval (true neighbours under noise)."""

from __future__ import annotations

from pathlib import Path

import click

from kitbench.cli.options import DEVICE, METHOD_FILE, PROTOCOL
from kitbench.cli.output import give, one_run
from kitbench.errors import InputError


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--run", "folder", type=click.Path(path_type=Path), help="Search in the features of this trained run too."
)
@METHOD_FILE
@PROTOCOL
@DEVICE
@click.option("--sigma", default="0,15,25,50", show_default=True, help="Noise levels, in 8-bit grey levels.")
@click.option("--out", type=click.Path(path_type=Path), help="Write Markdown to this file instead of the terminal.")
def retrieval(
    paths: tuple[Path, ...],
    folder: Path | None,
    method_file: Path | None,
    protocol: str | None,
    device: str,
    sigma: str,
    out: Path | None,
) -> None:
    """Measure how often the true copy of a patch is found under noise, and what PATHS, stored runs, gain from copies.

    The images are the generated sets Repetition and Repetition-none, where every patch's copies are known.
    """
    from kitbench.apply.retrieval import measure_recall, recall_sheets
    from kitbench.apply.trained import load_trained
    from kitbench.store.folder import find
    from kitbench.system.environment import choose_device
    from kitbench.verdict.repetition import gain_sheets
    from kitbench.verdict.sheets import sheet_markdown

    sigmas = _levels(sigma)
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
