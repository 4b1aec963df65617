"""The main job: a suite's cells, one after another, each trained, evaluated and stored.

What is asked for is checked first (kitbench/job.py); from here on a cell that fails leaves the others.
"""

from __future__ import annotations

import errno
import hashlib
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from kitbench import evaluate, methods
from kitbench.backbone import UNet
from kitbench.cell import Cell
from kitbench.cost.timing import waited_seconds
from kitbench.data.batches import Batches
from kitbench.data.cards import Photograph
from kitbench.environment import command_line, device_name, environment
from kitbench.errors import InputError, Interrupted, RunError
from kitbench.job import Job, Options, Probe, Scoring, set_sha256
from kitbench.processes import joined
from kitbench.progress import duration, heartbeat, progress
from kitbench.seeds import derive
from kitbench.stop import Stop, interruptible
from kitbench.store import Evaluation, Held, Run, RunFolder, Training, now, write_atomic
from kitbench.suite import Suite
from kitbench.tracking import Log, logged_steps, test_means, tracked
from kitbench.train import LOG_EVERY, state_sha256, train, trained_state

WAITING = 0.02
"""Share of a step spent waiting for data from which on the progress shows it."""
PICTURES = 4
"""Images of each test set of which crops are kept."""


def run(suite: Suite, options: Options, console: Console) -> tuple[list[RunFolder], list[str]]:
    """Run every cell of the suite that is not stored yet.

    Returns the folders of all cells that are complete, and a sentence for each that failed. Raises InputError before
    anything is written, and Interrupted (state saved) on Ctrl-C or SIGTERM.
    """
    with joined() as world, interruptible(how_to_go_on) as stop:
        if not world.first:
            console = Console(quiet=True)
        job = Job(suite, options)
        folders = {cell: RunFolder(options.out / cell.folder) for cell in job.cells}
        todo = [job.cells[number] for number in world.agree(unfinished_cells(job, folders))]
        probes, unfit = probe(job, todo, console)
        job.require_space([cell for cell in todo if cell.method in probes], probes)
        announce(job, todo, probes, console)
        stop.idle = False
        failed = work_off(job, todo, folders, probes, unfit, console, stop)
        complete = [folders[cell] for cell in job.cells if not unfinished(job, cell, folders[cell])]
        return (complete, failed) if world.first else ([], [])


def unfinished_cells(job: Job, folders: dict[Cell, RunFolder]) -> list[int]:
    """The numbers of the job's cells that are to be worked on, in order: last those that have failed before."""
    left = [number for number, cell in enumerate(job.cells) if unfinished(job, cell, folders[cell])]
    return sorted(left, key=lambda number: (folders[job.cells[number]].path / "failed.json").is_file())


def unfinished(job: Job, cell: Cell, folder: RunFolder) -> bool:
    """Whether something of the cell is still to be done; a damaged record is told where the cell's turn comes."""
    try:
        return job.unfinished(cell, folder)
    except InputError:
        return True


def probe(job: Job, todo: list[Cell], console: Console) -> tuple[dict[str, Probe], dict[str, Exception]]:
    """What each trained method costs, or why it cannot be trained here, by name."""
    probes: dict[str, Probe] = {}
    unfit: dict[str, Exception] = {}
    with console.status("measuring what each method costs"):
        for cell in {cell.method: cell for cell in todo if cell.trained}.values():
            try:
                probes[cell.method] = job.probe(cell)
            except Exception as error:  # noqa: BLE001 - a method may be a stranger's code, and raise anything
                unfit[cell.method] = error
    return probes, unfit


def work_off(
    job: Job,
    todo: list[Cell],
    folders: dict[Cell, RunFolder],
    probes: dict[str, Probe],
    unfit: dict[str, Exception],
    console: Console,
    stop: Stop,
) -> list[str]:
    """Run the cells, those last that other processes work on now. Returns a sentence for each that failed."""
    begun, failed = now(), []
    titles = {}
    for number, cell in enumerate(todo, 1):
        seed = f" seed {cell.seed}" if cell.trained else ""
        titles[cell] = f"[{number}/{len(todo)}] {cell.mode} {cell.method}{seed}"
    queue, held = deque(todo), set()

    def attempt(cell: Cell, folder: RunFolder) -> str | None:
        with folder.lock() if job.world.first else nullcontext() as killed:
            if killed:
                console.print(f"{titles[cell]}  {killed} was killed; going on from what it stored", highlight=False)
            if cell in held and folder.failed is not None and folder.failed.when >= begun:
                return folder.failed.message  # the process that was waited for has tried
            try:
                if cell.method in unfit:
                    raise unfit[cell.method]
                if job.unfinished(cell, folder):
                    run_cell(job, cell, folder, probes.get(cell.method), titles[cell], console, stop)
                (folder.path / "failed.json").unlink(missing_ok=True)
            except Interrupted:
                raise
            except Exception as error:
                # One run's failure (out of memory, a full disk, a damaged record) must not take the others with it.
                sentence = failure(job, cell, folder, error)
                if job.world.size > 1:  # the other processes may be waiting for this one: torchrun ends them
                    raise RunError(sentence) from error
                return sentence
        return None

    while queue:
        if stop():
            raise Interrupted(f"stopped between two runs, {len(queue)} of {len(todo)} are left")
        cell = queue.popleft()
        try:
            sentence = attempt(cell, folders[cell])
        except Held as error:
            if job.world.size > 1:
                raise
            if cell not in held:
                console.print(f"{titles[cell]}  waits: {error}", highlight=False)
            held.add(cell)
            queue.append(cell)
            if held.issuperset(queue):
                time.sleep(0.5)
            continue
        except OSError as error:  # no lock can be made
            sentence = f"{cell.folder}: {told(error)}"
        if sentence is not None:
            failed.append(sentence)
            console.print(f"[red]failed[/red] {escape(sentence)}", highlight=False)
    return failed


def failure(job: Job, cell: Cell, folder: RunFolder, error: Exception) -> str:
    """One line of what went wrong, kept with the run as far as it can be."""
    sentence = f"{cell.folder}: {told(error)}"
    try:
        if not (folder.path / "run.json").is_file():
            folder.write("run.json", _record(job, cell))
        folder.fail(cell.key, sentence)
    except OSError as second:
        return f"{sentence} (which could not be noted there: {told(second)})"
    return sentence


def told(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the disk; free some, or choose another --out"
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def run_cell(
    job: Job,
    cell: Cell,
    folder: RunFolder,
    probe: Probe | None,
    title: str,
    console: Console,
    stop: Stop,
) -> None:
    """Train the cell from where it stands, then do the evaluations that are missing."""
    if job.world.first:
        begin(folder, _record(job, cell))
    if cell.trained:
        told = job.trackers if job.world.first else []
        with tracked(told, folder, None if folder.trained else logged_steps(folder)) as log:
            restore = _trained(job, cell, folder, probe, title, console, stop, log)
            score(job, cell, folder, restore, title, console, stop)
            log(job.suite.recipe.steps, test_means(folder))
    else:
        found = job.references[cell.method].restore
        assert found is not None
        score(job, cell, folder, found, title, console, stop)


def begin(folder: RunFolder, record: Run) -> None:
    """Write run.json where it is not there yet. Raises RunError where the folder holds another run."""
    if not (folder.path / "run.json").is_file():
        folder.write("run.json", record)
    elif folder.run.key != record.key:
        raise RunError(f"{folder.path} holds another run (key {folder.run.key[:12]}); choose another --out")


def score(
    job: Scoring, cell: Cell, folder: RunFolder, restore: methods.Restore, title: str, console: Console, stop: Stop
) -> None:
    """Do the evaluations of a cell that are missing."""
    sets, protocol = job.sets[cell.mode], job.protocols[cell.mode]
    missing = job.missing(cell, folder)
    lpips = job.lpips.get(protocol.lpips)
    mine = {name: list(enumerate(photos))[job.world.rank :: job.world.size] for name, photos in sets.test.items()}
    total = sum(len(mine[name]) for name, _ in missing)
    beat = heartbeat(folder, "scoring", total) if job.world.first else lambda done: None
    with progress(console, f"{title} scoring", total) as update:
        done = 0
        for name, sigma in missing:
            scores = []
            keep = keeper(folder, sets.test[name], name, sigma, protocol.stamp)
            photos = [photo for _, photo in mine[name]]
            for found in evaluate.scores(restore, photos, name, job.suite.task, sigma, protocol, lpips, keep):
                if stop():
                    raise Interrupted(f"stopped while scoring {folder.path.name}; the same command goes on there")
                scores.append(found)
                done += 1
                at = "" if sigma is None else f" sigma {sigma:g}"
                beat(done)
                update(done, f"{name}{at}: {'inf' if found.psnr is None else f'{found.psnr:.2f} dB'}")
            numbers = [number for number, _ in mine[name]]
            everyone = sorted(job.world.gather(list(zip(numbers, scores, strict=True))), key=lambda scored: scored[0])
            record = Evaluation(
                key=cell.key, data_set=name, data_sha256=job.test_sha256(cell.mode, name), sigma=sigma,
                protocol=protocol, stamp=protocol.stamp, lpips_note=job.lpips_notes.get(protocol.lpips),
                scores=tuple(score for _, score in everyone),
            )  # fmt: skip
            path = folder.evaluation_path(name, sigma, protocol.stamp)
            if job.world.first:
                folder.write(str(path.relative_to(folder.path)), record)
    (folder.path / "progress.json").unlink(missing_ok=True)


def keeper(
    folder: RunFolder, photographs: list[Photograph], name: str, sigma: float | None, stamp: str
) -> Callable[[Photograph, np.ndarray, np.ndarray], None]:
    """What keeps a crop of the first PICTURES images of a set as pictures in the run's folder."""
    numbers = {photo.name: number for number, photo in enumerate(photographs[:PICTURES])}

    def keep(photo: Photograph, degraded: np.ndarray, restored: np.ndarray) -> None:
        if photo.name in numbers:
            path = folder.crop_path(name, sigma, stamp, numbers[photo.name])
            write_atomic(path, evaluate.crop_strip(photo, name, degraded, restored))

    return keep


def _trained(
    job: Job,
    cell: Cell,
    folder: RunFolder,
    probe: Probe | None,
    title: str,
    console: Console,
    stop: Stop,
    track: Log,
) -> methods.Restore:
    """The cell's trained network as a function of an image: from its stored weights, or trained now."""
    suite, model = job.suite, job.build(cell)
    if folder.trained:
        if not folder.weights.is_file():
            raise RunError(
                f"{folder.weights} is missing, so it cannot be evaluated anew; delete the folder to train again"
            )
        model.load_state_dict(trained_state(folder))
    else:
        assert probe is not None
        batches = Batches(job.sets[cell.mode].training, suite.task, suite.recipe, derive(cell.seed, "data"))
        beat = heartbeat(folder, "training", suite.recipe.steps) if job.world.first else lambda done: None
        clock, kept_waiting = time.perf_counter(), waited_seconds()
        with progress(console, title, suite.recipe.steps) as update:

            def report(done: int, loss: float, psnr: float, waiting: float) -> None:
                beat(done)
                track(done, {"train/loss": loss, "train/psnr_db": psnr, "train/waiting": waiting})
                data = f"  {waiting:.0%} waiting for data" if waiting > WAITING else ""
                update(done, f"loss {loss:.4f}  {psnr:.2f} dB{data}")

            log = train(
                model, batches, suite.recipe, job.device, folder, job.options.workers, report, stop,
                lambda text: console.print(f"{title}  {escape(text)}", highlight=False), job.options.micro_batch,
            )  # fmt: skip
        model.float()  # trained in double precision, a run is kept and scored in single
        contended = (waited_seconds() - kept_waiting) / (time.perf_counter() - clock) / torch.get_num_threads()
        image = next(iter(job.sets[cell.mode].test.values()))[0].pixels
        notes = reports(model.eval(), image, job.device, job.protocols[cell.mode].tile)
        for name, note in notes.items():
            console.print(f"{title}  {name}: {', '.join(f'{k} {v}' for k, v in note.items())}", highlight=False)
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        training = Training(
            steps=suite.recipe.steps,
            seconds=sum(line[4] * ((line[0] - 1) % LOG_EVERY + 1) for line in log),
            seconds_per_step=statistics.median(line[4] for line in log),
            loss=log[-1][1],
            weights_sha256=state_sha256(state),
            log_sha256=hashlib.sha256(folder.log.read_bytes()).hexdigest(),
            contended=round(contended, 3),
            cost=probe.cost,
            notes=notes,
        )
        if job.world.first:
            write_atomic(folder.weights, safetensors.torch.save(state))
            folder.write("training.json", training)
            folder.checkpoint.unlink(missing_ok=True)
            folder.previous_checkpoint.unlink(missing_ok=True)
    model.to(job.device).eval()
    return evaluate.network(model, job.device, job.protocols[cell.mode], suite.recipe.precision)


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
        environment=environment(job.device, processes=job.world.size, micro_batch=job.options.micro_batch),
    )


def announce(job: Job, todo: list[Cell], probes: dict[str, Probe], console: Console) -> None:
    """Say what is about to be done, and how long it may take."""
    suite, recipe = job.suite, job.suite.recipe

    def say(label: str, text: str) -> None:
        console.print(f"[bold]{label:<10}[/bold]{text}", highlight=False, soft_wrap=True)

    say("suite", f"{suite.name}, preset {suite.preset}: {suite.title}")
    sigmas = ", ".join(f"{sigma:g}" for sigma in suite.task.conditions if sigma is not None)
    for mode, sets in job.sets.items():
        train, test = (", ".join(f"{n} ({len(p)})" for n, p in part.items()) for part in (sets.train, sets.test))
        say("data", f"{mode}: train on {train}; test on {test}" + (f" at sigma {sigmas}" if sigmas else ""))
    for name, why in job.absent.items():
        say("", f"without {name}: {why}")
    width, blocks = suite.backbone.width, list(suite.backbone.blocks)
    levels = ", ".join(map(str, sorted(set(suite.backbone.attention_levels))))
    say("backbone", f"width {width}, blocks {blocks}, attention at levels {levels} of {len(blocks)}")
    steps = f"{recipe.steps} steps of {recipe.batch} crops of {recipe.crop} px, {recipe.precision}"
    say("recipe", f"{recipe.name}: {steps}; {recipe.card.time}")
    for protocol in {protocol.stamp: protocol for protocol in job.protocols.values()}.values():
        say("protocol", f"{protocol.stamp}: {protocol.summary}")
    for net, note in job.lpips_notes.items():
        say("lpips", f"{net} is n/a: {note}")
    shared = f", {job.world.size} processes" if job.world.size > 1 else ""
    at_a_time = f", {len(job.pieces[0])} crops at a time on each" if len(job.pieces) > 1 else ""
    say("device", f"{device_name(job.device)}, {torch.get_num_threads()} threads{shared}{at_a_time}")
    if job.device.type == "cuda" and suite.preset == "quick":
        say("", "this machine has a CUDA device: --preset full runs the paper's recipe as we read it")
    stored = len(job.cells) - len(todo)
    if stored:
        say("stored", f"{stored} of {len(job.cells)} runs are complete in {job.options.out} and are not run again")
    seconds = 0.0
    for name, probe in probes.items():
        cost, mine = probe.cost, [cell for cell in todo if cell.method == name]
        pixels = sum(
            photo.shape[0] * photo.shape[1] * len(suite.task.conditions)
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


def how_to_go_on() -> str:
    return f"Go on with the same command: {command_line()}"
