"""tools/gpu.sh: the steps that it would take, and one of them taken, as small as it can be and without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

from tests.conftest import ROOT, run_kitbench

ONE = {"KITBENCH_GPU_METHODS": "conv"}


def gpu(out: Path, *arguments: str, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [ROOT / "tools" / "gpu.sh", out, *arguments], capture_output=True, text=True, timeout=250,
        env=os.environ | {"PYTHON": sys.executable, "TMPDIR": str(out.parent), "KITBENCH_DATA": ""} | ONE | environment,
    )  # fmt: skip
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_steps_are_every_method_with_three_seeds_and_what_is_measured_on_a_gpu(tmp_path: Path) -> None:
    lines = gpu(tmp_path / "out", "--dry-run", KITBENCH_GPU_METHODS="").splitlines()
    kinds = ("bfloat16", "float32", "tf32")
    expected = [
        "machine",
        "tests-kernels",
        "tests-commands",
        "attention-bfloat16-c32-k4",
        "train-0",
        "scale",
        "train-1",
    ]
    expected += ["train-2", "attention-float32-c32-k4", "attention-tf32-c32-k4", "loop", "loop-contiguous"]
    expected += [f"attention-{kind}-{shape}" for kind in kinds for shape in ("c64-k4", "c32-k8", "c64-k8")]
    assert [line.partition(":")[0] for line in lines] == expected
    assert all(int(line.split("at most ")[1].split()[0]) <= 540 for line in lines)
    assert all("--method kit,global,window,local,kit-random,conv --seeds" in line for line in lines if "train-" in line)
    assert not (tmp_path / "out").exists()


def test_a_step_leaves_one_archive_that_the_next_call_goes_on_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "1 done, 0 failed, 0 left" in gpu(out, "--smoke", "--only", "train-0")
    assert "train-0: done before" in gpu(out, "--smoke", "--only", "train-0")
    assert sorted(path.name for path in out.iterdir()) == ["done.txt", "train-0.tar.gz"]
    with tarfile.open(out / "train-0.tar.gz") as archive:
        assert not [name for name in archive.getnames() if name.endswith((".safetensors", ".lock"))]
        archive.extractall(tmp_path / "runs", filter="data")
    assert "conv" in run_kitbench(tmp_path, "table", "runs", "--format", "csv").stdout


def test_a_failed_step_is_tried_again_behind_the_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "done.txt").write_text("machine\nfailed tests-kernels\n")
    listed = ("--done", str(tmp_path / "done.txt"))
    lines = [line.partition(":")[0] for line in gpu(out, "--smoke", "--dry-run", *listed).splitlines()]
    assert (lines[0], lines[1], lines[-1]) == ("machine", "tests-commands", "tests-kernels")


def test_a_failed_step_leaves_its_log_and_is_tried_again(tmp_path: Path) -> None:
    out, small = tmp_path / "out", ("--smoke", "--only", "train-0")
    assert "1 failed" in gpu(out, *small, code=3, KITBENCH_GPU_STEPS="0")
    assert "recipe.steps" in (out / "train-0.failed.log").read_text()
    assert "1 done" in gpu(out, *small)
    assert sorted(path.name for path in out.iterdir()) == ["done.txt", "train-0.tar.gz"]


def test_a_python_without_kitbench_is_told(tmp_path: Path) -> None:
    assert "kitbench is not installed" in gpu(tmp_path / "out", code=2, PYTHON="false")


def test_what_is_done_is_known_from_a_list_where_the_folder_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "done.txt").write_text("machine\ntrain-0\n")
    listed = ("--done", str(tmp_path / "done.txt"))
    told = gpu(tmp_path / "out", "--smoke", "--only", "train-0", *listed)
    assert "train-0: done before" in told
    listing = (tmp_path / "out" / "done.txt").read_text().splitlines()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    assert listing == [f"# device {card}", "machine", "train-0"]
    (tmp_path / "done.txt").write_text("# device another GPU\nmachine\n")
    assert "is of another GPU, and this is" in gpu(tmp_path / "other", "--smoke", *listed, code=2)
    assert "machine: done before" in gpu(tmp_path / "new", "--dry-run", *listed)
    assert "does not exist" in gpu(tmp_path / "new", "--done", str(tmp_path / "none.txt"), code=2)


def test_without_a_gpu_the_first_step_fails_and_nothing_is_begun_behind_it(tmp_path: Path) -> None:
    told = gpu(tmp_path / "out", code=3, CUDA_VISIBLE_DEVICES="")
    assert "machine: failed" in told
    assert "no GPU" in told
    assert "tests-kernels" not in told
    left = ["done.txt", "machine.failed.log", "machine.failed.tar.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left
    assert "failed machine" in (tmp_path / "out" / "done.txt").read_text()


def test_a_skipped_gpu_test_fails_where_a_gpu_is_required(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "-m", "gpu"]
    command.append("tests/cost/test_timing.py")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--require-gpu"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout
    assert "a GPU is required" in done.stdout
    assert subprocess.run(command, cwd=ROOT, capture_output=True, env=environment).returncode == 0
