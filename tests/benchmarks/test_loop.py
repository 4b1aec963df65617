"""benchmarks/loop.py: run as small as it can be, and what it prints of figures of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def loop(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "loop.py", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_smallest_loop_is_measured_and_its_waiting_told(tmp_path: Path) -> None:
    printed = loop(tmp_path, "--preset", "smoke", "--stretches", "3", "--methods", "conv", "--json", "found.json",
                   "--set", "recipe.channels_last=false")  # fmt: skip
    stored = json.loads((tmp_path / "found.json").read_text())
    found = stored["methods"]["conv"]
    assert 0 < found["waiting"] < 1
    assert found["share"] > 0
    assert found["gpu_state"] is None
    assert f"{found['waiting']:.1%}" in printed
    assert "preset smoke, recipe.channels_last=false." in printed
    assert "Aim" not in printed, "the aims are of a GPU"


def test_the_aims_of_a_gpu_are_judged_by_the_stored_figures(tmp_path: Path) -> None:
    figures = {"quartiles": [0.9, 1.0], "of": "time", "waiting": 0.02, "stretches": [0.96] * 5, "gpu_state": None}
    methods = {
        "kit": figures | {"share": 0.96, "seconds": 0.05},
        "window": figures | {"share": 0.94, "seconds": 0.11},
        "conv": figures | {"share": 0.99, "seconds": 0.05, "of": "processor time"},
    }
    stored = {"device": "A GPU", "threads": 1, "torch": "2.11", "preset": "full", "stretch": 10, "methods": methods}
    (tmp_path / "gpu.json").write_text(json.dumps(stored))
    lines = loop(tmp_path, "--markdown", "--json", "gpu.json").splitlines()
    assert "Aim: at least 95% of the bare loop, and 10 steps per second." in lines
    assert "- kit: 96.0%, reached; 20.0 steps per second, reached" in lines
    assert "- window: 94.0%, not reached; 9.1 steps per second, not reached" in lines
    assert (
        "- conv: 99.0%, but in processor time, which says nothing of a GPU's; 20.0 steps per second, reached" in lines
    )


def test_a_setting_that_there_is_not_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert "recipe.channel_last" in loop(tmp_path, "--set", "recipe.channel_last=false", code=2)


def test_a_device_that_is_not_there_is_refused_in_a_sentence(tmp_path: Path) -> None:
    assert "--device cuda:77 was asked for" in loop(tmp_path, "--device", "cuda:77", code=2)
