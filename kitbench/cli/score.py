"""Commands that apply networks or score pictures: restore, submit, eval, score, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kitbench.cli.options import (
    DATA,
    DEVICE,
    LPIPS,
    METHOD_FILE,
    OUT,
    PRESET,
    RUN,
    SET,
    TEST_SET,
    RunPath,
    WholeRange,
    form_of,
    one_spelling,
    overrides_of,
)
from kitbench.cli.output import give, make_console, one_run, show_tables
from kitbench.errors import InputError, RunError
from kitbench.text import counted

SCORES = ("terminal", "markdown", "csv")
"""Most file names that a message lists."""


@click.command()
@click.argument(
    "images", metavar="PICTURE|FOLDER|WILDCARD...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@RUN
@METHOD_FILE
@DEVICE
@click.option(
    "--tile",
    type=WholeRange(0),
    help="Side of the tiles in pixels, 0 for the whole picture; by default chosen by its size.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the results; by default that of each picture.")
@click.option("--overwrite", is_flag=True, help="Overwrite existing results.")
@click.option("--side-by-side", "beside", is_flag=True, help="Also write each picture beside its result, in one file.")
def restore(
    images: tuple[Path, ...],
    folder: Path,
    method_file: Path | None,
    device: str,
    tile: int | None,
    out: Path | None,
    overwrite: bool,
    beside: bool,
) -> None:
    """Apply a trained run to your own pictures: PNG, JPEG, TIFF, WebP or BMP, 8 or 16 bits, with alpha, of any size.

    Give files, folders (their subfolders are left out) or quoted wildcards like 'photos/*.jpg'. A picture that cannot
    be restored is named at the end, with exit code 3; all others are written.
    """
    from kitbench.apply.folders import Restoration, pictures_named, restore_all, targets_of
    from kitbench.apply.trained import load_trained
    from kitbench.data.own import left_out as not_pictures
    from kitbench.store.files import writable
    from kitbench.store.folder import find
    from kitbench.system.environment import choose_device

    if tile and tile < 32:
        raise InputError(f"--tile {tile} is too small; give 0 for the whole picture, or at least 32.")
    found, left_out, others = pictures_named(images)
    for place in {out} if out is not None else {path.parent for path in found}:
        writable(place)
    [run_folder] = one_run(find([folder]))
    targets = targets_of(found, out, overwrite, beside)
    chosen = choose_device(device)
    model, _ = load_trained(run_folder, method_file, chosen)
    console = make_console()
    if left_out:
        console.print(f"without {counted(left_out, 'picture')} written by an earlier call", highlight=False)
    if others:
        console.print(not_pictures(others), markup=False, highlight=False, soft_wrap=True)
    restore_all(Restoration(model, chosen, tile, beside), found, targets, console)


@click.command()
@click.argument("name", metavar="SET")
@RUN
@METHOD_FILE
@DATA
@DEVICE
@click.option("--out", required=True, type=click.Path(path_type=Path), help="SIDD-benchmark: a .csv; DND: a .zip.")
def submit(name: str, folder: Path, method_file: Path | None, data: Path | None, device: str, out: Path) -> None:
    """Restore a set whose targets are not public (SIDD-benchmark, DND), and write the file to submit to its server."""
    from rich.progress import Progress

    from kitbench.apply.submit import denoiser, submission
    from kitbench.apply.trained import load_trained
    from kitbench.data.cards import card
    from kitbench.data.locate import locate
    from kitbench.store.files import writable_file
    from kitbench.store.folder import find
    from kitbench.system.environment import choose_device

    chosen = card(name)
    place = locate(chosen, data)
    if place is None:
        where = data or "any data folder: give one with --data"
        raise InputError(f"Data set {name} is not in {where} (looked for {', '.join(chosen.folders)}). {chosen.ask}")
    writable_file(out)
    write = submission(chosen, place, out)
    [run_folder] = one_run(find([folder]))
    device_ = choose_device(device)
    model, run_ = load_trained(run_folder, method_file, device_)
    if run_.mode != "colour":
        raise InputError(f"{run_folder.path} was trained on gray images, {name} is in colour; give another run.")
    with Progress(console=make_console()) as progress:
        bar = progress.add_task(name, total=None)
        write(denoiser(model, device_), lambda done, total: progress.update(bar, completed=done, total=total))
    click.echo(f"wrote {out}; {chosen.ask}")


@click.command(name="eval")
@click.option("--method", metavar="NAME|FILE", help="A network (class Network), or a training-free method.")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="The network's weights: .safetensors, or of torch.save."
)
@click.option("--key", help="Name of the state dict in that file, where it contains several.")
@click.option("--suite", help="A suite's name (kitbench list), or the path of a .toml file.")
@PRESET
@SET
@click.option(
    "--run", "stored", type=RunPath(), metavar="RUN",
    help="Score this stored run: its folder, or the first digits of its key.",
)  # fmt: skip
@TEST_SET
@click.option(
    "--protocol", metavar="NAME|FILE", help="How to score; by default as the suite says, or as the run was scored."
)
@DATA
@OUT
@DEVICE
@LPIPS
def eval_(
    method: str | None,
    weights: Path | None,
    key: str | None,
    suite: str | None,
    preset: str | None,
    overrides: tuple[str, ...],
    stored: Path | None,
    test_set: tuple[str, ...],
    protocol: str | None,
    data: Path | None,
    out: Path,
    device: str,
    lpips_weights: str | None,
) -> None:
    """Score without training: given weights on a suite's test sets, or a stored run on another test set.

    The scores of a stored run are kept in its folder. For --run, --method names the Python file of a method that is
    not shipped.
    """
    from kitbench.runs.prepare import Options

    options = Options(out, data, device, 0, lpips_weights)
    if stored is not None:
        given: dict[str, object] = {"weights": weights, "key": key, "suite": suite, "preset": preset, "set": overrides}
        given["out"] = click.get_current_context().get_parameter_source("out") is ParameterSource.COMMANDLINE
        if stray := next((name for name, value in given.items() if value), None):
            raise InputError(f"--{stray} does not go with --run: the run is scored as it was trained, in its folder.")
        if not test_set:
            raise InputError("--run needs --test-set: the name of a data set, or the path of a folder of pictures.")
        _eval_run(stored, test_set, protocol, method, options)
        return
    if method is None or suite is None:
        raise InputError("eval needs --method and --suite, or --run and --test-set.")
    if protocol is not None and protocol.endswith(".toml"):
        protocol = str(Path(protocol).absolute())  # a relative one would be looked for beside the suite's file
    chosen = (*overrides_of(overrides, (), test_set), *([f"protocol={protocol}"] if protocol else []))
    _eval_weights(suite, preset, (method, weights, key, chosen), options)


def _eval_weights(suite: str, preset: str | None, given: tuple[Any, ...], options: Any) -> None:
    from kitbench.runs import given_weights
    from kitbench.system.environment import how_to_go_on

    method, weights, key, overrides = given
    file = None if weights is None else given_weights.Weights(weights, key)
    console = make_console()
    try:
        resolved, complete = given_weights.score_given_weights(
            suite, preset, given_weights.Given(method, file, overrides), options, console
        )
    except RunError as error:
        raise RunError(f"{error}. {how_to_go_on()}") from error
    show_tables(complete, resolved.stamps, options.out, console)


def _eval_run(
    stored: Path, test_set: tuple[str, ...], protocol: str | None, method_file: str | None, options: Any
) -> None:
    from kitbench.apply.evaluate_run import Wanted, score_run
    from kitbench.spec.loading import read_protocol
    from kitbench.store.folder import find
    from kitbench.system.environment import how_to_go_on

    [folder] = one_run(find([stored]))
    console = make_console()
    names = one_spelling(test_set)
    wanted = Wanted(names, read_protocol(protocol) if protocol else None, Path(method_file) if method_file else None)
    try:
        complete = score_run(folder, wanted, options, console)
    except RunError as error:
        raise RunError(f"{error}. {how_to_go_on()}") from error
    scored = [one for one in folder.evaluations() if one.data_set in names]
    show_tables(complete, list(dict.fromkeys(one.stamp for one in scored)), folder.path.parent, console)


@click.command()
@click.argument("restored", type=click.Path(path_type=Path))
@click.argument("clean", type=click.Path(path_type=Path))
@click.option("--protocol", required=True, metavar="NAME|FILE", help="How to score (kitbench list), e.g. awgn8.")
@click.option(
    "--format",
    "form",
    type=click.Choice(SCORES),
    help="Form of the table; by default that of the suffix of --out, else terminal.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the table to this file instead of the terminal.")
@LPIPS
def score(restored: Path, clean: Path, protocol: str, form: Any, out: Path | None, lpips_weights: str | None) -> None:
    """Score a folder of restored pictures against a folder of clean ones: PSNR, SSIM, and LPIPS with its weights.

    Pictures are paired by name; NAME-restored, as `kitbench restore` writes it, belongs to NAME.
    """
    from rich.console import Console

    from kitbench.apply.score_folders import network_of, partners, scores_of, scores_table
    from kitbench.spec.loading import read_protocol
    from kitbench.store.files import writable_file
    from kitbench.system.progress import progress

    form = form_of(form, out, SCORES)
    if out is not None:
        writable_file(out)
    chosen, console = read_protocol(protocol), Console(stderr=True)
    pairs = partners(restored, clean)
    network, why = network_of(chosen, lpips_weights)
    if why is not None:
        console.print(f"without LPIPS: {why}", markup=False, highlight=False, soft_wrap=True)
    with progress(console, chosen.stamp, len(pairs)) as update:
        scores = list(scores_of(pairs, chosen, network, update))
    give(scores_table(scores, form), out)


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@RUN
@METHOD_FILE
@DEVICE
@click.option("--at", required=True, metavar="X,Y", help="Pixel whose patch is explained: column, row, from 0.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("explain.png"), show_default=True,
              help="Picture to write.")  # fmt: skip
def explain(image: Path, folder: Path, method_file: Path | None, device: str, at: str, out: Path) -> None:
    """Draw on IMAGE which patches the patch at a pixel attends, for every k-NN attention of a trained run."""
    import re

    from kitbench.apply.explain import Pixel, explain_pixel
    from kitbench.store.files import writable_file
    from kitbench.store.folder import find
    from kitbench.system.environment import choose_device

    place = re.fullmatch(r"(\d+),(\d+)", at)
    if not place:
        raise InputError(f"--at takes X,Y in pixels, for example 120,80; found {at!r}.")
    writable_file(out)
    [run_folder] = one_run(find([folder]))
    pixel = Pixel(int(place[1]), int(place[2]))
    found = explain_pixel(image, run_folder, method_file, pixel, choose_device(device), out)
    for choice in found:
        click.echo(f"{choice.name}: {', '.join(f'{left},{top}' for left, top, *_ in choice.patches)}")
    click.echo(f"wrote {out}")
