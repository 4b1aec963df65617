"""Writes kitbench/store/schemas/*.json from the models that write and read the records. Run it where a model has
changed.

python tools/schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kitbench.spec.fields import Frozen
from kitbench.store.archive import Manifest
from kitbench.store.records import Evaluation, Failure, Origin, Run, Training, Tuning
from kitbench.store.results_file import Result
from kitbench.store.sweeps import Sweep
from kitbench.verdict.reference import Reference

FOLDER = Path(__file__).parent.parent / "kitbench" / "store" / "schemas"
RECORDS: dict[str, tuple[type[Frozen], str]] = {
    "run": (Run, "run.json of a run's folder: what decides its numbers, and where it was made"),
    "training": (Training, "training.json of a run's folder: what the training cost"),
    "evaluation": (Evaluation, "eval/*.json of a run's folder: scores of one test set"),
    "failed": (Failure, "failed.json of a run's folder: why it is not complete"),
    "tuning": (Tuning, "tuning.json of a folder of runs: learning rates tried for every method, and the best of each"),
    "origin": (Origin, "origin.json of a run's folder: who made a run that was imported"),
    "manifest": (Manifest, "manifest.json of an archive of runs"),
    "result": (Result, "a row of a results file: one run on one test set under one condition"),
    "sweep": (Sweep, "scale.json: cost against resolution"),
    "reference": (Reference, "what `kitbench check` compares with"),
}
WITH_CHECKSUM = ("run", "training", "evaluation", "failed", "tuning", "origin")


def schema(name: str) -> dict[str, Any]:
    """The schema of a record as a tree of JSON values."""
    model, description = RECORDS[name]
    made = model.model_json_schema()
    made["description"] = description
    if name in WITH_CHECKSUM:
        made["properties"]["sha256"] = {
            "description": "SHA-256 of the record without this key, as JSON with sorted keys, no spaces, ASCII only",
            "pattern": "^[0-9a-f]{64}$",
            "type": "string",
        }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def text(name: str) -> str:
    return json.dumps(schema(name), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    for name in RECORDS:
        (FOLDER / f"{name}.json").write_text(text(name))
