"""What somebody new types: methods, sets and runs named in the ways that one guesses; help that can be read."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from kitbench.errors import InputError
from kitbench.model.methods import method_cards
from kitbench.spec import loading
from tests.cli.conftest import call
from tests.conftest import TINY
from tests.stored import store


def mkdir(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cells(*arguments: str) -> list[str]:
    """The cells that a run with these arguments would work on."""
    lines = call("run", "--suite", "tiny.toml", *arguments, "--dry-run").stdout.splitlines()
    return [line.split()[0] for line in lines if line.startswith(("colour/", "gray/"))]


# Methods


def test_one_attention_is_not_trained_twice_under_two_names(here: Path) -> None:
    (here / "tiny.toml").write_text(TINY.replace("[methods.conv]", '[methods.same]\nattention = "kit"\npatch = 4'))
    done = call("run", "--suite", "tiny.toml", "--dry-run", code=2)
    assert "Methods 'kit' and 'same' are one attention with the same settings, which would be trained" in done.stderr
    call("run", "--suite", "tiny.toml", "--set", "methods.same.k=2", "--dry-run")


@pytest.mark.parametrize(
    "words", [["--method", "kit", "--method", "conv"], ["--method", "kit,conv"], ["--methods", "kit, conv"]]
)
def test_methods_are_repeated_or_listed_with_commas(here: Path, words: list[str]) -> None:
    assert cells(*words) == ["colour/input", "colour/kit/0", "colour/conv/0"]


def test_an_option_of_commas_alone_names_nothing(here: Path) -> None:
    assert "no name is given" in call("run", "--suite", "tiny.toml", "--method", ",", code=2).stderr


def test_two_files_of_one_name_are_refused(here: Path) -> None:
    for folder in ("one", "two"):
        (here / folder).mkdir()
        (here / folder / "mine.py").write_text("")
    refused = call("run", "--suite", "tiny.toml", "--method", "one/mine.py,two/mine.py", code=2).stderr
    assert "one/mine.py and two/mine.py would both be the method 'mine'; rename one" in refused


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("methods.kit.tau=nan", "methods.kit.tau is nan: expected a finite number"),
        ("task.sigma_test=25", "task.sigma_test is 25: expected a list, like [1, 2]"),
        ("task.sigma_test=[]", "task.sigma_test is []: expected at least one value"),
        ("task.sigma_test=[25, 25]", "noise levels of sigma_test must differ in six digits, found [25.0, 25.0]"),
        ("task.sigma_test=[25, 25.00001]", "noise levels of sigma_test must differ in six digits, found [25.0, 25."),
    ],
)
def test_a_value_of_another_kind_is_told_in_words(here: Path, setting: str, sentence: str) -> None:
    assert sentence in call("run", "--suite", "tiny.toml", "--set", setting, code=2).stderr


def test_scale_takes_its_methods_as_run_does_and_drops_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--methods A --methods B` measured B alone."""
    seen: list[tuple[str, ...]] = []

    def stop(options: object, console: object) -> None:
        seen.append(options.methods)  # type: ignore[attr-defined]
        raise InputError("far enough")

    monkeypatch.setattr("kitbench.cost.sweep.run.run_scale", stop)
    both = ("window", "global:form=sdpa")
    call("scale", "--methods", both[0], "--methods", both[1], code=2)
    call("scale", "--method", ",".join(both), code=2)
    call("scale", code=2)
    assert seen[:2] == [both, both]
    assert seen[2][:2] == ("conv", "kit")


def test_every_shipped_method_that_can_be_trained_is_accepted_in_any_suite() -> None:
    kinds = {name: kind for name, (kind, _) in method_cards().items()}
    for name, kind in kinds.items():
        chosen = loading.load_suite("denoise", methods=[name], shipped=kinds)
        if kind == "training-free":
            assert (dict(chosen.methods), chosen.references) == ({}, (name,))
        else:
            assert [(key, method.attention) for key, method in chosen.methods.items()] == [(name, name)]
    both = loading.load_suite("denoise", methods=["nlm", "kit"], shipped=kinds)
    assert (list(both.methods), both.references) == (["kit"], ("nlm",))
    with pytest.raises(InputError, match="did you mean 'neighbourhood'"):
        loading.load_suite("denoise", methods=["neighborhood"], shipped=kinds)


def test_a_method_that_the_suite_does_not_name_takes_settings_and_runs(here: Path) -> None:
    assert cells("--method", "neighbourhood", "--set", "methods.neighbourhood.size=3") == [
        "colour/input",
        "colour/neighbourhood/0",
    ]
    assert cells("--method", "input") == ["colour/input"]
    assert "eval" in call("run", "--suite", "tiny.toml", "--method", "dncnn", "--dry-run", code=2).stderr


# Sets


@pytest.mark.parametrize("source", ["embedded", "folder"])
@pytest.mark.parametrize("value", ["A,B", "['A', 'B']", "A, B"])
def test_a_short_key_names_the_sets_of_every_mode(source: str, value: str) -> None:
    data = getattr(loading.load_suite("denoise", overrides=[f"data.train={value}", "data.test=C"]).data, source)
    assert [(sets.train, sets.test) for sets in (data.colour, data.gray)] == [(("A", "B"), ("C",))] * 2
    assert getattr(loading.load_suite("denoise", overrides=["data.modes=gray"]).data, source).modes == ("gray",)


def test_what_no_set_can_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"--set data.train: .*'A,B'"):
        loading.load_suite("denoise", overrides=["data.train=3"])
    with pytest.raises(InputError, match="did you mean 'data.train'"):
        loading.load_suite("denoise", overrides=["data.trian=A"])


def test_sets_are_chosen_by_options_alone(here: Path) -> None:
    assert cells("--train-set", "skimage-train", "--test-set", "skimage-validation") == [
        "colour/input",
        "colour/kit/0",
        "colour/conv/0",
    ]
    wrong = call("run", "--suite", "tiny.toml", "--test-set", "CBSD86", "--dry-run", code=2)
    assert "did you mean 'CBSD68'" in wrong.stderr


def pictures(folder: Path, count: int) -> None:
    """As many gray pictures of noise, 64 x 48 px."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64), np.uint8)
        cv2.imwrite(str(folder / f"{number:02}.png"), pixels)


def test_a_data_folder_with_test_sets_only_says_which_keys_choose_others(here: Path) -> None:
    pictures(here / "data" / "Set12", 12)
    words = ("run", "--suite", "tiny.toml", "--data", "data", "--dry-run")
    missing = call(*words, "--set", "data.modes=gray", code=2).stderr
    assert "BSDS500-399 is not in data" in missing
    assert "--train-set" in missing
    assert "data.folder.gray.train" in missing
    # Without --train-set a colour mode would be trained that has no test set here.
    done = call(*words, "--train-set", "skimage-train", code=2)
    assert "Set12" in done.stderr  # twelve pictures, but not those of Set12


def test_a_set_without_a_data_folder_names_the_option(here: Path) -> None:
    refused = call("run", "--suite", "denoise", "--preset", "smoke", "--test-set", "Kodak24", code=2).stderr
    assert "None of the test sets Kodak24 is in any data folder: give one with --data" in refused


def test_the_folder_of_one_set_is_not_taken_for_the_folder_of_all(here: Path) -> None:
    """`data check` compared the built-in sets, and said that all was well."""
    for number in range(24):
        Image.new("RGB", (8, 8)).save(mkdir(here / "data" / "Kodak24") / f"kodim{number + 1:02}.png")
    hint = "data/Kodak24, which looks like the folder of one set (--data takes the folder above it)"
    assert hint in call("data", "check", "--data", "data/Kodak24", code=2).stderr
    words = ("run", "--suite", "denoise", "--preset", "smoke", "--test-set", "Kodak24", "--data", "data/Kodak24")
    assert hint in call(*words, code=2).stderr
    assert (
        "No data set is in empty; " in call("data", "check", "--data", str(mkdir(here / "empty").name), code=2).stderr
    )


def test_a_gray_set_in_colour_mode_says_how_to_run_gray_alone(here: Path) -> None:
    done = call("run", "--suite", "tiny.toml", "--test-set", "skimage-gray", "--dry-run", code=2)
    assert "is gray" in done.stderr
    assert "--set data.modes=gray" in done.stderr
    assert cells("--test-set", "skimage-gray", "--set", "data.modes=gray")[0] == "gray/input"


def test_a_folder_of_any_name_is_taken_from_the_command_line(here: Path) -> None:
    """TOML refuses the escapes by which JSON writes what lies beyond the first 65,536 characters."""
    done = call("run", "--suite", "tiny.toml", "--test-set", "./\N{CAMERA}é", "--dry-run", code=2)
    assert "kitbench: ./\N{CAMERA}é is not a folder" in done.stderr


def test_an_unknown_set_names_the_nearest_ones_and_not_all(here: Path) -> None:
    done = call("run", "--suite", "tiny.toml", "--test-set", "Kodak", "--dry-run", code=2)
    assert "Kodak24" in done.stderr
    assert "kitbench list" in done.stderr
    assert len(done.stderr) < 300


# Runs


def test_a_run_is_named_by_the_first_digits_of_its_key(here: Path) -> None:
    folders = [store(here / "results" / "deep", "kit", 30.0 + seed, seed=seed) for seed in (0, 1)]
    keys = [folder.run.key for folder in folders]
    short = [key[:8] for key in keys]
    named = call("diff", *short).stdout
    assert named == call("diff", *(str(folder.path) for folder in folders)).stdout
    assert call("diff", *keys).stdout == named
    assert call("diff", *(f"results/{key[:6]}" for key in keys)).stdout == named
    assert "kit" in call("table", short[0]).stdout


def test_digits_that_name_no_run_or_several_are_refused(here: Path) -> None:
    assert "ab is no folder, and of a run's key it is too little" in call("diff", "ab", "cd", code=2).stderr
    stored = store(here / "results", "kit", 30.0)
    key = stored.run.key
    other = ("0" if key[0] != "0" else "1") + key[1:]
    assert "No run whose key begins with" in call("table", other[:10], code=2).stderr
    assert "No run whose key begins with" in call("table", key[:-1] + ("0" if key[-1] != "0" else "1"), code=2).stderr
    store(here / "results" / "copy", "kit", 30.0)
    refused = call("diff", key[:10], key[:10], code=2).stderr
    assert "results/copy" in refused
    assert "is not a folder" in call("table", "missing", code=2).stderr
    assert "No run whose key begins with" in call("retrieval", "--run", other[:10], code=2).stderr


def test_diff_rounds_shows_what_moved_and_names_the_image_that_moved_most(here: Path) -> None:
    psnr = np.array([30.0, 31.0, 32.0])
    store(here / "a", "kit", psnr, settings={"k": 4})
    store(here / "b", "kit", psnr + np.array([0.01, 0.5, 0.0]), ssim=0.5 + 1e-13, settings={"patch": 8})
    lines = call("diff", "a", "b").stdout.splitlines()
    assert "setting: settings.k: 4 in the first run, not stated in the second" in lines
    assert "setting: settings.patch: 8 in the second run, not stated in the first" in lines
    [mean] = [line for line in lines if "mean over 3 images" in line]
    assert mean.startswith(
        "numbers: Set_A σ25 awgn8.v1, mean over 3 images, of which 3 differ: 31.00 and 31.17 (+0.17) dB"
    )
    assert "SSIM 0.5000 and 0.5000 (+1e-13)" in mean
    [most] = [line for line in lines if "most of all" in line]
    assert "most of all 1: 31.00 and 31.50 (+0.5) dB" in most
    assert not [line for line in lines if re.search(r"\d\.\d{7}", line)]


def test_the_missing_weights_of_lpips_are_told_once_with_the_option_that_names_them(here: Path) -> None:
    (here / "tiny.toml").write_text(TINY.replace('lpips = "none"', 'lpips = "squeeze"'))
    (here / "weights").mkdir()
    words = ("run", "--suite", "tiny.toml", "--method", "input", "--lpips-weights", "weights")
    assert "--lpips-weights FILE" in call(*words).stdout
    again = call(*words, "--set", "task.sigma_test=[15, 25]").stdout
    assert "lpips" not in again
    assert "σ15" in again


@pytest.mark.parametrize("name", ["nowhere.pth", "tiny.toml"])
def test_a_file_of_weights_that_is_named_and_is_none_is_refused(here: Path, name: str) -> None:
    """Only where it is missing from its usual place, or from a folder, LPIPS is left out with a note."""
    (here / "tiny.toml").write_text(TINY.replace('lpips = "none"', 'lpips = "squeeze"'))
    words = ("run", "--suite", "tiny.toml", "--method", "input", "--lpips-weights", name)
    done = call(*words, code=2)
    assert name in done.stderr
    assert not (here / "results").exists()
