"""What is recorded of the machine, where it tells, and where it does not."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kitbench
from kitbench.system.environment import STATE, commit, gpu_state

CUDA = torch.device("cuda", 0)


def test_a_checkout_that_git_tells_nothing_of_is_not_recorded_as_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(kitbench, "__file__", str(tmp_path / "kitbench" / "__init__.py"))
    (tmp_path / ".git").mkdir()
    for status, expected in (("true", "0123abc"), ("echo ' M kitbench/x.py'", "0123abc+dirty"), ("exit 128", None)):
        script(tmp_path / "git", f'case "$*" in *status*) {status} ;; *) echo 0123abc ;; esac')
        assert commit() == expected


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a made-up nvidia-smi, first on the path, and a made-up device that it is asked for."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return tmp_path / "nvidia-smi"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_state_is_read_of_the_device_while_the_load_runs(smi: Path) -> None:
    started = smi.with_name("load")
    script(
        smi,
        f"""while [ ! -e {started} ]; do sleep 0.01; done
case "$*" in *--id=GPU-12-34*) echo '1980, 1980, 2619, 612.5, 700.00, 55, 100, [N/A]' ;; esac""",
    )
    found = gpu_state(CUDA, started.touch)
    assert found == dict(zip(STATE, (1980, 1980, 2619, 612.5, 700, 55, 100, None), strict=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo No devices were found; exit 6", "nvidia-smi ended with exit code 6: No devices were found"),
        ("echo 1980, 1980", "nvidia-smi ended with exit code 0: 1980, 1980"),
    ],
)
def test_where_the_state_cannot_be_read_the_record_says_why(smi: Path, text: str, reason: str) -> None:
    script(smi, text)
    found = gpu_state(CUDA)
    assert found.pop("reason") == reason
    assert found == dict.fromkeys(STATE)


def test_a_machine_without_nvidia_smi_is_told(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(smi.parent))
    assert "FileNotFoundError" in str(gpu_state(CUDA)["reason"])


def test_a_load_that_fails_is_not_hidden(smi: Path) -> None:
    script(smi, "exec sleep 60")

    def load() -> None:
        raise ArithmeticError("lost")

    with pytest.raises(ArithmeticError):
        gpu_state(CUDA, load)
