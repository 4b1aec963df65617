"""Run folders: written atomically, validated when read; the only input of tables, plots and checks.

    results/denoise-colour-kit-s0-0123456789/
        run.json              what determines the run's numbers, and the environment it was made in; written first
        log.csv               training log, one line for each interval of steps
        checkpoint.safetensors  weights, optimiser state and step, with their checksum; deleted when training is done
        checkpoint-previous.safetensors  the one before it
        weights.safetensors   the trained weights
        training.json         what the training cost; it exists if and only if training is done
        eval/SET-sigma-PROTOCOL.json   scores of every image of one test set, one sigma (if there is one), one protocol
        failed.json           why the run failed, if it did
        origin.json           who made the run, if it was imported
        crops/SET-sigma-PROTOCOL-NUMBER.png   pictures of the first images of the set: whole, input, restored, clean
        progress.json         how far a running cell is, for `kitbench status`; deleted when it is done
        .lock, .owner         the lock of the process that works on the run, and which process that is

A file is written under another name, synced and renamed: a reader sees the old file or the new one, never part of one.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import safetensors
from filelock import FileLock, Timeout

from kitbench.errors import InputError, RunError
from kitbench.spec.fields import Frozen, digest
from kitbench.store.files import write_atomic
from kitbench.store.log import LogLine, parse_log
from kitbench.store.records import (
    MEND,
    Evaluation,
    Failure,
    Origin,
    Owner,
    Progress,
    Run,
    Training,
    host_name,
    now,
    read_record,
)

TRIALS = "tuning"
"""In a folder of runs, the folder of the trials of its searches of learning rates."""


class RunLocked(RunError):
    """Another process works on the run."""


class RunFolder:
    """One run on disk. Reading raises InputError for a file that is not the expected record.

    mend: what to do about a damaged record, for messages.
    """

    def __init__(self, path: Path, mend: str = MEND) -> None:
        self.path, self.mend = path, mend

    @property
    def run(self) -> Run:
        return read_record(Run, self.path / "run.json", self.mend)

    @property
    def trained(self) -> bool:
        return (self.path / "training.json").is_file()

    @property
    def training(self) -> Training | None:
        return read_record(Training, self.path / "training.json", self.mend) if self.trained else None

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
    def saved_steps(self) -> int | None:
        """The step that the training would go on from, by its last checkpoint; None without a readable one."""
        try:
            with safetensors.safe_open(self.checkpoint, "np") as file:
                return int((file.metadata() or {})["steps"])
        except (safetensors.SafetensorError, OSError, KeyError, ValueError):
            return None

    @property
    def log(self) -> Path:
        return self.path / "log.csv"

    def evaluations(self) -> list[Evaluation]:
        """All stored scores. Raises InputError for those of a training that is not known to have ended."""
        found = [read_record(Evaluation, path, self.mend) for path in sorted((self.path / "eval").glob("*.json"))]
        if found and not self.trained and self.run.recipe is not None:
            raise InputError(f"{self.path} has scores, but no training.json, written before them; {self.mend}.")
        return found

    def evaluation_path(self, data_set: str, sigma: float | None, stamp: str) -> Path:
        level = "" if sigma is None else f"{sigma:g}-"
        # A set that is named by its path: the last part, told from other folders of that name by a hash.
        named = f"{data_set.rpartition('/')[2]}-{digest(data_set)[:8]}" if "/" in data_set else data_set
        return self.path / "eval" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', named)}-{level}{stamp}.json"

    def crop_path(self, data_set: str, sigma: float | None, stamp: str, number: int) -> Path:
        """The picture of the set's image of that number (from 0)."""
        return self.path / "crops" / f"{self.evaluation_path(data_set, sigma, stamp).stem}-{number}.png"

    def evaluation(self, data_set: str, data_sha256: str, sigma: float | None, stamp: str) -> Evaluation | None:
        """The stored evaluation of these very images under this very protocol, if there is one."""
        path = self.evaluation_path(data_set, sigma, stamp)
        found = read_record(Evaluation, path) if path.is_file() else None
        return found if found is not None and found.data_sha256 == data_sha256 else None

    def logged(self) -> list[LogLine]:
        """The training log; empty without one. Raises InputError where it is damaged."""
        if not self.log.is_file():
            return []
        try:
            data, training = self.log.read_bytes(), self.training
            if training and training.log_sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise ValueError("it does not match the checksum stated in training.json")
            return parse_log(data.decode())
        except (OSError, ValueError, csv.Error) as error:
            mend = "restore it or delete it" if self.mend == MEND else self.mend
            raise InputError(f"{self.log} is not a training log ({error}); {mend}.") from error

    def write(self, name: str, record: Frozen) -> None:
        """Write a record, followed by the checksum of its content."""
        text = record.model_dump_json(indent=1).removesuffix("\n}")
        text = f'{text},\n "sha256": "{digest(json.loads(text + "}"))}"\n}}\n'
        write_atomic(self.path / name, text.encode())

    @property
    def progress(self) -> Progress | None:
        path = self.path / "progress.json"
        return read_record(Progress, path) if path.is_file() else None

    @property
    def origin(self) -> Origin | None:
        """Who made the run; None where it was made here. Raises InputError where the record is of another run."""
        path = self.path / "origin.json"
        found = read_record(Origin, path) if path.is_file() else None
        if found is not None and found.key != self.run.key:
            raise InputError(f"{path} belongs to another run; restore it, or import the run again.")
        return found

    def key_begins(self, digits: str) -> bool:
        """Whether these are the first digits of the run's key. The folder's name ends in ten; run.json has all."""
        stated = self.path.name.rpartition("-")[2]
        return stated.startswith(digits) if len(digits) <= len(stated) else self.run.key.startswith(digits)

    @property
    def failed(self) -> Failure | None:
        path = self.path / "failed.json"
        return read_record(Failure, path) if path.is_file() else None

    @property
    def failure(self) -> str | None:
        """Why the run failed; None where it did not, or was continued since."""
        return self.failed.message if self.failed else None

    def fail(self, key: str, message: str, traceback: str | None = None) -> None:
        """Note why the run failed."""
        self.write("failed.json", Failure(key=key, message=message, when=now(), traceback=traceback))

    @contextmanager
    def lock(self) -> Iterator[Owner | None]:
        """Lock the run for this process. Raises RunLocked, naming the owner, where another process has locked it, and
        InputError where the run was imported: it stays as its author made it.

        The operating system releases the lock when its process ends, so a lock is never stale. Yields the previous
        owner if it was killed; its partly written files are removed.
        """
        if (origin := self.origin) is not None:
            raise InputError(
                f"{self.path} was imported (run by {origin.by}), and nothing is added to runs of others; make your own "
                f"in another --out."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0.2)  # `held` takes it for a moment
        try:
            lock.acquire()
        except Timeout as error:
            owner = _owner(self.path) or "another process"
            raise RunLocked(f"{self.path} is being worked on by {owner}; wait for it, or stop it") from error
        try:
            before = _owner(self.path)
            for left in self.path.rglob(".*.tmp"):
                left.unlink()
            self.write(".owner", Owner(pid=os.getpid(), host=host_name(), started=now()))
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
        except PermissionError:  # another user's run
            return self._held_by_another()

    def _held_by_another(self) -> bool:
        """`held`, by a lock for which the file need not be writable."""
        with (self.path / ".lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _owner(folder: Path) -> Owner | None:
    try:
        return read_record(Owner, folder / ".owner")
    except InputError:
        return None  # deleted meanwhile, by the process that wrote it


def find(paths: Sequence[Path]) -> list[RunFolder]:
    """The runs at the given paths: each is the folder of a run, or a folder that contains runs. Raises InputError."""
    found: dict[Path, RunFolder] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is not a folder; give the folder of a run, or a folder that contains runs.")
        here = [path] if (path / "run.json").is_file() else sorted(p.parent for p in path.glob("*/run.json"))
        if not here:
            below = sorted({p.parent.parent for p in path.glob("*/*/run.json")})
            raise InputError(
                f"No run in {path}: neither it nor its subfolders contain a run.json; "
                + ("give another folder, or run a suite first." if not below else
                   f"give {below[0]}, which has some." if len(below) == 1 else
                   f"give one of its {len(below)} folders of runs, for example {below[0]}.")
            )  # fmt: skip
        found |= {run.resolve(): RunFolder(run) for run in here}
    return list(found.values())


def without_imported(runs: Sequence[RunFolder]) -> tuple[list[RunFolder], str]:
    """The runs that were made here; and of the others how many and by whom, `2 imported, run by Jane Doe`, or ''."""
    origins = {folder: folder.origin for folder in runs}
    others = [origin.by for origin in origins.values() if origin is not None]
    said = f"{len(others)} imported, run by {' and '.join(dict.fromkeys(others))}" if others else ""
    return [folder for folder, origin in origins.items() if origin is None], said
