"""What the tests share: the environment of the command line, a tiny suite, and the real images where they are present."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests themselves run in parallel
os.environ.setdefault("KITBENCH_JOBS", "1")  # but for the tests of side-by-side runs
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest
import torch

from tests import forked

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels run without a GPU

ROOT = Path(__file__).parent.parent

TINY = """
name = "tiny"
title = "as small as a suite can be"
default_preset = "only"
references = ["input"]
protocol = { from = "awgn8", lpips = "none" }
seeds = [0]
[task]
kind = "denoise"
sigma_train = [10, 55]
sigma_test = [25]
[data.embedded]
modes = ["colour"]
colour = { train = ["skimage-train"], test = ["skimage-test"] }
gray = { train = ["skimage-train"], test = ["skimage-gray"] }
[data.folder]
modes = ["colour", "gray"]
colour = { train = ["BSDS500"], test = ["CBSD68", "Kodak24"] }
gray = { train = ["BSDS500-399"], test = ["Set12"] }
[backbone]
width = 8
head_dim = 8
blocks = [1, 1]
attention_levels = [2]
[methods.kit]
patch = 4
[methods.conv]
[presets.only]
recipe = { from = "smoke", steps = 12, batch = 2, crop = 32, checkpoint_every = 4 }
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a test marked gpu fails where it is skipped")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file with the longest tests first: as the last one it keeps one worker busy for minutes after the others."""
    items.sort(key=lambda item: item.path.name != "test_cuda.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--require-gpu") and item.get_closest_marker("gpu"):
        report.outcome, report.longrepr = "failed", f"skipped, where a GPU is required: {report.longrepr}"
    return report


Kitbench = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The real benchmark images: KITBENCH_DATA, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("KITBENCH_DATA", ROOT.parent / "shared" / "data"))
    if not (root / "CBSD68").is_dir():
        pytest.skip(f"real images are not in {root}; name their folder in KITBENCH_DATA")
    return root


def run_kitbench(
    folder: Path, *arguments: str, code: int | None = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m kitbench ARGUMENTS` as a user types it, in a folder; fails the test on another exit code or a traceback."""
    present = {k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"} | {"OMP_NUM_THREADS": "1"} | environment
    if all(name.startswith("KITBENCH_") for name in environment):
        done = forked.command(folder, arguments, present, timeout=280)
    else:  # it may have to be there before anything is imported
        command = [sys.executable, "-m", "kitbench", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, env=present)
    assert "Traceback" not in done.stderr, done.stderr
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def kitbench(tmp_path: Path) -> Kitbench:
    """The real command line in a temporary folder that holds tiny.toml."""
    (tmp_path / "tiny.toml").write_text(TINY)
    return lambda *arguments, code=0, **environment: run_kitbench(tmp_path, *arguments, code=code, **environment)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: kit and conv, seeds 0 and 1, and the input. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.toml").write_text(TINY)
    run_kitbench(folder, "run", "--suite", "tiny.toml", "--seeds", "0,1", "--out", "runs")
    return folder / "runs"
