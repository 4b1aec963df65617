"""The main job: a suite's cells, one after another, each trained, evaluated and stored.

What is asked for is checked first (kitbench/job.py); from here on a cell that fails leaves the others.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from rich.console import Console
from torch import nn

from kitbench import evaluate, methods
from kitbench.backbone import UNet
from kitbench.cell import Cell
from kitbench.data.batches import Batches
from kitbench.data.cards import Photograph, pixel_sha256
from kitbench.environment import command_line, device_name, environment
from kitbench.errors import Interrupted, RunError
from kitbench.job import Job, Options, Probe, set_sha256
from kitbench.progress import duration, progress
from kitbench.seeds import derive
from kitbench.store import Evaluation, Run, RunFolder, Training, replace_with, write_atomic
from kitbench.suite import Suite, digest
from kitbench.train import train

PICTURES = 4
"""Images of each test set of which crops are kept."""


def run(suite: Suite, options: Options, console: Console) -> tuple[list[RunFolder], list[str]]:
    """Run every cell of the suite that is not stored yet.

    Returns the folders of all cells that are complete, and a sentence for each that failed. Raises InputError before
    anything is written, and Interrupted (state saved) on Ctrl-C or SIGTERM.
    """
    job = Job(suite, options)
    folders = {cell: RunFolder(options.out / cell.folder) for cell in job.cells}
    todo = [
        cell
        for cell in job.cells
        if not (folders[cell].trained or not cell.trained) or job.missing(cell, folders[cell])
    ]
    probes: dict[str, Probe] = {}
    failed: list[str] = []
    with console.status("measuring what each method costs"):
        for cell in {cell.method: cell for cell in todo if cell.trained}.values():
            try:
                probes[cell.method] = job.probe(cell)
            except Exception as error:  # noqa: BLE001 - as below: whatever it is, it is told, and the others go on
                failed.append(failure(cell.method, error))
    todo = [cell for cell in todo if not cell.trained or cell.method in probes]
    announce(job, todo, probes, console)
    for sentence in failed:
        console.print(f"[red]failed[/red] {sentence}", highlight=False)
    with interruptible() as stopping:
        for number, cell in enumerate(todo, 1):
            seed = f" seed {cell.seed}" if cell.trained else ""
            title = f"[{number}/{len(todo)}] {cell.mode} {cell.method}{seed}"
            try:
                with folders[cell].lock():
                    run_cell(job, cell, folders[cell], probes.get(cell.method), title, console, stopping)
            except Interrupted:
                raise
            except Exception as error:  # noqa: BLE001 - a method may be a stranger's code, and raise anything
                # One run's failure (out of memory, a full disk, a damaged record) must not take the others with it.
                failed.append(failure(cell.folder, error))
                console.print(f"[red]failed[/red] {failed[-1]}", highlight=False)
    complete = [folders[cell] for cell in job.cells if not job.missing(cell, folders[cell])]
    return complete, failed


def failure(what: str, error: Exception) -> str:
    """One line of what went wrong."""
    return f"{what}: {type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def run_cell(
    job: Job,
    cell: Cell,
    folder: RunFolder,
    probe: Probe | None,
    title: str,
    console: Console,
    stopping: Callable[[], bool],
) -> None:
    """Train the cell from where it stands, then do the evaluations that are missing."""
    suite, sets = job.suite, job.sets[cell.mode]
    if (folder.path / "run.json").is_file():
        if folder.run.key != cell.key:
            raise RunError(f"{folder.path} holds another run (key {folder.run.key[:12]}); choose another --out")
    else:
        folder.write("run.json", _record(job, cell))
    if cell.trained:
        restore = _trained(job, cell, folder, probe, title, console, stopping)
    else:
        found = job.references[cell.method].restore
        assert found is not None
        restore = found
    missing = job.missing(cell, folder)
    total = sum(len(sets.test[name]) for name, _ in missing)
    with progress(console, f"{title} scoring", total) as update:
        done = 0
        for name, sigma in missing:
            scores = []
            keep = keeper(folder, sets.test[name], name, sigma, suite.protocol.stamp)
            for score in evaluate.scores(restore, sets.test[name], name, sigma, suite.protocol, job.lpips, keep):
                if stopping():
                    raise Interrupted(f"stopped while scoring {folder.path.name}; the same command goes on there")
                scores.append(score)
                done += 1
                update(done, f"{name} sigma {sigma:g}: {'inf' if score.psnr is None else f'{score.psnr:.2f} dB'}")
            record = Evaluation(
                key=cell.key, data_set=name, data_sha256=set_sha256(sets.test[name]), sigma=sigma,
                protocol=suite.protocol, stamp=suite.protocol.stamp, lpips_note=job.lpips_note, scores=tuple(scores),
            )  # fmt: skip
            path = folder.evaluation_path(name, sigma, suite.protocol.stamp)
            folder.write(str(path.relative_to(folder.path)), record)


def keeper(
    folder: RunFolder, photographs: list[Photograph], name: str, sigma: float, stamp: str
) -> Callable[[Photograph, np.ndarray, np.ndarray], None]:
    """What keeps a crop of the first PICTURES images of a set as pictures in the run's folder."""
    numbers = {photo.name: number for number, photo in enumerate(photographs[:PICTURES])}

    def keep(photo: Photograph, noisy: np.ndarray, restored: np.ndarray) -> None:
        if photo.name in numbers:
            path = folder.crop_path(name, sigma, stamp, numbers[photo.name])
            write_atomic(path, evaluate.crop_strip(photo, name, noisy, restored))

    return keep


def _trained(
    job: Job,
    cell: Cell,
    folder: RunFolder,
    probe: Probe | None,
    title: str,
    console: Console,
    stopping: Callable[[], bool],
) -> methods.Restore:
    """The cell's trained network as a function of an image: from its stored weights, or trained now."""
    suite, model = job.suite, job.build(cell)
    if folder.trained:
        if not folder.weights.is_file():
            raise RunError(
                f"{folder.weights} is missing, so it cannot be evaluated anew; delete the folder to train again"
            )
        model.load_state_dict(safetensors.torch.load_file(folder.weights))
    else:
        assert probe is not None
        batches = Batches(job.sets[cell.mode].training, suite.task, suite.recipe, derive(cell.seed, "data"))
        clock = time.perf_counter()
        with progress(console, title, suite.recipe.steps) as update:
            loss, rates = train(
                model, batches, suite.recipe, job.device, folder, job.options.workers,
                lambda done, loss, psnr: update(done, f"loss {loss:.4f}  {psnr:.2f} dB"), stopping,
            )  # fmt: skip
        image = next(iter(job.sets[cell.mode].test.values()))[0].pixels
        notes = reports(model.eval(), image, job.device, suite.protocol.tile)
        for name, note in notes.items():
            console.print(f"{title}  {name}: {', '.join(f'{k} {v}' for k, v in note.items())}", highlight=False)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        replace_with(folder.weights, lambda aside: safetensors.torch.save_file(state, aside))
        training = Training(
            steps=suite.recipe.steps,
            seconds=time.perf_counter() - clock,
            seconds_per_step=statistics.median(rates),
            loss=loss,
            weights_sha256=state_sha256(state),
            cost=probe.cost,
            notes=notes,
        )
        folder.write("training.json", training)
        folder.checkpoint.unlink(missing_ok=True)
    model.to(job.device).eval()
    return evaluate.network(model, job.device, suite.protocol, suite.recipe.precision)


def reports(model: UNet, image: np.ndarray, device: torch.device, tile: int) -> dict[str, dict[str, Any]]:
    """What each attention that has a method `report(x)` says of itself on a clean image: k-NN retrieval, its recall.

    The image is the first of the first test set, or its first tile; x are the tokens that the attention gets there.
    """
    found: dict[str, dict[str, Any]] = {}

    def listen(name: str, attention: nn.Module) -> None:
        def before(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
            found[name] = {k: round(v, 4) if isinstance(v, float) else v for k, v in module.report(*arguments).items()}  # type: ignore[operator]

        handles.append(attention.register_forward_pre_hook(before))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, attention in model.attentions():
        if hasattr(attention, "report"):
            listen(name, attention)
    side = tile or max(image.shape[:2])
    x = torch.from_numpy(image[:side, :side].transpose(2, 0, 1).astype(np.float32) / 255)[None].to(device)
    if handles:
        with torch.inference_mode():
            model(x)
    for handle in handles:
        handle.remove()
    return found


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """Of all weights by name: equal if and only if they are bit-identical."""
    return digest({name: pixel_sha256(tensor.detach().cpu().numpy()) for name, tensor in state.items()})


def _record(job: Job, cell: Cell) -> Run:
    trained = cell.trained
    loaded = job.methods[cell.method] if trained else job.references[cell.method]
    return Run(
        key=cell.key,
        comparison=cell.comparison,
        identity=cell.identity(),
        suite=job.suite.name,
        preset=job.suite.preset,
        mode=cell.mode,
        method=cell.method,
        attention=cell.attention,
        card=loaded.card,
        settings=cell.settings,
        seed=cell.seed,
        device=cell.device,
        task=job.suite.task,
        backbone=job.suite.backbone if trained else None,
        recipe=job.suite.recipe if trained else None,
        train_sets={n: set_sha256(p) for n, p in job.sets[cell.mode].train.items()} if trained else {},
        environment=environment(job.device),
    )


def announce(job: Job, todo: list[Cell], probes: dict[str, Probe], console: Console) -> None:
    """Say what is about to be done, and how long it may take."""
    suite, recipe = job.suite, job.suite.recipe

    def say(label: str, text: str) -> None:
        console.print(f"[bold]{label:<10}[/bold]{text}", highlight=False, soft_wrap=True)

    say("suite", f"{suite.name}, preset {suite.preset}: {suite.title}")
    sigmas = ", ".join(f"{sigma:g}" for sigma in suite.task.sigma_test)
    for mode, sets in job.sets.items():
        train, test = (", ".join(f"{n} ({len(p)})" for n, p in part.items()) for part in (sets.train, sets.test))
        say("data", f"{mode}: train on {train}; test on {test} at sigma {sigmas}")
    for name, why in job.absent.items():
        say("", f"without {name}: {why}")
    width, blocks = suite.backbone.width, list(suite.backbone.blocks)
    levels = ", ".join(map(str, sorted(set(suite.backbone.attention_levels))))
    say("backbone", f"width {width}, blocks {blocks}, attention at levels {levels} of {len(blocks)}")
    steps = f"{recipe.steps} steps of {recipe.batch} crops of {recipe.crop} px, {recipe.precision}"
    say("recipe", f"{recipe.name}: {steps}; {recipe.card.time}")
    say("protocol", f"{suite.protocol.stamp}: {suite.protocol.summary}")
    if job.lpips_note:
        say("lpips", f"n/a: {job.lpips_note}")
    say("device", f"{device_name(job.device)}, {torch.get_num_threads()} threads")
    if job.device.type == "cuda" and suite.preset == "quick":
        say("", "this machine has a CUDA device: --preset full runs the paper's recipe as we read it")
    stored = len(job.cells) - len(todo)
    if stored:
        say("stored", f"{stored} of {len(job.cells)} runs are complete in {job.options.out} and are not run again")
    seconds = 0.0
    for name, probe in probes.items():
        cost, mine = probe.cost, [cell for cell in todo if cell.method == name]
        pixels = sum(
            photo.pixels[..., 0].size * len(suite.task.sigma_test)
            for cell in mine for photos in job.sets[cell.mode].test.values() for photo in photos
        )  # fmt: skip
        training = sum(not (job.options.out / cell.folder / "training.json").is_file() for cell in mine)
        expected = training * probe.step_seconds * recipe.steps + pixels * probe.image_seconds
        seconds += expected
        macs = cost.macs if cost.macs is not None else cost.macs_counted
        mark = f"; {cost.macs_note}" if cost.macs_note else ""
        say(
            "method",
            f"{name}: {cost.parameters:,} parameters ({cost.attention_parameters:,} in the attention), "
            f"{(macs or 0) / 1e9:.2f} GMACs at {cost.resolution} px{mark}, about {duration(expected)}",
        )
    if todo:
        say("expected", f"about {duration(seconds)} for {len(todo)} runs")


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask for a stop at the next step, where the state is saved; a second Ctrl-C stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_to_go_on() -> str:
    return f"Go on with the same command: {command_line()}"
