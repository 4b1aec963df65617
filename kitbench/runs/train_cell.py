"""The training of one cell, from where it stands to its stored weights."""

from __future__ import annotations

import hashlib
import statistics
import time

import safetensors.torch
import torch
from rich.markup import escape

from kitbench.cost.timing import waited_seconds
from kitbench.data.batches import Batches
from kitbench.model.backbone import UNet
from kitbench.runs.checkpoint import state_sha256
from kitbench.runs.notes import MEASURED_ON, attention_notes
from kitbench.runs.train import LOG_EVERY, TrainingContext, train
from kitbench.runs.work import CellWork
from kitbench.scoring.validation import validation_crops, validator
from kitbench.seeds import derive
from kitbench.store.files import write_atomic
from kitbench.store.log import LogLine
from kitbench.store.records import Training
from kitbench.system.progress import heartbeat
from kitbench.system.tracking import Log, logged_steps, tracked

WAITING = 0.02
"""Share of a step spent waiting for data from which on the progress shows it."""


def train_cell(work: CellWork) -> None:
    """Train the cell from where it stands, and store its weights and what the training cost.

    Raises RunError where the training fails, and Interrupted, with its state saved, once `work.stop()` is true.
    """
    prepared, folder = work.prepared, work.folder
    first = prepared.world.first
    trackers = prepared.trackers() if first else []
    with tracked(trackers, folder, logged_steps(folder)) as track:
        clock, kept_waiting = time.perf_counter(), waited_seconds()
        model, log = _train(work, track)
        contended = (waited_seconds() - kept_waiting) / (time.perf_counter() - clock) / torch.get_num_threads()
    model.float()  # trained in double precision, a run is kept and scored in single
    notes = attention_notes(work, model.eval())
    for name, note in notes.items():
        work.reporter.say(f"{name}: {', '.join(f'{k} {_short(v)}' for k, v in note.items() if k not in MEASURED_ON)}")
    if first:
        assert work.probe is not None
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        write_atomic(folder.weights, safetensors.torch.save(state))
        training = Training(
            steps=prepared.suite.recipe.steps,
            seconds=sum(line.seconds_per_step * ((line.step - 1) % LOG_EVERY + 1) for line in log),
            seconds_per_step=statistics.median(line.seconds_per_step for line in log),
            loss=log[-1].loss,
            weights_sha256=state_sha256(state),
            log_sha256=hashlib.sha256(folder.log.read_bytes()).hexdigest(),
            contended=round(contended, 3),
            cost=work.probe.cost,
            notes=notes,
        )
        folder.write("training.json", training)
        for left in (folder.checkpoint, folder.previous_checkpoint, folder.path / "progress.json"):
            left.unlink(missing_ok=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _train(work: CellWork, track: Log) -> tuple[UNet, list[LogLine]]:
    prepared, cell = work.prepared, work.cell
    suite, sets, device = prepared.suite, prepared.sets[cell.mode], prepared.device
    model = prepared.build(cell)
    batches = Batches(sets.training, suite.task, cell.recipe, derive(cell.seed, "data"))
    beat = heartbeat(work.folder, "training", suite.recipe.steps) if prepared.world.first else lambda done: None
    validated = ""

    def report(line: LogLine) -> None:
        nonlocal validated
        waiting = line.seconds_data / line.seconds_per_step
        values = {"train/loss": line.loss, "train/psnr_db": line.psnr_db, "train/waiting": waiting}
        if line.validation_psnr_db is not None:
            values["validation/psnr_db"] = line.validation_psnr_db
            validated = f"validation {line.validation_psnr_db:.2f} dB, "
        beat(line.step)
        track(line.step, values)
        data = f", {waiting:.0%} waiting for data" if waiting > WAITING else ""
        text = f"{validated}training {line.psnr_db:.2f} dB, loss {line.loss:.4f}{data}"
        work.reporter.advance("training", line.step, suite.recipe.steps, text)

    crops = validation_crops(sets.validation, suite.task, prepared.protocols[cell.mode])
    context = TrainingContext(
        device, work.folder, work.stop, prepared.options.workers, prepared.options.micro_batch, report,
        lambda text: work.reporter.say(escape(text)),
        validator(crops, device, suite.recipe.precision) if crops else None,
    )  # fmt: skip
    return model, train(model, batches, context)
