"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kitbench.cli.main import cli
from tests.conftest import TINY


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds tiny.toml, and the present one."""
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KITBENCH_DATA", raising=False)
    return tmp_path


def call(*arguments: str, code: int = 0) -> Result:
    """The command line, in this process."""
    done = CliRunner().invoke(cli, list(arguments))
    assert done.exit_code == code, (done.output, done.exception)
    return done
