"""How a batch is shared, over processes and in time, changes rounding only: real processes, through torchrun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from kitbench.runs import cell
from kitbench.spec import loading
from kitbench.store.folder import RunFolder
from kitbench.system.processes import World, pieces
from tests.cli.test_cli import USERS_OWN, runs
from tests.conftest import ROOT, TINY, run_kitbench
from tests.runs.parallel_worker import trained

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def shared(folder: Path, processes: int, *arguments: str, fails: bool = False) -> dict[str, Tensor]:
    """The weights after training in so many processes; `fails`: it must not come to an end."""
    command = [
        *TORCHRUN,
        "--nproc-per-node",
        str(processes),
        "-m",
        "tests.runs.parallel_worker",
        str(folder),
        *arguments,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    weights = folder / "weights.safetensors"
    assert (done.returncode != 0) == fails, done.stderr
    return safetensors.torch.load_file(weights) if weights.is_file() else {}


def alone(folder: Path, **how: int | None) -> dict[str, Tensor]:
    """The weights after training in this process."""
    wanted = {"micro_batch": None, "stop_at": None, "die_at": None} | how
    return dict(trained(folder, "kit", **wanted).state_dict())


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    assert all(tensor.dtype == torch.float64 for tensor in a.values() if tensor.is_floating_point())
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_memory_format_and_the_optimisers_kernel_change_rounding_only(tmp_path: Path, whole: Whole) -> None:
    for number, changes in enumerate(({"channels_last": False}, {"fused": False})):
        changed = dict(trained(tmp_path / str(number), "kit", None, None, None, changes).state_dict())
        assert 0 <= difference(changed, whole[0]) < 1e-10


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's compiler about torch itself
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_compiled_training_changes_rounding_only(tmp_path: Path, whole: Whole) -> None:
    torch.compiler.reset()
    compiled = dict(trained(tmp_path, "kit", None, None, None, {"compile": True}).state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert difference(compiled, whole[0]) < 1e-10
    assert log(tmp_path) == [pytest.approx(line, rel=1e-10) for line in whole[1]]


def log(folder: Path) -> list[list[float]]:
    """Step, loss and PSNR of every line."""
    return [[float(x) for x in line.split(",")[:3]] for line in (folder / "log.csv").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], list[list[float]]]:
    """20 steps of batches of 6 in one process, whole."""
    folder = tmp_path_factory.mktemp("whole")
    return alone(folder), log(folder)


Whole = tuple[dict[str, Tensor], list[list[float]]]


def test_accumulated_pieces_train_as_the_whole_batch_does(tmp_path: Path, whole: Whole) -> None:
    """Pieces of 4 and 2: the mean of the batch is not the mean of the pieces' means."""
    assert difference(alone(tmp_path, micro_batch=4), whole[0]) < 1e-10
    assert log(tmp_path) == [pytest.approx(line, rel=1e-10) for line in whole[1]]


def test_two_processes_in_pieces_train_as_one_does(tmp_path: Path, whole: Whole) -> None:
    assert difference(shared(tmp_path, 2, "--micro-batch", "2"), whole[0]) < 1e-10
    assert log(tmp_path) == [pytest.approx(line, rel=1e-10) for line in whole[1]]


def test_four_uneven_processes_stopped_and_gone_on_with_by_one(tmp_path: Path, whole: Whole) -> None:
    """6 samples over 4 processes: 1, 2, 1, 2. The stop comes to one process, and all save and leave at the same step."""
    assert shared(tmp_path, 4, "--stop-at", "9") == {}
    assert (tmp_path / "checkpoint.safetensors").is_file()
    assert difference(alone(tmp_path), whole[0]) < 1e-10
    assert log(tmp_path) == [pytest.approx(line, rel=1e-10) for line in whole[1]]


def test_two_processes_killed_and_gone_on_with_by_one_in_pieces(tmp_path: Path, whole: Whole) -> None:
    """Killed at step 15, without a word; the checkpoint is of step 12."""
    assert shared(tmp_path, 2, "--die-at", "15", fails=True) == {}
    assert difference(alone(tmp_path, micro_batch=2), whole[0]) < 1e-10


def test_the_whole_command_runs_under_torchrun_and_scores_every_image_once(tmp_path: Path) -> None:
    plain, parallel = tmp_path / "plain", tmp_path / "parallel"
    for folder in (plain, parallel):
        folder.mkdir()
        (folder / "tiny.toml").write_text(TINY)
    run_kitbench(plain, "run", "--suite", "tiny.toml")
    command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "kitbench", "run", "--suite", "tiny.toml"]
    environment = {k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=parallel, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote results/denoise-colour-kit-s0") == 1
    assert "2 processes" in done.stdout
    assert "Warning" not in done.stderr
    for name, run in runs(plain / "results").items():
        found, expected = (
            [
                score
                for path in sorted((folder / "eval").glob("*.json"))
                for score in json.loads(path.read_text())["scores"]
            ]
            for folder in (runs(parallel / "results")[name], run)
        )
        assert [score["image"] for score in found] == [score["image"] for score in expected]
        assert [score["psnr"] for score in found] == pytest.approx([score["psnr"] for score in expected], abs=1e-3)
    record = json.loads((runs(parallel / "results")["denoise-colour-kit-s0"] / "run.json").read_text())
    assert record["environment"]["flags"]["processes"] == 2


def test_under_torchrun_a_run_that_fails_is_tried_last_the_next_time(tmp_path: Path) -> None:
    """The processes end with the first failure; given again, the command goes on with what has not failed yet."""
    (tmp_path / "tiny.toml").write_text(TINY)
    guard = "if x.shape[1] > 130:\n            raise KeyError('says this test')\n        return self.gain"
    (tmp_path / "fails.py").write_text(USERS_OWN.replace("return self.gain", guard))
    asked = ("run", "--suite", "tiny.toml", "--method", "fails.py", "--method", "conv")
    environment = {k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"} | {"OMP_NUM_THREADS": "1"}
    for complete in (set(), {"denoise-colour-conv-s0"}):
        command = [*TORCHRUN, "--nproc-per-node", "2", "-m", "kitbench", *asked]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode != 0
        assert "says this test" in done.stderr
        assert "Warning" not in done.stderr
        found = {name for name, folder in runs(tmp_path / "results").items() if list((folder / "eval").glob("*.json"))}
        assert found - {"denoise-colour-input"} == complete


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`torchrun WORDS` with two processes, in a folder that holds the tiny suite."""
    (folder / "tiny.toml").write_text(TINY)
    environment = {k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, "--nproc-per-node", "2", *words],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`kitbench run` of the tiny suite in two processes."""
    return started(folder, "-m", "kitbench", "run", "--suite", "tiny.toml", *arguments)


def uneven(folder: Path, at_large: str) -> tuple[str, ...]:
    """Options for two test images, of which the first process scores a large one while the other waits for it.

    at_large: what the method does with the large one.
    """
    (folder / "pictures").mkdir()
    for number, side in enumerate((300, 64)):
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"pictures/{number}.png")
    large = f"if x.shape[1] > 130 and type(x).__name__ == 'Tensor':\n            {at_large}\n        return self.gain"
    (folder / "mine.py").write_text(USERS_OWN.replace("return self.gain", large))
    settings = ("--set", "references=[]", "--set", "task.sigma_test=[15,25]")
    return ("--method", "mine.py", "--test-set", "./pictures", *settings)


def test_processes_that_a_signal_finds_at_different_places_stop_and_none_calls_it_a_failure(tmp_path: Path) -> None:
    options = uneven(tmp_path, "open('large', 'w').close(); __import__('time').sleep(3)")
    command = start(tmp_path, *options)
    deadline = time.monotonic() + 200
    while not (tmp_path / "large").is_file():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # the other process waits for the first
    command.terminate()
    _, said = command.communicate(timeout=60)
    assert "Connection" not in said
    assert said.count("kitbench: stopped") == 2
    assert said.count("Go on with the same command: torchrun --nproc-per-node=2 -m kitbench run --suite tiny") == 2
    assert not list(tmp_path.glob("results/*/failed.json"))
    assert "1 stopped" in run_kitbench(tmp_path, "status", "results").stdout


def test_the_failure_of_one_process_is_what_is_kept_not_the_lost_connection_of_the_other(tmp_path: Path) -> None:
    _, said = start(tmp_path, *uneven(tmp_path, "raise KeyError('says this test')")).communicate(timeout=250)
    assert "Connection" not in said
    [failed] = tmp_path.glob("results/*/failed.json")
    assert "says this test" in json.loads(failed.read_text())["message"]


def test_a_run_that_another_command_works_on_is_waited_for_while_the_others_are_run(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    run_kitbench(tmp_path, "run", "--suite", "tiny.toml", "--out", "plain", "--set", "references=[]")
    stored = runs(tmp_path / "plain")
    held = RunFolder(tmp_path / "results" / stored["denoise-colour-kit-s0"].name)
    with held.lock():
        command = start(tmp_path, "--set", "references=[]")
        others = tmp_path / "results" / stored["denoise-colour-conv-s0"].name / "eval"
        deadline = time.monotonic() + 200
        while not list(others.glob("*.json")):
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert sorted(path.name for path in held.path.iterdir()) == [".lock", ".owner"]
    out, said = command.communicate(timeout=250)
    assert command.returncode == 0, said
    assert out.count("waits: ") == 1
    assert runs(tmp_path / "results").keys() == stored.keys()


def test_processes_join_for_one_suite_after_another_and_the_first_speaks_for_all(tmp_path: Path) -> None:
    changes = ("--method", "conv", "--set", "recipe.steps=2", "--set", "recipe.warmup=0", "--rates", "1e-3,2e-3")
    asked = ("tune", "--suite", "tiny.toml", "--set", "data.validation=skimage-validation", *changes)
    out, said = started(tmp_path, "-m", "kitbench", *asked).communicate(timeout=250)
    assert out.count("wrote results/tuning-tiny-only-colour-2.json") == 1, said
    assert out.count("rates     0.001, 0.002") == 1


SCRIPT = """
import kitbench

for steps in (2, 3):
    changed = {"recipe.steps": steps, "recipe.warmup": 0, "references": []}
    table = kitbench.run("tiny.toml", methods=["conv"], settings=changed)
    assert list(table["steps"]) == [steps]
"""


ONE_DEVICE_IS_FULL = """
import os
import kitbench
from kitbench.errors import RunError
from kitbench.runs import probe


def require_memory(prepared, model, cell):
    if os.environ["RANK"] == "1" and cell.method == "conv":
        raise RunError("the device of this process is full")


probe.require_memory = require_memory
kitbench.run("tiny.toml", methods=["conv", "kit"], settings={"recipe.steps": 2, "recipe.warmup": 0, "references": []})
"""


def test_what_one_process_cannot_train_none_trains_and_the_others_go_on_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ONE_DEVICE_IS_FULL)
    command = started(tmp_path, "script.py")
    command.communicate(timeout=250)
    assert command.returncode != 0
    found = runs(tmp_path / "results")
    said = json.loads((found["denoise-colour-conv-s0"] / "failed.json").read_text())["message"]
    assert said.endswith("the device of this process is full")
    assert len(list((found["denoise-colour-kit-s0"] / "eval").iterdir())) == 1


def test_a_script_may_run_one_suite_after_another_and_every_process_gets_the_table(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = started(tmp_path, "script.py")
    _, said = command.communicate(timeout=250)
    assert command.returncode == 0, said
    assert "Warning" not in said


def test_commands_whose_work_is_not_shared_are_refused_under_torchrun(tmp_path: Path) -> None:
    done = run_kitbench(tmp_path, "status", ".", code=2, LOCAL_RANK="0", WORLD_SIZE="2", RANK="0")
    assert "give `kitbench status` without it" in done.stderr
    done = run_kitbench(tmp_path, "status", ".", code=2, LOCAL_RANK="0", WORLD_SIZE="1", RANK="0")
    assert "torchrun" not in done.stderr


@pytest.mark.parametrize("command", ["run", "tune"])
@pytest.mark.parametrize("option", [("--jobs", "2"), ("--gpus", "0,1")])
def test_what_spreads_runs_over_processes_is_refused_where_processes_share_each_run(
    command: str, option: tuple[str, str], tmp_path: Path
) -> None:
    asked = (command, "--suite", "denoise", "--preset", "smoke", *option)
    done = run_kitbench(tmp_path, *asked, code=2, LOCAL_RANK="0", WORLD_SIZE="2", RANK="0")
    assert f"leave out {option[0]}, or give the command without torchrun" in done.stderr


@pytest.mark.parametrize(("count", "size"), [(6, 4), (16, 3), (4, 4), (7, 1), (0, 2)])
def test_shares_hold_everything_once_and_differ_by_one_at_most(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for most in (1, 2, 5):
        cut = pieces(shares[-1], most)
        assert [number for piece in cut for number in piece] == list(shares[-1])
        assert all(0 < len(piece) <= most for piece in cut)


def test_settings_that_came_later_count_only_where_they_are_not_as_before() -> None:
    old = cell.decisive(loading.load_suite("denoise").recipe)
    assert not {"tf32", "channels_last", "compile", "fused"} & old.keys()
    for setting in ("tf32=true", "channels_last=false", "compile=true", "fused=false", "precision=float64"):
        assert cell.decisive(loading.load_suite("denoise", overrides=[f"recipe.{setting}"]).recipe) != old
