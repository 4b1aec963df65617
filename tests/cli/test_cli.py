"""The real command line, in a temporary folder: what it does, what it refuses, and that it refuses before writing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

from kitbench.cli.main import cli
from tests.conftest import TINY, Kitbench, run_kitbench


def runs(out: Path) -> dict[str, Path]:
    """Folder of each run, by its name without the key."""
    return {path.parent.name.rpartition("-")[0]: path.parent for path in sorted(out.glob("*/run.json"))}


def numbers(run: Path) -> object:
    """All that must be bit-identical between two runs of one cell on one machine."""
    scores = [
        [evaluation["data_set"], evaluation["sigma"], score["image"], score["psnr"], score["ssim"]]
        for path in sorted((run / "eval").glob("*.json"))
        for evaluation in [json.loads(path.read_text())]
        for score in evaluation["scores"]
    ]
    weights = run / "weights.safetensors"
    state = safetensors.torch.load_file(weights) if weights.is_file() else {}
    return scores, {name: tensor.numpy().tobytes() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml and its finished runs; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(TINY)
    done = run_kitbench(folder, "run", "--suite", "tiny.toml")
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_the_main_job_runs_from_end_to_end(finished: Path) -> None:
    text = (finished / "stdout").read_text()
    for expected in ("suite     tiny", "train on skimage-train (4)", "test on skimage-test (2)", "12 steps", "device    cpu",
                     "parameters", "GMACs at 256 px", "expected  about", "12/12", "loss", "dB", "wrote results"):  # fmt: skip
        assert expected in text
    assert list(runs(finished / "results")) == [
        "denoise-colour-conv-s0",
        "denoise-colour-input",
        "denoise-colour-kit-s0",
    ]
    for name, run in runs(finished / "results").items():
        record = json.loads((run / "run.json").read_text())
        assert run.name.endswith(record["key"][:10])
        assert record["environment"]["versions"]["torch"] == torch.__version__
        files = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and p.name != ".lock")
        scored = [f"crops/skimage-test-25-awgn8.v1+*-{i}.png" for i in (0, 1)] + [
            "eval/skimage-test-25-awgn8.v1+*.json"
        ]
        trained = ["log.csv", "training.json", "weights.safetensors"] if "input" not in name else []
        expected = sorted([*scored, "run.json", *trained])
        assert len(files) == len(expected)
        assert all(fnmatch(file, pattern) for file, pattern in zip(files, expected, strict=True))


def test_the_recall_of_the_hashing_is_kept_with_the_run(finished: Path) -> None:
    record = json.loads((runs(finished / "results")["denoise-colour-kit-s0"] / "training.json").read_text())
    notes = record["notes"]
    assert list(notes) == ["bottom.0.attention"]
    [note] = notes.values()
    assert note["retrieval"] == "lsh"
    assert note["chance"] < note["recall"] <= 1
    assert 0 <= note["adjacent"] < 1
    assert note["distance"] >= 1
    assert (note["crops"], note["images"], note["level"]) == (20, 2, 2)
    assert (note["sets"], note["condition"], note["side"]) == ("skimage-test", "σ25", 128)


def test_a_finished_cell_is_not_run_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    done = run_kitbench(tmp_path, "run", "--suite", "tiny.toml")
    assert "3 of 3 runs are complete" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}


def test_two_runs_of_one_cell_are_bit_identical(finished: Path, kitbench: Kitbench, tmp_path: Path) -> None:
    kitbench("run", "--suite", "tiny.toml")
    for name, run in runs(finished / "results").items():
        assert numbers(runs(tmp_path / "results")[name]) == numbers(run)


def test_a_run_stopped_by_a_signal_goes_on_with_the_same_command(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "kitbench", "run", "--suite", "tiny.toml", "--method", "kit"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    checkpoint = None
    while checkpoint is None and process.poll() is None:
        checkpoint = next(tmp_path.glob("results/*/checkpoint.safetensors"), None)
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    assert "stopped" in stderr
    assert "Go on with the same command: python -m kitbench run --suite tiny.toml --method kit" in stderr
    saved = re.search(r"stopped at step (\d+) of 12", stderr)
    status = CliRunner().invoke(cli, ["status", str(tmp_path / "results")]).output
    assert saved is None or f"{saved[1]}/12" in status
    run_kitbench(tmp_path, "run", "--suite", "tiny.toml", "--method", "kit")
    name = "denoise-colour-kit-s0"
    assert numbers(runs(tmp_path / "results")[name]) == numbers(runs(finished / "results")[name])


def test_evaluations_are_added_to_a_stored_training(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("weights.safetensors")}
    run_kitbench(tmp_path, "run", "--suite", "tiny.toml", "--set", "task.sigma_test=[15, 25]")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("weights.safetensors")}
    table = run_kitbench(tmp_path, "table", "results", "--format", "markdown").stdout
    assert "skimage-test σ15" in table
    assert "skimage-test σ25" in table


def test_the_table_command_repeats_the_table_of_the_run(finished: Path, tmp_path: Path) -> None:
    table = run_kitbench(finished, "table", "results").stdout
    assert table in (finished / "stdout").read_text()
    out = tmp_path / "table.tex"
    run_kitbench(finished, "table", "results", "--format", "latex", "--out", str(out))
    assert r"\toprule" in out.read_text()


USERS_OWN = '''
"""mine: a 1x1 mixing of channels; only to show the signature."""
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads, *, shift=False, gain: float = 1.0):
        super().__init__()
        self.gain, self.mix = gain, nn.Linear(dim, dim)

    def forward(self, x):
        return self.gain * self.mix(x)

    def macs(self, height, width):
        return height * width * self.mix.in_features**2
'''


def test_a_users_own_attention_runs_without_a_change_to_kitbench(kitbench: Kitbench, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS_OWN)
    arguments = (
        "run",
        "--suite",
        "tiny.toml",
        "--method",
        "mine.py",
        "--set",
        "recipe.steps=2",
        "--set",
        "recipe.warmup=0",
    )
    done = kitbench(*arguments)
    assert "mine: " in done.stdout
    [first] = [name for name in os.listdir(tmp_path / "results") if "mine" in name]
    (tmp_path / "mine.py").write_text(USERS_OWN + "# a change of the file is another method\n")
    kitbench(*arguments)
    assert len([name for name in os.listdir(tmp_path / "results") if "mine" in name]) == 2
    assert first in os.listdir(tmp_path / "results")


def test_gray_is_a_mode_like_colour(kitbench: Kitbench, tmp_path: Path) -> None:
    kitbench(
        "run",
        "--suite",
        "tiny.toml",
        "--method",
        "conv",
        "--set",
        "data.embedded.modes=['gray']",
        "--set",
        "recipe.steps=4",
    )
    table = kitbench("table", "results", "--format", "csv").stdout
    assert "gray" in table
    assert "skimage-gray" in table


def test_the_suite_runs_on_real_sets_and_names_those_that_are_not_there(
    kitbench: Kitbench, tmp_path: Path, data_root: Path
) -> None:
    """Two steps of training, then all of CBSD68 and Set12 at one sigma."""
    done = kitbench(
        "run", "--suite", "tiny.toml", "--data", str(data_root), "--method", "conv",
        "--set", "recipe.steps=2", "--set", "recipe.warmup=0",
        "--set", "data.folder.colour.test=['CBSD68', 'Urban100']",
    )  # fmt: skip
    assert "without Urban100" in done.stdout
    table = kitbench("table", "results", "--format", "csv").stdout
    assert "CBSD68,25" in table
    assert "Set12,25" in table


def bad_data(tmp_path: Path) -> None:
    (tmp_path / "data" / "BSDS500" / "images" / "train").mkdir(parents=True)
    (tmp_path / "data" / "CBSD68").mkdir()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run"], "Missing option '--suite'"),
        (["runn"], "No such command"),
        (["run", "--suite", "denois"], "did you mean 'denoise'?"),
        (["run", "--suite", "denoise", "--preset", "quik"], "did you mean 'quick'?"),
        (["run", "--suite", "denoise", "--sett", "a=b"], "No such option"),
        (["run", "--suite", "tiny.toml", "--set", "recipe.step=2"], "did you mean 'recipe.steps'?"),
        (["run", "--suite", "tiny.toml", "--set", "recipe.steps=0"], "greater than or equal to 1"),
        (["run", "--suite", "tiny.toml", "--method", "windw"], "no method 'windw'"),
        (["run", "--suite", "tiny.toml", "--method", "none.py"], "does not exist"),
        (["run", "--suite", "tiny.toml", "--method", "broken.py"], "cannot be imported: SyntaxError"),
        (["run", "--suite", "tiny.toml", "--method", "shape.py"], "expected the shape of its input"),
        (["run", "--suite", "tiny.toml", "--set", "methods.kit.kk=2"], "no setting 'kk'; did you mean 'k'?"),
        (["run", "--suite", "tiny.toml", "--set", "methods.kit.k=0"], "'kit' cannot be built"),
        (["run", "--suite", "tiny.toml", "--set", "recipe.crop=512"], "smaller than the crop of 512"),
        (["run", "--suite", "tiny.toml", "--set", "data.embedded.colour.test=['skimage-gray']"], "is gray"),
        (["run", "--suite", "tiny.toml", "--set", "data.embedded.colour.train=['skimage-test']"], "overlap"),
        (["run", "--suite", "tiny.toml", "--set", "data.embedded.colour.test=['CBSD86']"], "did you mean 'CBSD68'?"),
        (["run", "--suite", "tiny.toml", "--set", "data.embedded.colour.train=['GoPro-train']"], "is made for deblur"),
        (["run", "--suite", "tiny.toml", "--data", "missing"], "Data folder missing does not exist"),
        (["run", "--suite", "tiny.toml", "--data", "data"], "BSDS500"),
        (["run", "--suite", "tiny.toml", "--device", "tpu"], "is no device"),
        (["run", "--suite", "tiny.toml", "--seeds", "a"], "whole numbers"),
        (["run", "--suite", "tiny.toml", "--out", "tiny.toml/results"], "cannot be written"),
        (["run", "--suite", "tiny.toml", "--workers", "-1"], "Invalid value for '--workers'"),
        (["table", "missing"], "is not a folder"),
        (["table", "."], "No run in"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_and_exit_code_2_and_nothing_is_written(
    kitbench: Kitbench, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "broken.py").write_text("def :")
    (tmp_path / "shape.py").write_text(USERS_OWN.replace("return self.gain * self.mix(x)", "return x[:, :-1]"))
    bad_data(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    done = kitbench(*arguments, code=2)
    assert expected in done.stderr
    sentence = [line for line in done.stderr.splitlines() if line.startswith("kitbench: ")]
    assert len(sentence) == 1 or "Usage:" in done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none(kitbench: Kitbench, tmp_path: Path) -> None:
    assert "there is no CUDA device" in kitbench("run", "--suite", "tiny.toml", "--device", "cuda", code=2).stderr
    assert not (tmp_path / "results").exists()


def test_one_failed_run_leaves_the_others_and_gives_exit_code_3(kitbench: Kitbench, tmp_path: Path) -> None:
    """An attention that passes the check, whose maps are 16 and 17 px, and fails on the test images."""
    guard = (
        "if x.shape[1] > 130:\n            raise KeyError('out of memory, says this test')\n        return self.gain"
    )
    (tmp_path / "fails.py").write_text(USERS_OWN.replace("return self.gain", guard))
    done = kitbench("run", "--suite", "tiny.toml", "--method", "fails.py", "--method", "conv", code=3)
    assert "out of memory, says this test" in done.stderr
    assert "denoise-colour-fails-s0" in done.stdout
    assert "denoise-colour-conv-s0" in runs(tmp_path / "results")
    assert "conv" in kitbench("table", "results").stdout


def test_list_shows_suites_methods_data_sets_and_recipes(kitbench: Kitbench, data_root: Path) -> None:
    text = kitbench("list").stdout
    for name in (
        "denoise",
        "smoke, quick, standard, full",
        "kit-random",
        "training-free",
        "Urban100",
        "with scikit-image",
        "awgn8-seed0.v1",
    ):
        assert name in text
    assert "Set12" in kitbench("list", "--data", str(data_root)).stdout


def test_the_name_of_a_folder_is_no_markup(kitbench: Kitbench, tmp_path: Path) -> None:
    (tmp_path / "[red]images").mkdir()
    assert "data folder: [red]images)" in kitbench("list", "--data", "[red]images").stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from kitbench.cli.main import cli; print(sorted({'torch', 'pandas', 'skimage', 'pydantic', 'cv2'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(
    "words",
    ["table {0} --format json", "list", "status {0}", "restore {0}/*-kit-s0-*/crops --run {0}/*-kit-s0-* --out {1}"],
)
def test_a_closed_pipe_is_no_failed_check(tiny_runs: Path, tmp_path: Path, words: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m kitbench {words.format(tiny_runs, tmp_path / 'o')} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == ""


def test_a_check_that_failed_says_so_in_its_exit_code_through_a_closed_pipe(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    command = f"set -o pipefail; {sys.executable} -m kitbench data check {tmp_path} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
