"""Many runs: cells over local workers, what would be submitted, and what `status` says of it all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner, Result

from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.launch import local, plan
from kitbench.launch.plan import Plan, Planned, Spread, plan_path, work_of
from kitbench.launch.status import render, summary, survey
from kitbench.spec import loading
from kitbench.store.folder import RunFolder
from kitbench.store.records import Progress
from tests.cli.test_cli import USERS_OWN, numbers, runs
from tests.conftest import TINY, Kitbench, run_kitbench
from tests.stored import store

LONGER = TINY.replace("steps = 12", "steps = 120").replace("checkpoint_every = 4", "checkpoint_every = 10")
LONGER = LONGER.replace('references = ["input"]', "references = []")
Invoke = Callable[..., Result]
NOTHING = Spread(jobs=None, gpus=None, cpus=None, partition=None, minutes=None, dry_run=False)


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """The command line in this process, in a temporary folder that holds tiny.toml."""
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == code, result.output
        return result

    return invoke


def test_a_killed_worker_loses_nothing_and_every_cell_ends_as_in_a_plain_run(tmp_path: Path) -> None:
    plain, spread = tmp_path / "plain", tmp_path / "spread"
    for folder in (plain, spread):
        folder.mkdir()
        (folder / "tiny.toml").write_text(LONGER)
    run_kitbench(plain, "run", "--suite", "tiny.toml")

    command = [sys.executable, "-m", "kitbench", "run", "--suite", "tiny.toml", "--launcher", "local", "--jobs", "2"]
    launcher = subprocess.Popen(
        command, cwd=spread, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"KITBENCH_DATA": ""}
    )  # fmt: skip
    victim, seen = None, ""
    while victim is None and launcher.poll() is None:
        if next(spread.glob("results/denoise-colour-kit-*/checkpoint.safetensors"), None):
            seen = run_kitbench(spread, "status", "results").stdout
            victim = next((p for p in psutil.Process(launcher.pid).children() if "colour/kit/0" in p.cmdline()), None)
        time.sleep(0.02)
    assert victim is not None
    victim.kill()
    out, err = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, err
    assert "1 running" in seen or "2 running" in seen
    assert "was killed (SIGKILL); another goes on with it" in out
    assert "[2/2]" in out
    expected = {name: numbers(run) for name, run in runs(plain / "results").items()}
    assert {name: numbers(run) for name, run in runs(spread / "results").items()} == expected
    assert "2 done" in run_kitbench(spread, "status", "results").stdout
    # The launcher prints the table of all cells, as a plain run does.
    table = run_kitbench(plain, "table", "results").stdout.splitlines()[0]
    assert table in out


def test_a_failed_cell_leaves_the_others_and_gives_exit_code_3(kitbench: Kitbench, tmp_path: Path) -> None:
    guard = "if x.shape[1] > 130:\n            raise KeyError('too large, says this test')\n        return self.gain"
    (tmp_path / "fails.py").write_text(USERS_OWN.replace("return self.gain", guard))
    done = kitbench(
        "run", "--suite", "tiny.toml", "--method", "fails.py", "--method", "conv", "--launcher", "local", "--jobs", "2", code=3
    )  # fmt: skip
    assert "colour/fails/0" in done.stderr
    assert "too large, says this test" in done.stderr
    assert "denoise-colour-conv-s0" in runs(tmp_path / "results")
    told = kitbench("status", "results").stdout
    assert "1 failed" in told
    assert "too large, says this test" in told
    assert "2 done" in told


def test_a_dry_run_prints_cells_commands_and_resources_and_writes_nothing(in_process: Invoke, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    sets = ("--set", "recipe.steps=7", "--seeds", "3,4")
    local = in_process(
        "run", "--suite", "tiny.toml", *sets, "--launcher", "local", "--jobs", "2", "--cpus", "1", "--dry-run"
    ).stdout
    assert "5 of 5 cells are to be run by 2 workers: 0: OMP_NUM_THREADS=1; 1: OMP_NUM_THREADS=1" in local
    line = next(line for line in local.splitlines() if line.startswith("colour/kit/4"))
    assert line.split(maxsplit=1)[1] == (
        "python -m kitbench run --suite tiny.toml --set recipe.steps=7 --seeds 3,4 --out results"
        " --device cpu --workers 0 --only colour/kit/4"
    )
    slurm = in_process(
        "run", "--suite", "tiny.toml", *sets, "--launcher", "slurm", "--partition", "gpu", "--gpus", "2", "--dry-run"
    ).stdout
    assert "5 of 5 cells go to Slurm as one job array" in slurm
    assert "gpus_per_node 2" in slurm
    assert "python -m torch.distributed.run --standalone --nproc-per-node 2 -m kitbench run --suite tiny.toml" in slurm
    assert "slurm_partition gpu" in slurm
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--launcher", "cloud"], "Invalid value for '--launcher'"),
        (["--jobs", "2"], "--jobs is of --launcher"),
        (["--dry-run"], "--dry-run is of --launcher"),
        (["--launcher", "local", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["--launcher", "local", "--partition", "gpu"], "--partition is of --launcher slurm"),
        (["--launcher", "local", "--device", "cpu", "--gpus", "0"], "the device is the CPU"),
        (["--launcher", "slurm", "--gpus", "all"], "how many GPUs"),
        (["--launcher", "slurm", "--gpus", "3"], "a batch of 2 cannot be shared"),
        (["--only", "colour/kitt/0"], "no cell 'colour/kitt/0'"),
        (["--track", "tensorbord"], "tensorboard"),
    ],
)
def test_launch_options_that_do_not_fit_are_refused_before_anything_is_written(
    in_process: Invoke, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    assert expected in in_process("run", "--suite", "tiny.toml", *arguments, code=2).stderr
    assert not (tmp_path / "results").exists()


def test_a_cell_is_known_by_its_axes_wherever_it_runs() -> None:
    whole = loading.load_suite("denoise", "smoke", ["data.folder.modes=['gray']"])
    one = plan.restrict(whole, "gray/kit-random/0")
    assert (list(one.methods), one.references, one.seeds, one.data.folder.modes) == (
        ["kit-random"],
        (),
        (0,),
        ("gray",),
    )
    reference = plan.restrict(whole, "colour/nlm")
    assert (list(reference.methods), reference.references) == ([], ("nlm",))
    assert (one.recipe, one.backbone, one.task) == (whole.recipe, whole.backbone, whole.task)
    with pytest.raises(InputError, match="no cell 'colour/kit/7'"):
        plan.restrict(whole, "colour/kit/7")


def spread(**changes: object) -> Spread:
    return Spread(**(vars(NOTHING) | changes))  # type: ignore[arg-type]


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    cpu = torch.device("cpu")
    assert local.slots(cpu, NOTHING, 24) == [{"OMP_NUM_THREADS": "1"}] * 8
    assert local.slots(cpu, NOTHING, 3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert local.slots(cpu, spread(jobs=2), 24) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert local.slots(cpu, spread(cpus=4), 24) == [{"OMP_NUM_THREADS": "4"}] * 2


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had three H100 and an A100."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "A100" if number == 2 else "H100")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def visible(device: str, wanted: Spread, cells: int = 24) -> list[str]:
    return [slot["CUDA_VISIBLE_DEVICES"] for slot in local.slots(torch.device(device), wanted, cells)]


@pytest.mark.usefixtures("four_gpus")
def test_workers_share_no_gpu_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible("cuda", NOTHING) == ["0", "1", "3"]  # one model only: runs of two do not compare
    assert visible("cuda", NOTHING, cells=2) == ["0", "1"]
    assert visible("cuda:2", NOTHING) == ["2"]
    assert visible("cuda", spread(gpus="1,3")) == ["1", "3"]
    assert visible("cuda", spread(gpus="1,3", jobs=4)) == ["1", "3", "1", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible("cuda", spread(gpus="1,3")) == ["5", "7"]


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("gpus", "expected"), [("4", "names GPU 4"), ("0,2", "do not compare"), ("a", "numbers of GPUs")]
)
def test_gpus_that_cannot_be_used_are_refused(gpus: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        local.slots(torch.device("cuda"), spread(gpus=gpus), 24)


def unfinished(out: Path, seed: int, progress: Progress | None) -> RunFolder:
    """A run that is not done, with what it last said of itself."""
    folder = store(out, "kit", 30.0, seed=seed)
    (folder.path / "training.json").unlink()
    shutil.rmtree(folder.path / "eval")
    if progress is not None:
        folder.write("progress.json", progress)
    return folder


def at(step: int, host: str | None = None) -> Progress:
    host = host or os.uname().nodename
    return Progress(phase="training", done=step, total=20, seconds_left=60.0, updated=1000.0, host=host)


def test_status_tells_every_state_from_the_folders_alone(tmp_path: Path) -> None:
    done = store(tmp_path, "kit", 30.0, seed=0)
    stopped = unfinished(tmp_path, 1, at(4))
    running = unfinished(tmp_path, 2, at(6))
    elsewhere = unfinished(tmp_path, 3, at(8, "another-host"))
    failed = unfinished(tmp_path, 4, at(9))
    failed.fail(failed.run.key, "out of memory")
    begun = unfinished(tmp_path, 5, None)
    work = work_of(done.run.identity)
    cells = [
        Planned(name=f"cell {n}", mode="colour", method="kit", seed=n, work=w)
        for n, w in ((6, "6"), (7, "7"), (0, work))
    ]
    path = plan_path(tmp_path, "tiny", "local")
    path.parent.mkdir()
    host = os.uname().nodename
    path.write_text(Plan(launcher="local", pid=os.getpid(), host=host, cells=tuple(cells)).model_dump_json())
    gone = Planned(name="cell 8", mode="colour", method="kit", seed=8, work="8")
    dead = Plan(launcher="local", pid=2**22 + 1, host=host, cells=(gone,))  # above the largest number of a process
    plan_path(tmp_path, "other", "local").write_text(dead.model_dump_json())

    with running.lock():
        lines = survey([tmp_path], now=lambda: 1010.0)
    named = {folder.path.name: state for folder, state in (
        (done, "done"), (stopped, "stopped"), (running, "running"), (elsewhere, "running"), (failed, "failed"), (begun, "stopped"),
    )}  # fmt: skip
    assert {line.name: line.state for line in lines} == named | {
        "cell 6": "queued",
        "cell 7": "queued",
        "cell 8": "stopped",
    }
    table = {row[1]: row for row in render(lines)}
    assert table[running.path.name][2:4] == ["6/20", "1 min 0 s"]
    assert table[failed.path.name][4] == "out of memory"
    assert table[done.path.name][2] == "20/20"
    assert (
        summary(lines)
        == "2 running, 2 queued, 3 stopped, 1 failed, 1 done; the longest that is running has about 1 min 0 s left"
    )
    # A run of another machine counts as running only while what it says of itself is fresh.
    later = {line.name: line.state for line in survey([tmp_path], now=lambda: 2000.0)}
    assert later[elsewhere.path.name] == "stopped"


def test_status_of_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No run in"):
        survey([tmp_path])
