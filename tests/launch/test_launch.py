"""Many runs on a cluster: what would be submitted, and what `status` says of runs and plans."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

from kitbench.cli.main import cli
from kitbench.errors import InputError, Interrupted
from kitbench.launch.status import status_rows, summary, survey
from kitbench.runs import plan
from kitbench.runs.cell import Cell
from kitbench.runs.plan import Plan, Planned, plan_path, work_of
from kitbench.spec import loading
from kitbench.store.folder import RunFolder
from kitbench.store.records import Progress
from tests.conftest import TINY
from tests.stored import store

Invoke = Callable[..., Result]


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


def test_a_dry_run_prints_cells_commands_and_resources_and_writes_nothing(in_process: Invoke, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    sets = ("--set", "recipe.steps=7", "--seeds", "3,4")
    here = in_process("run", "--suite", "tiny.toml", *sets, "--jobs", "2", "--dry-run").stdout
    assert "5 cells to be run" in here
    line = next(line for line in here.splitlines() if line.startswith("colour/kit/4"))
    assert line.split(maxsplit=1)[1] == (
        "python -m kitbench run --suite tiny.toml --set recipe.steps=7 --seeds 3,4 --out results"
        " --device auto --workers 0 --jobs 1 --only colour/kit/4"
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
        (["--cpus", "2"], "--cpus needs --launcher slurm"),
        (["--partition", "gpu"], "--partition needs --launcher slurm"),
        (["--jobs", "0"], "Invalid value for '--jobs'"),
        (["--device", "cpu", "--gpus", "0"], "the device is the CPU"),
        (["--launcher", "slurm", "--gpus", "all"], "how many GPUs"),
        (["--launcher", "slurm", "--gpus", "3"], "a batch of 2 cannot be shared"),
        (["--launcher", "slurm", "--device", "gpu"], "--device gpu is no device"),
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
    assert one.data.embedded.modes == ("gray",)  # or without --data colour would be run under this name
    assert (one.recipe, one.backbone, one.task) == (whole.recipe, whole.backbone, whole.task)
    with pytest.raises(InputError, match="no cell 'colour/kit/7'"):
        plan.restrict(whole, "colour/kit/7")


def test_slurm_gets_the_stored_cells_that_lack_scores_on_a_set(in_process: Invoke, tmp_path: Path) -> None:
    command = ("run", "--suite", "tiny.toml", "--method", "conv", "--set", "references=[]", "--set", "recipe.steps=3")
    in_process(*command, "--jobs", "1")
    slurm = (*command, "--launcher", "slurm", "--dry-run")
    assert "0 of 1 cells go to Slurm" in in_process(*slurm).stdout
    assert "0 of 1 cells go to Slurm" in in_process(*slurm, "--device", "cpu").stdout
    on_gpus = in_process(*slurm, "--device", "cuda").stdout  # this machine need not have what the nodes have
    assert "1 of 1 cells go to Slurm" in on_gpus
    assert "--device cuda --workers 0 --jobs 1 --only colour/conv/0" in " ".join(on_gpus.split())
    another = in_process(*slurm, "--test-set", "skimage-test,skimage-validation").stdout
    assert "1 of 1 cells go to Slurm" in another
    assert "--only colour/conv/0" in another


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
    failed.fail(failed.run.key, f"{failed.path.name} (learning rate 0.001): out of memory: 1 MiB")
    begun = unfinished(tmp_path, 5, None)
    damaged = store(tmp_path, "kit", 30.0, seed=9)
    (damaged.path / "training.json").write_text("")
    unreadable = store(tmp_path, "kit", 30.0, seed=10)
    (unreadable.path / "run.json").write_text("{")
    work = work_of(done.run.identity)
    cells = [
        Planned(name=f"cell {n}", mode="colour", method="kit", seed=n, work=w)
        for n, w in ((6, "6"), (7, "7"), (0, work))
    ]
    host = os.uname().nodename
    alive = Plan(launcher="local", pid=os.getpid(), host=host, cells=tuple(cells))
    path = plan_path(tmp_path, "tiny", alive)
    path.parent.mkdir()
    path.write_text(alive.model_dump_json())
    gone = Planned(name="cell 8", mode="colour", method="kit", seed=8, work="8")
    dead = Plan(launcher="local", pid=2**22 + 1, host=host, cells=(gone,))  # above the largest number of a process
    plan_path(tmp_path, "tiny", dead).write_text(dead.model_dump_json())

    with running.lock():
        lines = survey([tmp_path], now=lambda: 1010.0)
    named = {folder.path.name: state for folder, state in (
        (done, "done"), (stopped, "stopped"), (running, "running"), (elsewhere, "running"), (failed, "failed"), (begun, "stopped"),
        (damaged, "damaged"), (unreadable, "damaged"),
    )}  # fmt: skip
    assert {line.name: line.state for line in lines} == named | {
        "cell 6": "queued",
        "cell 7": "queued",
        "cell 8": "stopped",
    }
    table = {row[1]: row for row in status_rows(lines)}
    assert table[running.path.name][2:4] == ["6/20", "1 min 0 s"]
    assert table[failed.path.name][4] == "out of memory: 1 MiB"
    assert table[done.path.name][2] == "20/20"
    assert (
        summary(lines)
        == "2 running, 2 queued, 3 stopped, 1 failed, 2 damaged, 1 done; the longest that is running has about 1 min 0 s left"
    )
    # A run of another machine counts as running only while what it says of itself is fresh.
    later = {line.name: line.state for line in survey([tmp_path], now=lambda: 2000.0)}
    assert later[elsewhere.path.name] == "stopped"


def test_a_stopped_run_is_as_far_as_its_checkpoint(tmp_path: Path) -> None:
    """The last heartbeat may be seconds older than the state that Ctrl-C saved, and of a killed run it is younger."""
    for seed, progress, saved in ((0, at(4), "9"), (1, at(12), "9"), (2, None, "9"), (3, at(4), None)):
        folder = unfinished(tmp_path, seed, progress)
        if saved is not None:
            state = {"sums": np.zeros(2, np.float32)}
            safetensors.numpy.save_file(state, folder.checkpoint, {"steps": saved})
    rows = {row[1].rpartition("-")[0][-1]: row for row in status_rows(survey([tmp_path]))}
    assert [rows[seed][2] for seed in "0123"] == ["9/20", "9/20", "9/20", "0/20"]
    assert {row[0] for row in rows.values()} == {"stopped"}


def test_cells_that_a_stopped_command_had_not_begun_stay_in_status(tmp_path: Path) -> None:
    suite = loading.load_suite("denoise", "smoke")
    cells = [Cell(suite, "colour", name, name, None, {}, 0, "cpu", "00") for name in ("kit", "window")]

    def stopped() -> None:
        with plan.planned(suite, tmp_path, cells):
            assert [line.state for line in survey([tmp_path])] == ["queued", "queued"]
            raise Interrupted("Ctrl-C")

    with pytest.raises(Interrupted):
        stopped()
    lines = survey([tmp_path])
    assert [(line.name, line.state) for line in lines] == [
        ("denoise-colour-kit-s0", "stopped"),
        ("denoise-colour-window-s0", "stopped"),
    ]
    assert "not begun" in lines[0].note
    with plan.planned(suite, tmp_path, cells):  # the same command again, to the end
        pass
    assert not list(tmp_path.glob(".launch/plan-*"))


def test_commands_that_run_parts_of_one_suite_side_by_side_do_not_hide_each_others_cells(tmp_path: Path) -> None:
    suite = loading.load_suite("denoise", "smoke")
    first, second, third = (
        [Cell(suite, "colour", name, name, None, {}, seed, "cpu", "00") for name in ("kit", "window")]
        for seed in range(3)
    )

    def queued() -> list[str]:
        return sorted(line.name[-2:] for line in survey([tmp_path]) if line.state == "queued")

    plan.write_plan(suite, tmp_path, "slurm", third)
    with plan.planned(suite, tmp_path, first):
        with plan.planned(suite, tmp_path, second):
            assert queued() == ["s0", "s0", "s1", "s1", "s2", "s2"]
        assert queued() == ["s0", "s0", "s2", "s2"]
    assert queued() == ["s2", "s2"]
    plan.write_plan(suite, tmp_path, "slurm", first)  # a second submission, while the first one waits
    assert queued() == ["s0", "s0", "s2", "s2"]


def test_status_of_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No run in"):
        survey([tmp_path])


def test_runs_that_differ_in_their_learning_rate_alone_are_told_apart(tmp_path: Path) -> None:
    names = [store(tmp_path, "kit", 30.0, seed=99, lr=rate).path.name for rate in (0.001, 0.002)]
    other = store(tmp_path, "window", 30.0, seed=99, lr=0.001).path.name
    shown = [f"{names[0]} lr 0.001", f"{names[1]} lr 0.002", other]
    assert sorted(line.name for line in survey([tmp_path])) == sorted(shown)
    trial = store(tmp_path / "tuning", "kit", 30.0, seed=1000, lr=0.001).path.name
    assert sorted(line.name for line in survey([tmp_path, tmp_path])) == sorted([*shown, trial])
    assert [line.name for line in survey([tmp_path / "tuning"])] == [trial]
    with pytest.raises(InputError, match="nowhere is not a folder"):
        survey([tmp_path, tmp_path / "nowhere"])
