"""When things go wrong: small rounds of benchmarks/faults.py, and what a run says and keeps when it is stopped or fails."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import safetensors
from real_commands import RUN, SUITE, Command, Done, folder, kitbench, leftovers, phase

from benchmarks import faults

SLEEPY = '''
"""sleepy: an operator that takes a minute, at one place."""
import time
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, *, shift=False):
        super().__init__()
        self.mix, self.calls = nn.Linear(dim, dim), 0

    def forward(self, x):
        self.calls += 1
        if WHERE:
            open("asleep", "w").close()
            time.sleep(60)
        return self.mix(x)
'''


def test_runs_killed_at_random_moments_end_bit_for_bit_as_one_that_was_not() -> None:
    counts = faults.kills(3, seed=1)
    assert counts["resumed bit-identical"] == 2
    assert counts["killed while writing the table"] == 1


def test_full_and_read_only_disks_are_told_and_lose_nothing() -> None:
    counts = faults.disk(sizes=(60,))
    if "disk full: not tried, no right to mount" in counts:
        pytest.skip("a file system of limited size needs the right to mount one")
    assert counts["disk full, told and gone on"] == 1
    assert counts["read-only folder refused"] == 1


def test_damage_to_a_record_of_a_run_is_told_and_touches_no_other() -> None:
    """The benchmark does it with every file and every command."""
    counts = faults.damage(readers=(faults.READERS[0], faults.READERS[3]), suffixes=(".json", ".csv"))
    assert counts
    assert not [what for what in counts if "not noticed" in what]


def test_two_processes_make_each_run_of_one_folder_once() -> None:
    assert faults.crowd(2)["equal tables"] == 2


@pytest.mark.filterwarnings("ignore")  # Pillow's, of pictures that it reads all the same
def test_nonsense_in_the_place_of_files_is_answered_or_refused_in_a_sentence() -> None:
    assert sum(faults.nonsense(120).values()) == 120


def stopped(command: Command, number: signal.Signals, *, all_processes: bool = False) -> Done:
    """What a command says that is stopped as by Ctrl-C or a scheduler: it must be gone within ten seconds.

    all_processes: its children get the signal too and first, as a terminal's Ctrl-C and a batch system's end may.
    """
    assert command.process.pid is not None
    clock = time.monotonic()
    if all_processes:
        for child in psutil.Process(command.process.pid).children(recursive=True):
            child.send_signal(number)
    os.kill(command.process.pid, number)
    done = command.wait()
    assert time.monotonic() - clock < 10
    assert done.code == 3
    assert "Go on with the same command: python -m kitbench run" in done.text
    return done


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_saves_and_leaves(number: signal.Signals, workers: str) -> None:
    with folder(SUITE.replace("steps = 24", "steps = 4000").replace("every = 1", "every = 4000")) as place:
        command = Command(place, *RUN, "--workers", workers)
        while phase(place / "results") != "training":
            time.sleep(0.01)
        time.sleep(0.5)
        done = stopped(command, number, all_processes=workers != "0")
        assert "Warning" not in done.text
        [checkpoint] = place.glob("results/*/checkpoint.safetensors")
        with safetensors.safe_open(checkpoint, "pt") as file:
            assert f"stopped at step {file.metadata()['steps']} of 4000" in done.text


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("True", "stopped before anything was begun"),
        ("self.training and self.calls == 15", "stopped at step 14 of 24"),
        (
            "not self.training and x.shape[1] > 130 and type(x) is torch.Tensor",
            "stopped in the middle of a long operation",
        ),
    ],
)
def test_a_signal_in_the_middle_of_a_long_operator_ends_it(where: str, expected: str) -> None:
    """Before anything is begun, in the 15th step of training (probing takes nine), while scoring a large image."""
    with folder() as place:
        (place / "sleepy.py").write_text(SLEEPY.replace("WHERE", where))
        command = Command(place, *RUN, "--method", "sleepy.py")
        while not (place / "asleep").exists():
            assert command.process.is_alive()
            time.sleep(0.01)
        assert expected in stopped(command, signal.SIGTERM).text


FAILS = SLEEPY.replace("sleepy", "fails").replace('open("asleep", "w").close()', 'raise KeyError("says this test")')


def test_a_failed_run_is_kept_as_failed_until_it_succeeds(tmp_path: Path) -> None:
    with folder() as place:
        guard = "not __import__('os').path.exists('mended') and not self.training and x.shape[1] > 130"
        (place / "fails.py").write_text(FAILS.replace("WHERE", guard))
        command = (*RUN, "--method", "fails.py", "--method", "conv")
        done = kitbench(place, *command)
        assert done.code == 3
        [path] = place.glob("results/*/failed.json")
        assert path.parent.name.startswith("denoise-colour-fails-s0-")
        assert "says this test" in json.loads(path.read_text())["message"]
        assert "says this test" in kitbench(place, "status", "results").text
        table = kitbench(place, "table", "results")
        assert table.code == 0
        assert "failed, so missing or incomplete in the table: denoise-colour-fails" in table.text
        (place / "mended").touch()
        assert kitbench(place, *command).code == 0
        assert not leftovers(place / "results")


def test_a_run_that_needs_more_memory_than_there_is_is_refused_with_the_figure() -> None:
    with folder() as place:
        done = kitbench(
            place, *RUN, "--set", "recipe.batch=4096", "--set", "recipe.crop=256", "--set", "backbone.width=64"
        )
        assert done.code == 3
        assert "a training step needs about" in done.text
        assert "set a smaller --micro-batch" in " ".join(done.text.split())
