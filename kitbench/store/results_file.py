"""The results file: one row per run, test set, condition and protocol, as CSV or Parquet, for other people's tools.

`Result` is its schema (schemas/result.json); every row states its version. A value that was not measured is empty in
CSV and null in Parquet. Means are over the images of the set.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import ValidationError

from kitbench.errors import InputError
from kitbench.spec.fields import Frozen, Mode
from kitbench.spec.messages import said_of
from kitbench.store.files import replace_with
from kitbench.store.folder import RunFolder
from kitbench.store.records import By, Evaluation


class Result(Frozen):
    """A row of a results file."""

    schema_version: Literal[1] = 1
    run: str
    """The run's key."""
    comparison: str
    """What runs share that may be compared; empty for a run without training."""
    run_by: By | None
    """Who made an imported run."""
    suite: str
    preset: str
    task: str
    mode: Mode
    method: str
    attention: str
    """Name of a shipped method, or SHA-256 of the file."""
    settings: str
    """JSON."""
    seed: int | None
    recipe: str | None
    steps: int | None
    device: str
    data_set: str
    data_sha256: str
    sigma: float | None
    """8-bit grey levels."""
    protocol: str
    images: int
    psnr_db: float | None
    """Null where an image was restored exactly."""
    ssim: float
    lpips: float | None
    parameters: int | None
    macs: int | None
    """Of one forward pass at `resolution` px."""
    resolution: int | None
    train_peak_bytes: int | None
    step_seconds: float | None
    training_seconds: float | None
    commit: str | None
    torch: str | None
    threads: int
    host: str
    started: str
    """UTC, ISO 8601."""


INTEGERS = ("seed", "steps", "parameters", "macs", "resolution", "train_peak_bytes")
"""Columns of integers that may be empty, which pandas would turn into fractions."""


def results(runs: Sequence[RunFolder]) -> list[Result]:
    """A row for every evaluation of these runs, by run; of a run that is in two folders, from the first.

    Raises InputError where there is none, or where two copies of a run have unequal scores.
    """
    found: list[Result] = []
    first: dict[tuple[str, str, str, float | None, str], Evaluation] = {}
    for folder in runs:
        for row, evaluation in _rows(folder):
            place = (row.run, row.method, row.data_set, row.sigma, row.protocol)
            if place not in first:
                first[place] = evaluation
                found.append(row)
            elif not first[place].same_scores(evaluation):
                raise InputError(
                    f"Run {row.run[:10]} is in two of these folders, with unequal scores on {row.data_set}; give one "
                    f"of them, and compare them with `kitbench diff`."
                )
    if not found:
        raise InputError("These runs have no evaluation yet; let `kitbench run` finish first.")
    return found


def _rows(folder: RunFolder) -> Iterator[tuple[Result, Evaluation]]:
    """Each row with the evaluation that it is of."""
    run, training, origin = folder.run, folder.training, folder.origin
    cost, environment = training.cost if training else run.cost, run.environment
    for evaluation in folder.evaluations():
        psnr = evaluation.mean_psnr
        row = Result(
            run=run.key, comparison=run.comparison, run_by=origin.by if origin else None, suite=run.suite,
            preset=run.preset, task=run.task.kind, mode=run.mode, method=run.method, attention=run.attention,
            settings=json.dumps(run.settings, sort_keys=True), seed=run.seed, device=run.device,
            recipe=run.recipe.name if run.recipe else None, steps=run.recipe.steps if run.recipe else None,
            data_set=evaluation.data_set, data_sha256=evaluation.data_sha256, sigma=evaluation.sigma,
            protocol=evaluation.stamp, images=len(evaluation.scores), psnr_db=psnr if math.isfinite(psnr) else None,
            ssim=evaluation.mean_ssim, lpips=_lpips(evaluation), parameters=cost.parameters if cost else None,
            macs=cost.stated_macs if cost else None, resolution=cost.resolution if cost else None,
            train_peak_bytes=cost.train_peak_bytes if cost else None, step_seconds=cost.step_seconds if cost else None,
            training_seconds=training.seconds if training else None, commit=environment.commit,
            torch=environment.versions.get("torch"), threads=environment.threads, host=environment.host,
            started=environment.started,
        )  # fmt: skip
        yield row, evaluation


def _lpips(evaluation: Evaluation) -> float | None:
    known = [score.lpips for score in evaluation.scores if score.lpips is not None]
    return math.fsum(known) / len(known) if len(known) == len(evaluation.scores) else None


def write_results(found: Sequence[Result], path: Path) -> None:
    """Write a results file, .csv or .parquet by its name. Raises InputError for another name, or without pyarrow."""
    table = pd.DataFrame([row.model_dump() for row in found], columns=list(Result.model_fields))
    table = table.astype(dict.fromkeys(INTEGERS, "Int64"))
    table = table.astype(dict.fromkeys(_fractions(), "Float64"))
    if path.suffix.lower() == ".csv":
        replace_with(path, lambda temporary: table.to_csv(temporary, index=False, lineterminator="\n"))
        return
    if path.suffix.lower() != ".parquet":
        raise InputError(f"{path} is not the name of a results file; give one that ends in .csv or .parquet.")
    _require_pyarrow()
    replace_with(path, lambda temporary: table.to_parquet(temporary, engine="pyarrow", index=False))


def read_results(path: Path) -> list[Result]:
    """The rows of a results file. Raises InputError where it is none, or has another version."""
    try:
        rows = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a results file ({error}); give another file.") from error
    if not rows:
        raise InputError(f"{path} has no row of results; give another file.")
    for number, row in enumerate(rows, 1):
        if (version := str(row.get("schema_version"))) != "1":
            raise InputError(
                f"{path}, row {number}, has schema version {version[:20]}, this kitbench reads 1; update kitbench, or "
                "give another file."
            )
    try:
        return [Result.model_validate(row | {"schema_version": 1}) for row in rows]
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{path} is not a results file: {place}: {said_of(fault)}; give another file.") from error


def _csv(path: Path) -> list[dict[str, Any]]:
    """The rows as text; None for what is empty and may be."""
    may_be_empty = {name for name, field in Result.model_fields.items() if "None" in str(field.annotation)}
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark of the encoding first
        return [
            {key: None if value == "" and key in may_be_empty else value for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _parquet(path: Path) -> list[dict[str, Any]]:
    _require_pyarrow()
    table = pd.read_parquet(path, engine="pyarrow", dtype_backend="numpy_nullable")
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()} for row in table.to_dict("records")
    ]


def _fractions() -> list[str]:
    return [name for name, field in Result.model_fields.items() if "float" in str(field.annotation)]


def _require_pyarrow() -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError(
            "Parquet needs the package pyarrow, which is not installed: pip install pyarrow, or give a .csv."
        )
