"""The records of a run's folder: written with a checksum and a schema version, read validated.

Their JSON Schemas are in schemas/, written by tools/schemas.py.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from kitbench.errors import InputError
from kitbench.spec.fields import Frozen, Mode, Setting, digest
from kitbench.spec.messages import said_of
from kitbench.spec.suite import Backbone, Protocol, Recipe
from kitbench.spec.tasks import Task, condition

SCHEMA = 1
"""The version that this code writes and reads. No older one exists; a new version must come with a migration."""
LARGEST = 64 << 20
"""Bytes of the largest record that is read."""
MEND = "restore it or delete the run's folder"
"""What to do about a damaged record of a run that is stored here."""
Stamp = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*\.v[0-9]+(\+[0-9a-f]{6})?$")]
"""Used in file names, so the pattern admits no path separator."""
By = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=80,
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069|<>`]+$",
    ),
]  # fmt: skip
"""Who made a run: one line, printed in every table that the run stands in. No character ends the line, controls a
terminal or changes the direction of the text."""
Count = Annotated[int, Field(ge=0, le=10**18)]
"""Of parameters or multiply-adds."""
Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Record = TypeVar("Record", bound=Frozen)


class Environment(Frozen):
    """Where and how a run was made. Not part of the run's key; explains differences between runs."""

    kitbench: str
    commit: str | None
    """Of kitbench's own source, followed by `+dirty` where files differ from it; None for an installed package,
    and where git tells nothing."""
    command: tuple[str, ...]
    started: str
    host: str
    device: str
    driver: str | None
    threads: int
    python: str
    versions: dict[str, str]
    flags: dict[str, bool | int | str | None]


class Numerics(Frozen):
    """What the last bits of a run's numbers depend on, besides its cell."""

    source: dict[str, str]
    """By part (attention, network, data, training, scoring): digest of the syntax trees of the source files, without
    comments and docstrings."""
    torch: str
    threads: int
    flags: dict[str, bool | int | str | None]
    """Of torch: deterministic, cudnn_benchmark, tf32, float32_matmul_precision."""


class Cost(Frozen):
    """What a method costs, at a stated resolution."""

    parameters: Count
    attention_parameters: Count
    resolution: Annotated[int, Field(ge=1, le=1 << 20)]
    """Side in pixels of the square image for which macs is stated."""
    macs: Count | None
    """Closed form, one forward of one image; None where the method states none."""
    macs_counted: Count | None
    macs_needed: Count | None = None
    """What the definition of the attention needs, where its implementation executes more; None: not more."""
    macs_note: str | None
    """None where closed form and counters agree; otherwise what differs, and which operators have no formula."""
    train_peak_bytes: Bytes | None
    """Peak memory of one training step, above what was allocated before it."""
    memory_note: str | None
    calibration_seconds: Seconds | None = None
    """Seconds of a fixed piece of work on the same device in the same minute: the time of a step divided by it can be
    compared between machines."""
    step_seconds: Seconds | None = None
    """Of a training step on a whole batch: median, measured before training with no other run under way, all methods in
    turn; on the CPU, processor time. None: not measured."""

    @model_validator(mode="after")
    def _attention_is_part(self) -> Self:
        if self.attention_parameters > self.parameters:
            raise ValueError(
                f"{self.attention_parameters} parameters in the attention are more than the {self.parameters} in all"
            )
        return self

    @property
    def stated_macs(self) -> int | None:
        """The closed form, or where the method states none the count."""
        return self.macs if self.macs is not None else self.macs_counted


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
    validation_sets: dict[str, str] = Field(default_factory=dict)
    """Likewise of the sets that the learning curve is measured on."""
    environment: Environment
    source: dict[str, str] | None = None
    """Digests of the source that decides the numbers, as in `Numerics`; None in runs made before they were recorded."""
    cost: Cost | None = None
    """Of a network with given weights; that of a trained one is in training.json."""

    @field_validator("recipe", mode="before")
    @classmethod
    def _threads_were_not_fixed(cls, recipe: Any) -> Any:
        """Runs made before recipes had the key `threads` used as many as torch chose."""
        return {"threads": None, **recipe} if isinstance(recipe, dict) else recipe


class Training(Frozen):
    """training.json"""

    schema_version: Literal[1] = 1
    steps: Annotated[int, Field(ge=1)]
    seconds: Seconds
    seconds_per_step: Seconds
    """Median over the intervals between log lines, data loading included; other runs may have been under way."""
    contended: Annotated[float, Field(ge=0)] | None = None
    """Share of the training time that threads waited for a processor: above a few hundredths, other processes slowed
    the steps. None: not recorded."""
    loss: float
    """Mean over the last interval of the log."""
    weights_sha256: str
    log_sha256: str | None = None
    """Of log.csv; None in runs that were made before it was kept."""
    cost: Cost
    notes: Mapping[str, Any] = Field(default_factory=dict)
    """What the method's `report` returned after training, e.g. the recall of its retrieval."""


class Score(Frozen):
    """One image."""

    image: str
    psnr: float | None
    """dB; None where restored and clean are equal (infinite)."""
    ssim: float
    lpips: float | None
    seconds: Seconds


class Evaluation(Frozen):
    """eval/*.json: one test set at one sigma under one protocol."""

    schema_version: Literal[1] = 1
    key: str
    """Of the run."""
    data_set: str
    data_sha256: str
    """Of the images; also of the degradation, where the task generates it and has no sigma."""
    sigma: float | None
    """In 8-bit grey levels; None where the task has one condition."""
    protocol: Protocol
    stamp: Stamp
    numerics: Numerics | None = None
    """Of the scoring; None in evaluations made before it was recorded."""
    lpips_note: str | None
    """Why LPIPS was not computed; None where it was, or was not requested."""
    scores: Annotated[tuple[Score, ...], Field(min_length=1)]

    @property
    def condition(self) -> str:
        """What follows the data set's name: `σ25`, or nothing."""
        return condition(self.sigma)

    @property
    def mean_psnr(self) -> float:
        """Mean over images, dB; infinite where an image was restored exactly."""
        return math.fsum(math.inf if s.psnr is None else s.psnr for s in self.scores) / len(self.scores)

    def same_scores(self, other: Evaluation) -> bool:
        """Whether PSNR and SSIM of every image are equal, in the same order."""
        mine, theirs = ([(score.image, score.psnr, score.ssim) for score in of.scores] for of in (self, other))
        return mine == theirs

    @property
    def mean_ssim(self) -> float:
        """Mean over images."""
        return math.fsum(score.ssim for score in self.scores) / len(self.scores)


class Trial(Frozen):
    """One method trained at one learning rate."""

    method: str
    lr: Annotated[float, Field(gt=0)]
    psnr_db: float | None
    """Mean over the validation images; None where the training diverged."""
    key: str
    """Of the stored run."""
    variant: str = ""
    """Digest of the attention (a file's content) and its settings; empty where the training diverged, and in records
    of earlier versions."""


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
    shared: dict[str, Any] = Field(default_factory=dict)
    """`shared_with_search` of every trial. Empty in records of earlier versions."""

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


def shared_with_search(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that a search of rates for it must have: task, training images, backbone, recipe.

    Without the rate itself, and what says where a run was made.
    """
    found = {key: value for key, value in identity.items() if key not in ("attention", "settings", "seed", "device")}
    recipe = {key: value for key, value in identity["recipe"].items() if key not in ("lr", "threads")}
    return found | {"recipe": recipe}


class Origin(Frozen):
    """origin.json: where a run came from that was imported; runs made here have none."""

    schema_version: Literal[1] = 1
    key: str
    """Of the run."""
    by: By
    """Who ran it, as its export states."""
    archive_sha256: str
    imported: str
    """UTC, ISO 8601."""


class Failure(Frozen):
    """failed.json: why the run is not complete; deleted when it is."""

    schema_version: Literal[1] = 1
    key: str
    message: str
    when: str
    """UTC, ISO 8601."""
    traceback: str | None = None
    """Python's, of the exception; None in records made before it was kept."""


class Owner(Frozen):
    """.owner: the process that works on a run. Still there after a process that was killed."""

    schema_version: Literal[1] = 1
    pid: int
    host: str
    started: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.started})"


class Progress(Frozen):
    """progress.json: how far a running cell is; information only, deleted when the run is done."""

    schema_version: Literal[1] = 1
    phase: Literal["training", "scoring"]
    done: int
    """Steps, or images."""
    total: int
    seconds_left: float | None
    updated: float
    """Seconds since the epoch."""
    host: str


def host_name() -> str:
    """The machine's name, as records and locks state it."""
    return platform.node()


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(model: type[Record], path: Path, mend: str = MEND) -> Record:
    """Read and validate a record; the file is not trusted. Raises InputError where it is not such a record.

    mend: what to do about one that is damaged.
    """
    try:
        if not path.is_file():  # a pipe would be waited on forever
            raise InputError(f"{path} is not a file; {mend}.")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is larger than {LARGEST >> 20} MiB, too large for a record; {mend}.")
        raw = json.loads(path.read_bytes())
        stated = raw.pop("sha256", None) if isinstance(raw, dict) else None
        found = digest(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); {mend}.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        newer = isinstance(version, int) and version > SCHEMA
        advice = "a newer kitbench wrote it: update kitbench" if newer else f"it is not a record of kitbench: {mend}"
        raise InputError(f"{path} has schema version {str(version)[:20]!r}, this kitbench reads {SCHEMA}; {advice}.")
    if stated not in (None, found):
        raise InputError(
            f"{path} is damaged or was edited: its content does not match the checksum stated in it; {mend}."
        )
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{path} is not a valid record: {place}: {said_of(fault)}; {mend}.") from error
