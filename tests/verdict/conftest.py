"""One real run of the tiny suite, two seeds, for everything that needs weights, crops and logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TINY, run_kitbench


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: kit and conv, seeds 0 and 1, and the input. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.toml").write_text(TINY)
    run_kitbench(folder, "run", "--suite", "tiny.toml", "--seeds", "0,1", "--out", "runs")
    return folder / "runs"
