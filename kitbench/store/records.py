"""The records of a run's folder: written with a checksum and a schema version, read validated.

Their JSON Schemas are in schemas/, written by tools/schemas.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from kitbench.errors import InputError
from kitbench.spec.fields import Frozen, Mode, Setting, digest
from kitbench.spec.suite import Backbone, Protocol, Recipe
from kitbench.spec.tasks import Task, condition

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
    changed: tuple[str, ...] = ()
    """Settings that `--set` gave another value than the suite has; claims are put to runs without any."""
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


class Trial(Frozen):
    """One method trained at one learning rate."""

    method: str
    lr: Annotated[float, Field(gt=0)]
    psnr_db: float | None
    """Mean over the validation images; None where the training diverged."""
    key: str
    """Of the stored run."""


class Tuning(Frozen):
    """tuning.json: learning rates that were tried alike for every method of a suite, and the best one of each."""

    schema_version: Literal[1] = 1
    suite: str
    preset: str
    mode: Mode
    steps: int
    seed: int
    """Of all trials; no run that is compared has it."""
    lr: float
    """The recipe's own rate."""
    rates: tuple[float, ...]
    """Those tried, ascending; the same for every method."""
    widened: bool
    """Whether rates were added for all methods because one method's best was the lowest or the highest."""
    validation: str
    """The set that trials were scored on, which is in neither the training nor the test sets."""
    trials: tuple[Trial, ...]
    best: dict[str, float]
    """By method: the rate of its trial with the highest PSNR."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if list(self.rates) != sorted(set(self.rates)):
            raise ValueError(f"rates must ascend, found {list(self.rates)}")
        for method in {trial.method for trial in self.trials} | self.best.keys():
            own = [trial for trial in self.trials if trial.method == method]
            if sorted(trial.lr for trial in own) != list(self.rates):
                raise ValueError(f"method {method} must have one trial at each of the rates {list(self.rates)}")
            scored = {trial.lr: trial.psnr_db for trial in own if trial.psnr_db is not None}
            if not scored or self.best.get(method) not in scored:
                raise ValueError(f"the best rate of method {method} must be that of a trial with a score")
            if scored[self.best[method]] < max(scored.values()):
                raise ValueError(f"the best rate of method {method} is not that of its trial with the highest PSNR")
        return self


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
