"""Differences of all methods from one, set by set, against a second computation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kitbench.cli.main import cli
from tests.stored import store

RNG = np.random.default_rng(5)
IMAGES = RNG.normal(30, 2, 12)


def printed(*arguments: object) -> str:
    found = CliRunner().invoke(cli, ["table", *map(str, arguments)])
    assert found.exit_code == 0, found.output
    return found.output


def cells(text: str, method: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {method} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_of_one_seed_each_set_has_its_mean_and_its_error_over_images(tmp_path: Path) -> None:
    gains = {"Set_A": RNG.normal(0.2, 0.1, 12), "Set_B": RNG.normal(-0.1, 0.1, 12)}
    for data_set, gain in gains.items():
        store(tmp_path, "kit", IMAGES + gain, data_set=data_set)
        store(tmp_path, "window", IMAGES, data_set=data_set)
    text = printed(tmp_path, "--against", "window")
    expected = [f"{gain.mean():+.3f} ({gain.std(ddof=1) / np.sqrt(12):.3f})" for gain in gains.values()]
    assert cells(text, "kit") == expected
    assert "nothing is decided" in text


def test_several_seeds_have_intervals_and_are_bold_where_the_difference_is_decided(tmp_path: Path) -> None:
    for seed in range(5):
        store(tmp_path, "window", IMAGES, seed)
        store(tmp_path, "kit", IMAGES + 0.5 + RNG.normal(0, 0.01, 12), seed)
        store(tmp_path, "local", IMAGES + RNG.normal(0, 0.05, 12) + RNG.normal(0, 0.05), seed)
    text = printed(tmp_path, "--against", "window")
    found = re.fullmatch(r"\*\*([+-][\d.]+)\*\* \[([+-][\d.]+), ([+-][\d.]+)\]", cells(text, "kit")[0])
    assert found is not None
    mean, low, high = map(float, found.groups())
    assert low < 0.5 < high
    assert mean == pytest.approx(0.5, abs=0.01)
    assert "*" not in cells(text, "local")[0]


def test_a_set_that_a_method_was_not_scored_on_is_na(tmp_path: Path) -> None:
    store(tmp_path, "window", IMAGES)
    store(tmp_path, "window", IMAGES, data_set="Set_B")
    store(tmp_path, "kit", IMAGES, data_set="Set_B")
    store(tmp_path, "local", IMAGES)
    text = printed(tmp_path, "--against", "window")
    assert cells(text, "kit") == ["n/a", "+0.000 (0.000)"]
    assert cells(text, "local") == ["+0.000 (0.000)", "n/a"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    store(tmp_path, "kit", IMAGES)
    for arguments, sentence in (
        (["--against", "window"], "Nothing to compare with method 'window': these runs hold kit; "),
        (["--against", "kit"], "Nothing to compare with method 'kit'"),
        (["--against", "kit", "--format", "csv"], "--against prints Markdown"),
    ):
        found = CliRunner().invoke(cli, ["table", str(tmp_path), *arguments])
        assert found.exit_code == 2
        assert sentence in found.output
