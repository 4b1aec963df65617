"""tools/gpu.sh: the steps that it would take, and one of them taken, as small as it can be and without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.conftest import ROOT, run_kitbench


def gpu(out: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [ROOT / "tools" / "gpu.sh", out, *arguments], capture_output=True, text=True, timeout=250,
        env=os.environ | {"PYTHON": sys.executable, "TMPDIR": str(out.parent), "KITBENCH_DATA": ""} | environment,
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_steps_are_every_method_with_three_seeds_and_what_is_measured_on_a_gpu(tmp_path: Path) -> None:
    lines = gpu(tmp_path / "out", "--dry-run").splitlines()
    methods = ("kit", "global", "window", "local", "kit-random", "conv")
    expected = ["machine", "tests", "attention", "loop", "scale"]
    expected += [f"train-{method}-{seed}" for seed in range(3) for method in methods]
    assert [line.partition(":")[0] for line in lines] == expected
    assert all(int(line.split("at most ")[1].split()[0]) <= 540 for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_step_leaves_one_archive_that_the_next_call_goes_on_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "1 done, 0 failed, 0 left" in gpu(out, "--smoke", "--only", "train-conv-0")
    assert "train-conv-0: done before" in gpu(out, "--smoke", "--only", "train-conv-0")
    assert [path.name for path in out.iterdir()] == ["train-conv-0.tar.gz"]
    with tarfile.open(out / "train-conv-0.tar.gz") as archive:
        assert not [name for name in archive.getnames() if name.endswith((".safetensors", ".lock"))]
        archive.extractall(tmp_path / "runs", filter="data")
    assert "conv" in run_kitbench(tmp_path, "table", "runs", "--format", "csv").stdout


def test_a_failed_step_leaves_its_log_and_is_tried_again(tmp_path: Path) -> None:
    out, small = tmp_path / "out", ("--smoke", "--only", "train-conv-0")
    assert "1 failed" in gpu(out, *small, code=3, KITBENCH_GPU_STEPS="0")
    assert "recipe.steps" in (out / "train-conv-0.failed.log").read_text()
    assert "1 done" in gpu(out, *small)
    assert [path.name for path in out.iterdir()] == ["train-conv-0.tar.gz"]


def test_a_python_without_kitbench_is_told(tmp_path: Path) -> None:
    assert "kitbench is not installed" in gpu(tmp_path / "out", code=2, PYTHON="false")
