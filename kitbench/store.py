"""Run folders: written atomically, read validated; the only thing that tables, plots and checks ever read.

    results/denoise-colour-kit-s0-0123456789/
        run.json              what decides the run's numbers, and the environment that made it; written first
        log.csv               training log, a line every so many steps
        checkpoint.safetensors  weights, optimiser state and step, with their checksum, until the training is done
        checkpoint-previous.safetensors  the one before it
        weights.safetensors   the trained weights
        training.json         what the training cost; its presence says that the training is done
        eval/SET-sigma-PROTOCOL.json   scores of every image of one test set, one sigma (if there is one), one protocol
        failed.json           why the run is not complete, where it failed
        crops/SET-sigma-PROTOCOL-NUMBER.png   pictures of the first images of the set: whole, input, restored, clean

A file is written under another name, synced and renamed: a reader finds the old file or the new one, never a half.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from kitbench.errors import InputError, RunError
from kitbench.suite import Backbone, Frozen, Mode, Protocol, Recipe, Setting, Task, condition, digest

SCHEMA = 1
"""The version that this code writes and reads. No older one exists; a new one brings what migrates this one."""
LARGEST = 64 << 20
"""Bytes of the largest record that is read."""
Stamp = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*\.v[0-9]+(\+[0-9a-f]{6})?$")]
"""Part of file names: nothing in it leads out of the run's folder."""


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
    cost: Cost | None = None
    """Of a network with given weights; that of a trained one is in training.json."""


class Training(Frozen):
    """training.json"""

    schema_version: Literal[1] = 1
    steps: int
    seconds: float
    seconds_per_step: float
    """Median over the logged stretches of training, data loading included."""
    contended: float | None = None
    """Share of the time of training that its threads waited for a processor: above a few hundredths other work slowed
    the steps. None: not recorded."""
    loss: float
    """Mean over the last logged stretch."""
    weights_sha256: str
    log_sha256: str | None = None
    """Of log.csv; None in runs that were made before it was kept."""
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
    """Of the images, and of the degradation where the task makes it and has no sigma."""
    sigma: float | None
    """In 8-bit grey levels; None where the task has one condition."""
    protocol: Protocol
    stamp: Stamp
    lpips_note: str | None
    """Why LPIPS is n/a; None where it was measured or not asked for."""
    scores: tuple[Score, ...]

    @property
    def condition(self) -> str:
        """What stands behind the data set's name: `σ25`, or nothing."""
        return condition(self.sigma)


class Failure(Frozen):
    """failed.json: why the run is not complete; gone once it is."""

    schema_version: Literal[1] = 1
    key: str
    message: str
    when: str
    """UTC, ISO 8601."""


class Owner(Frozen):
    """.owner: the process that works on a run. Left behind by one that was killed."""

    schema_version: Literal[1] = 1
    pid: int
    host: str
    started: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.started})"


class Held(RunError):
    """Another process works on the run."""


class Progress(Frozen):
    """progress.json: how far a run under way is; decides nothing, and goes when the run is done."""

    schema_version: Literal[1] = 1
    phase: Literal["training", "scoring"]
    done: int
    """Steps, or images."""
    total: int
    seconds_left: float | None
    updated: float
    """Seconds since the epoch."""
    host: str


class RunFolder:
    """One run on disk. Reading raises InputError for a file that is no such record."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def run(self) -> Run:
        return read_record(Run, self.path / "run.json")

    @property
    def trained(self) -> bool:
        return (self.path / "training.json").is_file()

    @property
    def training(self) -> Training | None:
        return read_record(Training, self.path / "training.json") if self.trained else None

    @property
    def weights(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def previous_checkpoint(self) -> Path:
        return self.path / "checkpoint-previous.safetensors"

    @property
    def log(self) -> Path:
        return self.path / "log.csv"

    def evaluations(self) -> list[Evaluation]:
        return [read_record(Evaluation, path) for path in sorted((self.path / "eval").glob("*.json"))]

    def evaluation_path(self, data_set: str, sigma: float | None, stamp: str) -> Path:
        level = "" if sigma is None else f"{sigma:g}-"
        return self.path / "eval" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', data_set)}-{level}{stamp}.json"

    def crop_path(self, data_set: str, sigma: float | None, stamp: str, number: int) -> Path:
        """The picture of the set's image of that number (from 0)."""
        return self.path / "crops" / f"{self.evaluation_path(data_set, sigma, stamp).stem}-{number}.png"

    def evaluation(self, data_set: str, data_sha256: str, sigma: float | None, stamp: str) -> Evaluation | None:
        """The stored evaluation of exactly these images under exactly this protocol, if there is one."""
        path = self.evaluation_path(data_set, sigma, stamp)
        found = read_record(Evaluation, path) if path.is_file() else None
        return found if found is not None and found.data_sha256 == data_sha256 else None

    def logged(self) -> list[dict[str, float]]:
        """The lines of the training log, by column; none without a log. Raises InputError where it is damaged."""
        if not self.log.is_file():
            return []
        try:
            data, training = self.log.read_bytes(), self.training
            if training and training.log_sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise ValueError("it has not the checksum that training.json states")
            lines = csv.DictReader(io.StringIO(data.decode(), newline=""))
            if not {"step", "loss", "psnr_db"} <= set(lines.fieldnames or ()):
                raise ValueError("columns are missing")
            return [{name: float(value) for name, value in line.items()} for line in lines]
        except (OSError, TypeError, ValueError, csv.Error) as error:
            raise InputError(f"{self.log} is no training log ({error}); restore it or delete it.") from error

    def write(self, name: str, record: Frozen) -> None:
        """Write a record, with the checksum of its content behind it."""
        text = record.model_dump_json(indent=1).removesuffix("\n}")
        text = f'{text},\n "sha256": "{digest(json.loads(text + "}"))}"\n}}\n'
        write_atomic(self.path / name, text.encode())

    @property
    def progress(self) -> Progress | None:
        path = self.path / "progress.json"
        return read_record(Progress, path) if path.is_file() else None

    @property
    def failed(self) -> Failure | None:
        path = self.path / "failed.json"
        return read_record(Failure, path) if path.is_file() else None

    @property
    def failure(self) -> str | None:
        """Why the run failed; None where it did not, or goes on well since."""
        return self.failed.message if self.failed else None

    def fail(self, key: str, message: str) -> None:
        """Note why the run failed."""
        self.write("failed.json", Failure(key=key, message=message, when=now()))

    @contextmanager
    def lock(self) -> Iterator[Owner | None]:
        """Only one process works on a run. Raises Held, naming the owner, where another does.

        The system drops the lock with the process that holds it, so a lock is never stale. Yields the owner before,
        where it was killed; what it left half-written is removed.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0.2)  # `held` takes it for a moment
        try:
            lock.acquire()
        except Timeout as error:
            owner = _owner(self.path) or "another process"
            raise Held(f"{self.path} is being worked on by {owner}; wait for it, or stop it") from error
        try:
            before = _owner(self.path)
            for left in self.path.rglob(".*.tmp"):
                left.unlink()
            self.write(".owner", Owner(pid=os.getpid(), host=platform.node(), started=now()))
            try:
                yield before
            finally:
                (self.path / ".owner").unlink(missing_ok=True)
        finally:
            lock.release()

    def held(self) -> bool:
        """Whether a process works on the run now."""
        if not (self.path / ".lock").is_file():
            return False
        try:
            with FileLock(self.path / ".lock", timeout=0):
                return False
        except Timeout:
            return True


def _owner(folder: Path) -> Owner | None:
    try:
        return read_record(Owner, folder / ".owner")
    except InputError:
        return None  # it comes and goes with the process


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(model: type[Any], path: Path) -> Any:
    """A record from a file that a stranger may have written. Raises InputError."""
    try:
        if not path.is_file():  # a pipe would be waited on forever
            raise InputError(f"{path} is no file; restore it or delete the run's folder.")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is larger than {LARGEST >> 20} MiB, which no record is; restore it.")
        raw = json.loads(path.read_bytes())
        stated = raw.pop("sha256", None) if isinstance(raw, dict) else None
        found = digest(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); restore it or delete the run's folder.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        newer = isinstance(version, int) and version > SCHEMA
        advice = "a newer kitbench wrote it: update kitbench" if newer else "it is no record of kitbench: restore it"
        raise InputError(f"{path} has schema version {str(version)[:20]!r}, this kitbench reads {SCHEMA}; {advice}.")
    if stated not in (None, found):
        raise InputError(
            f"{path} is damaged, or was changed by hand: its content has not the checksum that it states; "
            f"restore it or delete the run's folder."
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


def write_atomic(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write a file whole or not at all, surviving a power cut: written aside, synced, renamed, the folder synced.

    `previous`: what the file that stood there is kept as.
    """
    replace_with(path, lambda aside: aside.write_bytes(data), previous)


def replace_with(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Let `write(aside)` make a file beside `path`, then put it in its place at once. Otherwise as `write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
