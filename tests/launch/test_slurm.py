"""`run --launcher slurm` on a real Slurm of two nodes on this machine's loopback, with a node lost and a job preempted."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kitbench.store.records import Owner, read_record
from tests.cli.test_cli import numbers, runs
from tests.conftest import TINY, run_kitbench
from tests.launch.cluster import CannotStart, Cluster

SUITE = TINY.replace('references = ["input"]', "references = []").replace(
    "steps = 12, batch = 2, crop = 32, checkpoint_every = 4", "steps = 300, batch = 2, crop = 32, checkpoint_every = 10"
)
SECONDS = 150


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if importlib.util.find_spec("submitit") is None:
        pytest.skip("submitit is not installed; pip install 'kitbench[slurm]'")
    try:
        with Cluster() as running:
            yield running
    except CannotStart as reason:
        pytest.skip(str(reason))


def until(what: str, ready: Callable[[], object], cluster: Cluster, folder: Path) -> None:
    end = time.monotonic() + SECONDS
    while not ready():
        if time.monotonic() > end:
            logs = [path.read_text(errors="replace")[-2000:] for path in sorted(folder.rglob("*_log.*"))]
            pytest.fail(
                f"{what}: not within {SECONDS} s\n{cluster.command('scontrol', 'show', 'job')}\n" + "\n".join(logs)
            )
        time.sleep(0.2)


def jobs(cluster: Cluster, what: str) -> dict[str, str]:
    """One field of every job of the array, by its number in the array."""
    text = cluster.command("scontrol", "-o", "show", "job")
    found = [
        (re.search(r"ArrayTaskId=(\d+) ", line), re.search(rf"\b{what}=(\S*)", line)) for line in text.splitlines()
    ]
    return {task[1]: value[1] for task, value in found if task and value}


def pause(results: Path, paused: dict[Path, int]) -> dict[Path, int]:
    """Pause each run that has saved a checkpoint: however fast this machine is, none ends before the others have one."""
    for checkpoint in results.glob("*/checkpoint.safetensors"):
        run = checkpoint.parent
        if run not in paused:
            process = read_record(Owner, run / ".owner").pid
            os.kill(process, signal.SIGSTOP)
            paused[run] = process
    return paused


def test_cells_survive_a_lost_node_and_a_preemption_bit_for_bit(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(SUITE)
    arguments = (
        "run",
        "--suite",
        "tiny.toml",
        "--launcher",
        "slurm",
        "--partition",
        "low",
        "--jobs",
        "2",
        "--cpus",
        "1",
        "--time",
        "20",
    )  # --jobs: the tests' KITBENCH_JOBS=1 would let Slurm run one job of the array at a time
    done = run_kitbench(tmp_path, *arguments, **cluster.environment)
    assert "2 of 2 cells go to Slurm" in done.stdout
    assert "slurm_array_parallelism 2" in done.stdout
    assert "submitted 2 jobs" in done.stdout
    status = run_kitbench(tmp_path, "status", "results").stdout  # Slurm may have begun some by now
    assert sum(int(count) for count in re.findall(r"(\d+) (?:queued|running)\b", status)) == 2, status

    # Both nodes are at work and have saved something; then one loses its power, and the other's job is preempted.
    results = tmp_path / "results"
    paused: dict[Path, int] = {}
    until("two checkpoints", lambda: len(pause(results, paused)) == 2, cluster, tmp_path)
    nodes = {node: task for task, node in jobs(cluster, "NodeList").items() if node in ("n1", "n2")}
    assert set(nodes) == {"n1", "n2"}
    cluster.down("n1")
    cluster.command("sbatch", "-p", "high", "-w", "n2", "-o", "/dev/null", "--wrap", "sleep 1")
    until("both requeued", lambda: all(jobs(cluster, "Restarts")[t] != "0" for t in nodes.values()), cluster, tmp_path)
    for process in paused.values():
        with suppress(ProcessLookupError):  # ended with its node
            os.kill(process, signal.SIGCONT)
    cluster.up("n1")
    at_work = ("idle", "allocated", "mixed")  # ReturnToService=2: a node that registers is taken back
    until("n1 back", lambda: cluster.states().get("n1") in at_work, cluster, tmp_path)

    until("all done", lambda: set(jobs(cluster, "JobState").values()) == {"COMPLETED"}, cluster, tmp_path)
    assert "2 done" in run_kitbench(tmp_path, "status", "results").stdout
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tiny.toml").write_text(SUITE)
    run_kitbench(plain, "run", "--suite", "tiny.toml")
    expected = runs(plain / "results")
    assert {name: numbers(run) for name, run in runs(results).items()} == {
        name: numbers(run) for name, run in expected.items()
    }
    again = run_kitbench(tmp_path, *arguments, **cluster.environment)
    assert "0 of 2 cells" in again.stdout
