"""Cells side by side: the same bits as one after another, whatever happens to a worker or to its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy
import torch
from PIL import Image
from skimage import data as photographs

from kitbench.errors import InputError
from kitbench.runs import workers
from kitbench.runs.announce import expected, makespan
from kitbench.runs.prepare import Options, PreparedSuite, prepare
from kitbench.runs.probe import Probe
from kitbench.runs.train import validation_steps
from kitbench.scoring.validation import validation_pixels
from kitbench.spec import loading
from kitbench.store.records import Cost
from tests.cli.test_cli import USERS_OWN, numbers, runs
from tests.conftest import TINY, Kitbench, run_kitbench

LONGER = TINY.replace("steps = 12", "steps = 120").replace("checkpoint_every = 4", "checkpoint_every = 10")
LONGER = LONGER.replace("seeds = [0]", "seeds = [0, 1]")
READ_WHEN_TOLD = f"""import pathlib, time
while list(pathlib.Path("results/.launch").glob("worker-*")) and not pathlib.Path("told").exists():
    time.sleep(0.01)
{USERS_OWN.replace("mine:", "first:").lstrip()}"""
"""A method's file that a worker stays at until the file `told` is there: what follows it is read after that."""
COMMAND = [sys.executable, "-m", "kitbench", "run", "--suite", "tiny.toml"]


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The numbers of every run of LONGER, made one after another."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "tiny.toml").write_text(LONGER)
    run_kitbench(folder, "run", "--suite", "tiny.toml", "--jobs", "1")
    return {name: numbers(run) for name, run in runs(folder / "results").items()}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    (folder / "tiny.toml").write_text(LONGER)
    return subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"KITBENCH_DATA": ""},
    )  # fmt: skip


def made(folder: Path) -> dict[str, object]:
    return {name: numbers(run) for name, run in runs(folder / "results").items()}


def until(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained_by(folder: Path, launcher: subprocess.Popen[str]) -> psutil.Process | None:
    """The worker that trains the run whose checkpoint is there, by the owner that its lock names."""
    for owner in folder.glob("results/*/.owner"):
        if (owner.parent / "checkpoint.safetensors").is_file():
            try:
                pid = int(owner.read_text().split('"pid": ')[1].split(",")[0])
            except (OSError, IndexError):
                continue
            if pid != launcher.pid:
                return psutil.Process(pid)
    return None


def test_any_number_of_workers_gives_the_same_bits_and_the_same_table(
    tmp_path: Path, one_after_another: dict[str, object]
) -> None:
    launcher = start(tmp_path, "--jobs", "3")
    out, err = launcher.communicate(timeout=250)
    assert launcher.returncode == 0, err
    assert "3 worker processes, 1 thread each" in out
    assert made(tmp_path) == one_after_another
    table = run_kitbench(tmp_path, "table", "results").stdout
    assert table.splitlines()[0] in out
    assert "5 done" in run_kitbench(tmp_path, "status", "results").stdout
    assert not list(tmp_path.glob("results/.launch/*"))


def test_a_killed_worker_loses_nothing_and_another_goes_on_with_its_cell(
    tmp_path: Path, one_after_another: dict[str, object]
) -> None:
    launcher = start(tmp_path, "--jobs", "2")
    until(lambda: trained_by(tmp_path, launcher), launcher)
    victim = trained_by(tmp_path, launcher)
    seen = run_kitbench(tmp_path, "status", "results").stdout
    assert victim is not None
    victim.kill()
    out, err = launcher.communicate(timeout=250)
    assert launcher.returncode == 0, err
    assert "running" in seen
    assert "was killed (SIGKILL); another goes on with it" in out
    assert made(tmp_path) == one_after_another


def test_a_worker_that_is_killed_while_it_has_nothing_to_do_takes_nothing_along(tmp_path: Path) -> None:
    launcher = start(tmp_path, "--jobs", "2", "--seeds", "0")
    until(lambda: trained_by(tmp_path, launcher), launcher)
    busy = trained_by(tmp_path, launcher)
    assert busy is not None
    busy.suspend()
    workers = [
        process for process in psutil.Process(launcher.pid).children(recursive=True) if process.ppid() != launcher.pid
    ]
    until(lambda: run_kitbench(tmp_path, "status", "results").stdout.count("done  ") >= 2, launcher)
    time.sleep(1)
    [idle] = [process for process in workers if process.pid != busy.pid]
    idle.kill()
    time.sleep(1)
    busy.resume()
    _, err = launcher.communicate(timeout=250)
    assert launcher.returncode == 0, err
    assert "3 done" in run_kitbench(tmp_path, "status", "results").stdout


def test_a_cell_whose_worker_is_killed_three_times_fails_and_its_run_says_so(tmp_path: Path) -> None:
    dies = "import os\n        os.kill(os.getpid(), 9) if os.path.exists('armed') else None\n        return self.gain"
    (tmp_path / "dies.py").write_text(USERS_OWN.replace("return self.gain", dies))
    launcher = start(tmp_path, "--jobs", "2", "--method", "dies.py", "--method", "conv", "--seeds", "0")
    until(lambda: list(tmp_path.glob("results/.launch/worker-*")), launcher)
    (tmp_path / "armed").touch()
    _, err = launcher.communicate(timeout=250)
    assert launcher.returncode == 3
    assert "was killed (SIGKILL), 3 times" in err
    status = run_kitbench(tmp_path, "status", "results").stdout
    assert "1 failed" in status
    assert "(SIGKILL), 3 times" in " ".join(status.split())
    assert "2 done" in status


@pytest.mark.parametrize("changed", ["mine.py", "pictures"])
def test_what_is_changed_after_it_was_checked_is_not_scored_under_the_key_of_what_was(
    changed: str, tmp_path: Path
) -> None:
    (tmp_path / "first.py").write_text(READ_WHEN_TOLD)
    (tmp_path / "mine.py").write_text(USERS_OWN)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(photographs.chelsea()[:64, :64]).save(tmp_path / "pictures" / "b.png")
    methods = ("--method", "first.py", "--method", "mine.py")
    launcher = start(tmp_path, "--jobs", "2", *methods, "--test-set", "./pictures", "--seeds", "0")
    until(lambda: list(tmp_path.glob("results/.launch/worker-*")), launcher)
    if changed == "mine.py":
        (tmp_path / "mine.py").write_text(USERS_OWN + "# another method\n")
    else:
        Image.fromarray(photographs.astronaut()[:64, :64]).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "told").touch()
    _, err = launcher.communicate(timeout=250)
    assert launcher.returncode == 3
    assert "have changed since this command checked them; give it again" in err
    assert not list(tmp_path.glob("results/*mine*/eval/*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_parent_takes_its_workers_along_and_the_command_goes_on(
    number: signal.Signals, tmp_path: Path, one_after_another: dict[str, object]
) -> None:
    launcher = start(tmp_path, "--jobs", "2", "--workers", "1")
    until(lambda: trained_by(tmp_path, launcher), launcher)
    family = psutil.Process(launcher.pid).children(recursive=True)
    asked = time.monotonic()
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=60)
    psutil.wait_procs(family, timeout=20)
    assert time.monotonic() - asked < 20
    assert not [process for process in family if process.is_running()]
    assert list(tmp_path.glob("results/*/checkpoint.safetensors"))
    if number != signal.SIGKILL:
        assert launcher.returncode == 3
        assert "runs unfinished, their state saved" in err
        assert "Go on with the same command" in err
        assert "Traceback" not in err
    again = start(tmp_path, "--jobs", "2")
    _, err = again.communicate(timeout=250)
    assert again.returncode == 0, err
    assert made(tmp_path) == one_after_another


def test_a_failed_cell_leaves_the_others_and_gives_exit_code_3(kitbench: Kitbench, tmp_path: Path) -> None:
    guard = "if x.shape[1] > 130:\n            raise KeyError('too large, says this test')\n        return self.gain"
    (tmp_path / "fails.py").write_text(USERS_OWN.replace("return self.gain", guard))
    done = kitbench("run", "--suite", "tiny.toml", "--method", "fails.py", "--method", "conv", "--jobs", "2", code=3)
    assert "denoise-colour-fails-s0" in done.stderr
    assert "too large, says this test" in done.stderr
    assert "denoise-colour-conv-s0" in runs(tmp_path / "results")
    status = kitbench("status", "results").stdout
    assert "1 failed" in status
    assert "too large, says this test" in status
    assert "2 done" in status


def prepared(tmp_path: Path, **options: object) -> PreparedSuite:
    fields: dict[str, object] = {"out": tmp_path, "data": None, "device": "cpu", "workers": 0, "lpips_weights": None}
    return prepare(loading.load_suite("denoise", "smoke", seeds=[0, 1, 2]), Options(**(fields | options)))  # type: ignore[arg-type]


def test_as_many_workers_as_cores_memory_and_work_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = prepared(tmp_path)
    trained = [cell for cell in suite.cells if cell.trained]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(workers, "free_bytes", lambda _: 1 << 40)
    assert workers.worker_devices(suite, suite.cells, {}) == ["cpu"] * 8
    assert workers.worker_devices(suite, trained[:3], {}) == ["cpu"] * 3
    assert workers.worker_devices(prepared(tmp_path, jobs=2), suite.cells, {}) == ["cpu"] * 2
    own = psutil.Process().memory_info().rss
    monkeypatch.setattr(workers, "free_bytes", lambda _: 3 * own + own // 2)
    assert len(workers.worker_devices(suite, suite.cells, {})) in (2, 3)
    monkeypatch.setattr(workers, "free_bytes", lambda _: 0)
    assert workers.worker_devices(suite, suite.cells, {}) == ["cpu"]


def test_gpus_are_those_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["H100", "H100", "A100", "H100"]
    assert workers.choose_gpus(None, names, None) == [0, 1, 3]  # one model only: runs of two do not compare
    assert workers.choose_gpus(None, names, 2) == [2]
    assert workers.choose_gpus("1,3,1", names, None) == [1, 3]


@pytest.mark.parametrize(
    ("gpus", "expected"), [("4", "names GPU 4"), ("0,2", "do not compare"), ("a", "numbers of GPUs")]
)
def test_gpus_that_cannot_be_used_are_refused(gpus: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        workers.choose_gpus(gpus, ["H100", "H100", "A100", "H100"], None)


def test_the_longest_work_is_begun_first() -> None:
    assert makespan([1, 1, 1, 3], 2) == 3
    assert makespan([2, 2, 3], 1) == 7
    assert makespan([], 4) == 0


def test_the_announced_time_has_the_validations_and_not_the_steps_that_are_saved(tmp_path: Path) -> None:
    suite = prepared(tmp_path)
    cell = next(cell for cell in suite.cells if cell.trained)
    cost = Cost(
        parameters=1, attention_parameters=0, resolution=256, macs=1, macs_counted=1, macs_note=None,
        train_peak_bytes=None, memory_note=None,
    )  # fmt: skip
    steps, crops = suite.suite.recipe.steps, validation_pixels(suite.sets[cell.mode].validation)
    assert crops > 0
    whole = expected(suite, cell, Probe(cost, 1.0, 1e-6)).training
    assert whole == pytest.approx(steps + len(validation_steps(suite.suite.recipe)) * crops * 1e-6)
    checkpoint = suite.folder(cell).checkpoint
    checkpoint.parent.mkdir()
    safetensors.numpy.save_file({"a": np.zeros(1)}, checkpoint, {"steps": str(steps)})
    assert expected(suite, cell, Probe(cost, 1.0, 1e-6)).training == 0


def test_threads_are_part_of_the_key_and_set_before_anything_is_computed(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        one, two = (
            prepare(
                loading.load_suite("denoise", "smoke", [f"recipe.threads={threads}"]),
                Options(tmp_path, None, "cpu", 0, None),
            )
            for threads in (1, 2)
        )
        assert torch.get_num_threads() == 2
        keys = [[cell.key for cell in suite.cells if cell.trained] for suite in (one, two)]
        assert not set(keys[0]) & set(keys[1])
        assert keys[0][0] not in keys[1]
    finally:
        torch.set_num_threads(before)
