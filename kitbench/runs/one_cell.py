"""One cell: trained from where it stands, evaluated, stored."""

from __future__ import annotations

import hashlib
import statistics
import time
from typing import Any

import numpy as np
import safetensors.torch
import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from kitbench.cost.timing import waited_seconds
from kitbench.data.batches import Batches
from kitbench.errors import Interrupted, RunError
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.runs.cell import Cell
from kitbench.runs.checkpoint import state_sha256, trained_state
from kitbench.runs.prepare import Job, Scoring, set_sha256
from kitbench.runs.probe import Probe
from kitbench.runs.train import LOG_EVERY, train
from kitbench.scoring import evaluate
from kitbench.scoring.crops import keeper
from kitbench.seeds import derive
from kitbench.store.files import write_atomic
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Run, Training
from kitbench.system.environment import environment
from kitbench.system.interrupt import Stop
from kitbench.system.progress import heartbeat, progress
from kitbench.system.tracking import Log, logged_steps, test_means, tracked

WAITING = 0.02
"""Share of a step spent waiting for data from which on the progress shows it."""


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
        begin(folder, record_of(job, cell))
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


def changed_settings(job: Job, cell: Cell) -> tuple[str, ...]:
    """The settings that `--set` gave another value than the suite has."""
    if not cell.trained:
        return ()
    own = job.methods[cell.method].resolve(job.suite.methods[cell.method].own)
    return tuple(sorted(key for key, value in cell.settings.items() if value != own[key]))


def record_of(job: Job, cell: Cell) -> Run:
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
        changed=changed_settings(job, cell),
        seed=cell.seed,
        device=cell.device,
        task=job.suite.task,
        backbone=job.suite.backbone if trained else None,
        recipe=job.suite.recipe if trained else None,
        train_sets={n: set_sha256(p) for n, p in job.sets[cell.mode].train.items()} if trained else {},
        environment=environment(job.device, processes=job.world.size, micro_batch=job.options.micro_batch),
    )
