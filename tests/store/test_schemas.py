"""The shipped JSON Schemas are those of the models, and the stored runs keep to them."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.stored import store
from tools.schemas import RECORDS, schema, text


@pytest.mark.parametrize("name", RECORDS)
def test_shipped_schemas_are_current(name: str) -> None:
    """Fails where a record has changed: then run tools/schemas.py."""
    assert resources.files("kitbench.store.schemas").joinpath(f"{name}.json").read_text("utf-8") == text(name)


def test_what_is_written_has_the_properties_of_its_schema_and_no_other(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.0)
    folder.fail("0", "said so")
    [evaluation] = (folder.path / "eval").iterdir()
    for name, path in (
        ("run", folder.path / "run.json"),
        ("training", folder.path / "training.json"),
        ("evaluation", evaluation),
        ("failed", folder.path / "failed.json"),
    ):
        assert json.loads(path.read_text()).keys() == schema(name)["properties"].keys()


def test_stored_reference_runs_keep_to_the_schemas() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    files = {"run": "*/run.json", "training": "*/training.json", "evaluation": "*/eval/*.json"}
    for name, pattern in files.items():
        found = list((ROOT / "results" / "reference").glob(f"*/{pattern}"))
        assert found
        validator = jsonschema.validators.validator_for(schema(name))(schema(name))
        for path in found:
            validator.validate(json.loads(path.read_text()))
