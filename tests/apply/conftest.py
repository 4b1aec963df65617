"""What the tests of exported and imported runs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kitbench.cli.main import cli
from tests.stored import store_whole


def invoke(*arguments: object, code: int = 0) -> Result:
    """The command line, in this process; a failure is one sentence."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    if code:
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.output
    return done


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A stranger's folder: kit, two seeds."""
    for seed in (0, 1):
        store_whole(tmp_path / "theirs", "kit", seed)
    return tmp_path / "theirs"
