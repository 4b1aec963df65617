"""A stored run is made again from its own record, and what differs between two runs is told in the order that explains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_commands import RUN, SUITE, Done, folder, kitbench
from rich.console import Console

from kitbench.apply.reproduce import compare_runs, groups, reproduce
from kitbench.errors import InputError
from kitbench.runs.prepare import Options
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Environment, Run
from kitbench.verdict.differences import differences
from tests.conftest import ROOT
from tests.stored import retrained, store

OWN = '''
"""own: a mixing of channels."""
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, *, shift=False):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x):
        return self.mix(x)
'''


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    """A folder with finished runs of a shipped method, of a file of the user's own, and of a reference."""
    with folder() as place:
        (place / "own.py").write_text(OWN)
        done = kitbench(place, *RUN, "--method", "conv", "--method", "own.py", "--set", "task.sigma_test=[25]")
        assert done.code == 0, done.text
        yield place


def again(finished: Path, name: str, *arguments: str, code: int = 0) -> Done:
    [path] = finished.glob(f"results/denoise-colour-{name}*")
    done = kitbench(finished, "reproduce", str(path), *arguments, "--device", "cpu")
    assert done.code == code, done.text
    return done


@pytest.mark.parametrize(
    ("name", "arguments", "what"),
    [
        ("conv", (), "weights, losses and the scores of 2 images"),
        ("input", (), "the scores of 2 images"),
        ("own", ("--method", "own.py"), "weights, losses and the scores of 2 images"),
    ],
)
def test_a_stored_run_made_again_is_bit_identical(
    finished: Path, name: str, arguments: tuple[str, ...], what: str
) -> None:
    before = sorted(path for path in finished.rglob("*") if "__pycache__" not in path.parts)
    assert f": bit-identical: {what}" in again(finished, name, *arguments).text.replace("\n", " ")
    assert sorted(path for path in finished.rglob("*") if "__pycache__" not in path.parts) == before


@pytest.mark.parametrize("kept", [False, True])
def test_a_stopped_command_says_whether_it_can_go_on(kept: bool, tmp_path: Path) -> None:
    with folder(SUITE.replace("steps = 24", "steps = 300")) as place:
        assert kitbench(place, *RUN, "--set", "references=[]").code == 0
        command = subprocess.Popen(
            [sys.executable, "-m", "kitbench", "reproduce", "results", *(["--out", str(tmp_path / "kitbench-o")] * kept)],
            cwd=place, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 100
        while not list(tmp_path.glob("kitbench-*/*/progress.json")):
            assert command.poll() is None, command.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        command.terminate()
        _, said = command.communicate(timeout=60)
    assert command.returncode == 3
    assert ("Go on with the same command: python -m kitbench reproduce" in said) is kept
    assert ("The new runs are deleted; with --out FOLDER they are kept" in said) is not kept
    assert bool(list(tmp_path.glob("kitbench-*/*/checkpoint.safetensors"))) is kept


def test_a_committed_reference_run_is_reproduced() -> None:
    """To the last bit on the machine that made it with as many threads, within the seed spread elsewhere."""
    [path] = (ROOT / "results" / "reference" / "denoise-smoke-cpu").glob("denoise-colour-conv-s0-*")
    done = kitbench(ROOT, "reproduce", str(path), "--device", "cpu")
    assert done.code == 0, done.text
    assert f"{path.name}: bit-identical" in done.text or f"{path.name}: within the seed spread" in done.text


def test_methods_and_seeds_are_made_again_side_by_side(tmp_path: Path) -> None:
    """Those of which each method has each seed; another method of one seed, and one without training, are not."""
    for seed in (0, 1):
        store(tmp_path, "kit", 30.0, seed=seed)
        store(tmp_path, "conv", 30.0, seed=seed)
    store(tmp_path, "kit", 30.0, seed=2)
    store(tmp_path, "kit", 30.0, seed=0, lr=0.002)
    store(tmp_path, "input", 20.0, seed=None)
    grouped = [sorted((f.run.method, f.run.seed) for f in group) for group in groups(find([tmp_path]))]
    pairs = [("conv", 0), ("conv", 1), ("kit", 0), ("kit", 1)]
    assert sorted(grouped) == [pairs, [("input", None)], [("kit", 0)], [("kit", 2)]]
    with folder() as place:
        few = (*RUN, "--method", "conv", "--set", "references=[]", "--set", "task.sigma_test=[25]", "--seeds", "0,1")
        assert kitbench(place, *few).code == 0
        done = kitbench(place, "reproduce", "results", "--device", "cpu")
    assert done.code == 0, done.text
    assert done.text.count(": bit-identical: weights") == 2
    assert done.text.count("2 runs of 24 steps") == 1


def test_a_run_on_a_relative_path_says_where_to_give_the_command(tmp_path: Path) -> None:
    for name, told in (("./photos", True), ("Nope", False)):
        run = store(tmp_path / name, "conv", 30.0, data_set=name)
        with pytest.raises(InputError, match=re.escape(name)) as refused:
            reproduce([run], Options(tmp_path / "out", None, "cpu", 0, None), None, Console(quiet=True))
        assert ("Give the command in the folder in which the run on ./photos was made." in str(refused.value)) is told


def test_other_data_is_named_before_anything_is_trained(finished: Path, tmp_path: Path) -> None:
    [source] = finished.glob("results/denoise-colour-conv*")
    run = RunFolder(Path(shutil.copytree(source, tmp_path / "run")))
    run.write("run.json", run.run.model_copy(update={"train_sets": {"skimage-train": "ab" * 32}}))
    done = kitbench(finished, "reproduce", str(run.path))
    assert "different: the data differ, so nothing was run" in done.text
    assert "the first thing that differs: data: training set skimage-train: ababababab and" in done.text
    assert "24/24" not in done.text
    assert done.code == 1


def test_a_users_own_file_must_be_the_one_of_the_record(finished: Path) -> None:
    assert "give its Python file with --method" in again(finished, "own", code=2).text
    (finished / "other.py").write_text(OWN + "# changed\n")
    text = again(finished, "own", "--method", "other.py", code=2).text
    assert "is not the version that the run was made with" in " ".join(text.split())


def test_diff_of_a_run_with_itself_and_with_another(finished: Path) -> None:
    a, b = (str(next(finished.glob(f"results/denoise-colour-{name}*"))) for name in ("conv", "own"))
    assert "no difference: weights, losses and scores are bit-identical" in kitbench(finished, "diff", a, a).text
    text = kitbench(finished, "diff", a, b).text
    assert text.index("setting: attention: conv and") < text.index("numbers: loss at step 10")


def changed(run: RunFolder, **environment: object) -> RunFolder:
    record = run.run
    run.write("run.json", record.model_copy(update={"environment": record.environment.model_copy(update=environment)}))
    return run


def test_the_other_seeds_of_a_run_say_how_much_its_numbers_may_change(tmp_path: Path) -> None:
    """Seeds of 30, 30.2 and 30.4 dB spread by 0.2: 0.4 is allowed."""
    runs = [store(tmp_path / "stored", "kit", psnr, seed) for seed, psnr in enumerate((30.0, 30.2, 30.4))]
    for moved, verdict in ((0.0, "bit-identical"), (0.39, "within the seed spread"), (-0.41, "different")):
        made = store(tmp_path / f"made{moved}", "kit", 30.0 + moved, 0)
        made = retrained(made) if moved else made
        outcome = compare_runs(runs[0], changed(made, versions={"torch": "3"}), runs[1:])
        assert outcome.verdict == verdict
        if moved:
            assert str(outcome.first) == "version: torch: 2 and 3"
            assert "allowed: 0.4, from a standard deviation of 0.2 over 3 seeds" in outcome.why


def test_weights_that_are_equal_allow_no_spread_of_scores(tmp_path: Path) -> None:
    """A wrong stored score must not widen what it is allowed to be wrong by."""
    runs = [store(tmp_path / "stored", "kit", psnr, seed) for seed, psnr in enumerate((28.0, 30.2, 30.4))]
    made = store(tmp_path / "made", "kit", 30.0, 0)
    outcome = compare_runs(runs[0], made, runs[1:])
    assert outcome.verdict == "different"
    assert "weights and losses are bit-identical; PSNR on Set_A σ25 changed by +2 dB" in outcome.why
    assert "allowed: 0.01, by the same weights" in outcome.why


def test_one_seed_allows_a_tenth_of_a_decibel_and_no_training_a_hundredth(tmp_path: Path) -> None:
    for method, seed, allowed in (("kit", 0, 0.1), ("nlm", None, 0.01)):
        stored = store(tmp_path / "stored", method, 30.0, seed)
        for moved, verdict in ((0.9 * allowed, "within the seed spread"), (1.1 * allowed, "different")):
            made = store(tmp_path / f"{method}{moved}", method, 30.0 + moved, seed)
            made = made if seed is None else retrained(made)
            assert compare_runs(stored, made, []).verdict == verdict


def test_what_explains_comes_first(tmp_path: Path) -> None:
    a, b = (store(tmp_path / name, "kit", 30.0 + number, sha256=name) for number, name in enumerate("ab"))
    changed(
        b, commit="c" * 40, device="NVIDIA H100", versions={"torch": "3"}, flags={"tf32": True}, threads=9, host="i"
    )
    kinds = [difference.kind for difference in differences(a, b)]
    assert kinds == ["data", "code", "device", "version", "flag", "threads", "host", "numbers", "numbers"]
    assert str(differences(a, b)[1]) == "code: commit: cccccccccc in the second run, not stated in the first"


def test_every_field_of_the_environment_is_compared_or_no_cause_of_a_difference() -> None:
    """A new field must be given its kind in differences.py, or stand here."""
    compared = {"kitbench", "commit", "device", "driver", "python", "threads", "host", "versions", "flags"}
    assert set(Environment.model_fields) == compared | {"command", "started"}
    assert "environment" in Run.model_fields
