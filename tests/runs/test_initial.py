"""Fine-tuning: training starts from a stored run's weights, and the key knows which."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console
from skimage import data as photographs

from kitbench.apply import reproduce
from kitbench.cli.main import cli
from kitbench.errors import InputError, RunError
from kitbench.runs.cell import Cell
from kitbench.runs.checkpoint import trained_state
from kitbench.runs.initial import initial_weights, seen_images, stored_run
from kitbench.runs.prepare import Options
from kitbench.runs.tune import Search, tune
from kitbench.spec.loading import load_suite
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder, find
from kitbench.verdict.render import render
from tests.conftest import TINY

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """`run` in this process, of two steps that change nothing (rate 1e-12) on small crops, where tiny.toml lies."""
    (tmp_path / "tiny.toml").write_text(TINY)
    for name, folder in (("coffee", "train"), ("chelsea", "test")):
        (tmp_path / folder).mkdir()
        Image.fromarray(getattr(photographs, name)()[100:148, 100:148]).save(tmp_path / folder / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KITBENCH_DATA", raising=False)

    def run(*arguments: str, code: int = 0) -> Result:
        still = [word for key in ("steps=2", "lr=1e-12", "lr_min=0", "warmup=0") for word in ("--set", f"recipe.{key}")]
        sets = ["--train-set", "./train", "--test-set", "./test", "--set", "references=[]"]
        words = ["run", "--suite", "tiny.toml", "--seeds", "3", "--jobs", "1", *sets, *still]
        done = CliRunner().invoke(cli, [*words, *arguments])
        assert done.exit_code == code, done.output
        return done

    yield run
    torch.use_deterministic_algorithms(False)


def conv_of(runs: Path, seed: int = 0) -> RunFolder:
    return RunFolder(next(runs.glob(f"*-conv-s{seed}-*")))


def test_training_starts_from_the_weights_of_the_run(invoke: Invoke, tiny_runs: Path, tmp_path: Path) -> None:
    first = conv_of(tiny_runs)
    shutil.copytree(first.path, tmp_path / "results" / first.path.name)
    short = first.path.name.rpartition("-")[2][:6]
    done = invoke("--method", "conv", "--set", f"recipe.init={short}")
    assert f"training starts from the weights of results/{first.path.name}" in done.output.replace("\n", "")
    [made] = [folder for folder in find([tmp_path / "results"]) if folder.run.seed == 3]
    before, after = trained_state(first), trained_state(made)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-9, rtol=0)
    training = first.training
    assert training is not None
    assert made.run.identity["init_sha256"] == training.weights_sha256
    assert made.run.recipe is not None
    assert made.run.recipe.init == f"results/{first.path.name}"
    # The same cell however its run is named: nothing is run again.
    again = invoke("--method", "conv", "--set", f"recipe.init=results/{first.path.name}")
    assert "1 of 1 runs are complete" in again.output

    # Without `init` it is another cell, in another table.
    assert first.run.comparison != made.run.comparison
    assert f"fine-tuned from {first.path.name}" in render([made], "markdown").replace("\n", " ")

    # Made again from its record alone; and with other weights in that place, refused to be the same.
    options = Options(tmp_path / "again", None, "cpu", 0, None, jobs=1)
    [outcome] = reproduce.reproduce([made], options, None, Console(quiet=True))
    assert outcome.verdict == "bit-identical"
    told: list[str] = []
    assert seen_images(made, None, told.append).keys() == {"./train", "skimage-train"}
    assert not told
    shutil.rmtree(tmp_path / "results" / first.path.name)
    assert seen_images(made, None, told.append).keys() == {"./train"}
    assert told == [
        f"not compared with the training images of results/{first.path.name}, from which {made.path} started: "
        "it is not here"
    ]
    shutil.copytree(conv_of(tiny_runs, 1).path, tmp_path / "results" / first.path.name)
    [outcome] = reproduce.reproduce([made], options, None, Console(quiet=True))
    assert outcome.verdict == "different"
    assert "weights that training starts from" in str(outcome.first)


def test_images_that_the_weights_were_trained_on_are_no_test_images(
    invoke: Invoke, tiny_runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "seen").mkdir()
    Image.fromarray(photographs.coffee()[200:264, 200:264]).save(tmp_path / "seen" / "a.png")
    words = ("--method", "conv", "--test-set", "./seen", "--dry-run")
    invoke(*words)
    done = invoke(*words, "--set", f"recipe.init={conv_of(tiny_runs).path}", code=2)
    assert "Training and test images overlap: skimage-train/coffee contains all or part of ./seen/a" in done.stderr


def test_what_cannot_start_a_training_is_refused_in_one_sentence(
    invoke: Invoke, tiny_runs: Path, tmp_path: Path
) -> None:
    conv, reference = conv_of(tiny_runs).path, next(tiny_runs.glob("*-input-*"))
    shutil.copytree(tiny_runs, tmp_path / "results")
    shutil.copytree(conv, tmp_path / "results" / "x-abcd111111")
    shutil.copytree(conv, tmp_path / "results" / "x-abcd222222")
    for name, method, sentence in (
        (str(conv), "kit", "The weights of recipe.init are those of colour conv: "),
        (str(reference), "conv", "has no trained weights; finish that run, or give another one"),
        ("0000000000", "conv", "recipe.init: 0000000000 is neither the folder of a run nor the beginning of the hash"),
        ("abcd", "conv", "abcd begins the hashes of results/x-abcd111111 and results/x-abcd222222; give more digits"),
        ("abc", "conv", "(4 digits or more)"),
        ("none/here", "conv", "none/here is neither the folder"),
    ):
        done = invoke("--method", method, "--set", f'recipe.init="{name}"', "--out", "results", code=2)
        assert sentence in done.stderr.replace("\n", " ")
        assert done.stderr.count("\n") == 1
    (tmp_path / "results" / "x-abcd111111" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        initial_weights(load_suite("denoise", overrides=["recipe.init=abcd1"]), tmp_path / "results")
    assert stored_run("abcd1", tmp_path / "results").path.name == "x-abcd111111"


def test_the_key_knows_the_weights_and_not_their_place() -> None:
    def key(init: str | None, sha256: str | None) -> str:
        overrides = [] if init is None else [f"recipe.init={init}"]
        suite = load_suite("denoise", "smoke", overrides)
        return Cell(suite, "colour", "conv", "conv", None, {}, 0, "cpu", "00", init_sha256=sha256).key

    for digits in ("12345678", "3e14567890", "0012345678"):  # numbers to TOML
        assert load_suite("denoise", overrides=[f"recipe.init={digits}"]).recipe.init == digits
    assert key("a", "11") == key("b", "11")
    assert len({key(None, None), key("a", "11"), key("a", "22")}) == 3


def test_a_search_of_rates_starts_from_a_run_that_is_named_by_its_hash(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials lie in a folder of their own, where that run is not."""
    first = tmp_path / conv_of(tiny_runs).path.name
    shutil.copytree(conv_of(tiny_runs).path, first)
    key = RunFolder(first).run.key

    def trial(suite: Suite, options: Options, console: Console) -> None:
        assert suite.recipe.init is not None
        raise RunError(f"would start from {stored_run(suite.recipe.init, options.out).path}")

    monkeypatch.setattr("kitbench.runs.tune.run_suite", trial)
    for digits in (key[:6], key):
        suite = load_suite("denoise", "smoke", [f"recipe.init={digits}"])
        with pytest.raises(RunError, match=f"would start from {first}"):
            tune(suite, Options(tmp_path, None, "cpu", 0, None), Search((1e-3, 2e-3), 1000), Console(quiet=True))
    other = key[:-1] + ("0" if key[-1] != "0" else "1")
    with pytest.raises(InputError, match="is neither the folder of a run"):
        stored_run(other, tmp_path)
