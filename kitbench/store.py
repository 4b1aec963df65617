"""Run folders: written atomically, read validated; the only thing that tables, plots and checks ever read.

    results/denoise-colour-kit-s0-0123456789/
        run.json              what decides the run's numbers, and the environment that made it; written first
        log.csv               training log, a line every so many steps
        checkpoint.safetensors  weights, optimiser state and step, until the training is done
        weights.safetensors   the trained weights
        training.json         what the training cost; its presence says that the training is done
        eval/SET-sigma-PROTOCOL.json   scores of every image of one test set, one sigma, one protocol
        crops/SET-sigma-PROTOCOL-NUMBER.png   pictures of the first images of the set: whole, noisy, restored, clean

A file is written under another name, synced and renamed: a reader finds the old file or the new one, never a half.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from kitbench.errors import InputError, RunError
from kitbench.suite import Backbone, Frozen, Mode, Protocol, Recipe, Setting, Task

SCHEMA = 1
"""The version that this code writes and reads."""


class Environment(Frozen):
    """Where and how a run was made; decides no key, but explains differences."""

    kitbench: str
    commit: str | None
    """Of kitbench's own source, with `+dirty` behind it; None for an installed package."""
    command: tuple[str, ...]
    started: str
    host: str
    device: str
    driver: str | None
    threads: int
    python: str
    versions: dict[str, str]
    flags: dict[str, bool | int | str | None]


class Run(Frozen):
    """run.json"""

    schema_version: Literal[1] = 1
    key: str
    comparison: str
    identity: dict[str, Any]
    suite: str
    preset: str
    mode: Mode
    method: str
    attention: str
    card: str
    settings: dict[str, Setting]
    seed: int | None
    device: str
    task: Task
    backbone: Backbone | None
    recipe: Recipe | None
    train_sets: dict[str, str]
    """Digest of each training set's image checksums."""
    environment: Environment


class Cost(Frozen):
    """What a method costs, at a stated resolution."""

    parameters: int
    attention_parameters: int
    resolution: int
    """Side in pixels of the square image that macs speaks of."""
    macs: int | None
    """Closed form, one forward of one image; None where the method states none."""
    macs_counted: int | None
    macs_note: str | None
    """None where closed form and counter agree; else what differs, or which operator nobody counted."""
    train_peak_bytes: int | None
    """Peak memory of one training step beyond what was held before it."""
    memory_note: str | None
    calibration_seconds: float | None = None
    """Time of a fixed piece of work on the same device in the same minute: seconds a step divided by it travel."""


class Training(Frozen):
    """training.json"""

    schema_version: Literal[1] = 1
    steps: int
    seconds: float
    seconds_per_step: float
    """Median over the logged stretches of training, data loading included."""
    loss: float
    """Mean over the last logged stretch."""
    weights_sha256: str
    cost: Cost
    notes: Mapping[str, Any] = Field(default_factory=dict)
    """What a method reports of itself after training, e.g. the recall of its retrieval."""


class Score(Frozen):
    """One image."""

    image: str
    psnr: float | None
    """dB; None where restored and clean are equal (infinite)."""
    ssim: float
    lpips: float | None
    seconds: float


class Evaluation(Frozen):
    """eval/*.json: one test set at one sigma under one protocol."""

    schema_version: Literal[1] = 1
    key: str
    """Of the run."""
    data_set: str
    data_sha256: str
    sigma: float
    protocol: Protocol
    stamp: str
    lpips_note: str | None
    """Why LPIPS is n/a; None where it was measured or not asked for."""
    scores: tuple[Score, ...]


class RunFolder:
    """One run on disk. Reading raises InputError for a file that is no such record."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run(self) -> Run:
        return _read(Run, self.path / "run.json")

    @property
    def trained(self) -> bool:
        return (self.path / "training.json").is_file()

    @property
    def training(self) -> Training | None:
        return _read(Training, self.path / "training.json") if self.trained else None

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        return self.path / "log.csv"

    def evaluations(self) -> list[Evaluation]:
        return [_read(Evaluation, path) for path in sorted((self.path / "eval").glob("*.json"))]

    def evaluation_path(self, data_set: str, sigma: float, stamp: str) -> Path:
        return self.path / "eval" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', data_set)}-{sigma:g}-{stamp}.json"

    def crop_path(self, data_set: str, sigma: float, stamp: str, number: int) -> Path:
        """The picture of the set's image of that number (from 0)."""
        return self.path / "crops" / f"{self.evaluation_path(data_set, sigma, stamp).stem}-{number}.png"

    def evaluation(self, data_set: str, data_sha256: str, sigma: float, stamp: str) -> Evaluation | None:
        """The stored evaluation of exactly these images under exactly this protocol, if there is one."""
        path = self.evaluation_path(data_set, sigma, stamp)
        found = _read(Evaluation, path) if path.is_file() else None
        return found if found is not None and found.data_sha256 == data_sha256 else None

    def write(self, name: str, record: Frozen) -> None:
        write_atomic(self.path / name, (record.model_dump_json(indent=1) + "\n").encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process works on a run; the lock goes with the process. Raises RunError where another holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunError(f"Another process is working on {self.path}; wait for it, or stop it.") from error
        try:
            yield
        finally:
            lock.release()


def _read(model: type[Any], path: Path) -> Any:
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it or delete the run's folder.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise InputError(
            f"{path} has schema version {version!r}, this kitbench reads {SCHEMA}; use the kitbench that wrote it."
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(
            f"{path} is not a valid record: {place}: {fault['msg']}; restore it or delete the run's folder."
        ) from error


def find(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs at the given paths: each is a run's folder, or a folder that holds runs. Raises InputError."""
    found: dict[Path, RunFolder] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is no folder; give a run's folder, or a folder that holds runs.")
        here = [path] if (path / "run.json").is_file() else sorted(p.parent for p in path.glob("*/run.json"))
        if not here:
            raise InputError(
                f"No run in {path}: no run.json there or one folder below; give another folder, or run a suite first."
            )
        found |= {run.resolve(): RunFolder(run) for run in here}
    return list(found.values())


def writable(folder: Path) -> None:
    """Raises InputError where files cannot be made in `folder`, which need not exist yet; leaves nothing behind."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"Results folder {folder} cannot be written ({error.strerror}); choose another with --out."
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, surviving a power cut: written aside, synced, renamed, the folder synced."""
    replace_with(path, lambda aside: aside.write_bytes(data))


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(aside)` make a file beside `path`, then put it in its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
