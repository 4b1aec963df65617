"""What the steps of one cell's work share, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from kitbench.errors import RunError
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import PreparedSuite
from kitbench.runs.probe import Probe
from kitbench.runs.sets import set_sha256
from kitbench.runs.source import source_digests
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run
from kitbench.system.environment import environment
from kitbench.system.interrupt import Stop

Phase = Literal["training", "scoring"]


class Reporter(Protocol):
    """Whom a cell's work informs: the terminal, or the process that has started this one."""

    def say(self, text: str) -> None:
        """A sentence about the cell."""

    def advance(self, phase: Phase, done: int, total: int, text: str) -> None:
        """So many steps or images are done; `text` says what came out of the last."""


@dataclass(frozen=True)
class CellWork:
    """A cell, and what is needed to train and score it."""

    prepared: PreparedSuite
    cell: Cell
    probe: Probe | None
    """None for what is not trained."""
    reporter: Reporter
    stop: Stop

    @property
    def folder(self) -> RunFolder:
        return self.prepared.folder(self.cell)


def begin(folder: RunFolder, record: Run) -> None:
    """Write run.json where it is not there yet, or nothing is stored of its training.

    Raises RunError where the folder holds another run, or one whose checkpoint was made by other code or another torch:
    the record would tell of one, and the weights be of both.
    """
    path = folder.path / "run.json"
    if path.is_file() and folder.run.key != record.key:
        raise RunError(f"{folder.path} holds another run (key {folder.run.key[:12]}); choose another --out")
    checkpoints = (folder.checkpoint, folder.previous_checkpoint)
    if not path.is_file():
        folder.write("run.json", record)
    elif record.seed is not None and not folder.trained and (other := unlike(folder.run, record)):
        if any(checkpoint.is_file() for checkpoint in checkpoints):
            raise RunError(
                f"{folder.path} was begun with another {other}, and would not go on bit for bit; go on with that, or "
                f"delete the folder to train from the start"
            )
        folder.write("run.json", record)


def unlike(begun: Run, record: Run) -> str:
    """What a training was begun with otherwise than it would go on now, among what decides its numbers; '' if nothing.

    Records of earlier versions do not say of every part.
    """
    before, now = begun.source or {}, record.source or {}
    parts = [f"source of the {part}" for part in now if part != "scoring" and before.get(part, now[part]) != now[part]]
    releases = [one.environment.versions.get("torch") for one in (begun, record)]
    return ", ".join([*parts, *([f"torch ({releases[0]})"] if releases[0] != releases[1] else [])])


def changed_settings(prepared: PreparedSuite, cell: Cell) -> tuple[str, ...]:
    """The settings that `--set` gave another value than the suite has."""
    if not cell.trained:
        return ()
    own = prepared.methods[cell.method].resolve(prepared.suite.methods[cell.method].own)
    return tuple(sorted(key for key, value in cell.settings.items() if value != own[key]))


def record_of(prepared: PreparedSuite, cell: Cell) -> Run:
    """The record that a cell's run begins with."""
    suite, sets, trained = prepared.suite, prepared.sets[cell.mode], cell.trained
    loaded = prepared.methods[cell.method] if trained else prepared.references[cell.method]
    return Run(
        key=cell.key,
        comparison=cell.comparison,
        identity=cell.identity(),
        suite=suite.name,
        preset=suite.preset,
        mode=cell.mode,
        method=cell.method,
        attention=cell.attention,
        card=loaded.card,
        settings=cell.settings,
        changed=changed_settings(prepared, cell),
        seed=cell.seed,
        device=cell.device,
        task=suite.task,
        backbone=suite.backbone if trained else None,
        recipe=cell.recipe if trained else None,
        train_sets={name: set_sha256(photos) for name, photos in sets.train.items()} if trained else {},
        validation_sets={name: set_sha256(photos) for name, photos in sets.validation.items()} if trained else {},
        environment=environment(
            prepared.device, processes=prepared.world.size, micro_batch=prepared.options.micro_batch
        ),
        source=source_digests(cell.attention, trained),
    )
