"""The regression check: what must fail does, and what is noise does not; through the real command line too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.spec import loading
from kitbench.store.folder import find
from kitbench.verdict import reference, regression
from tests.conftest import ROOT, Kitbench
from tests.stored import store

SMOKE = ROOT / "results" / "reference" / "smoke.json"
METHODS = {"kit": 30.2, "window": 30.1, "conv": 29.9}


def runs(out: Path, seeds=(0, 1, 2), drop: float = 0.0, method: str = "kit", draw: int = 0, **changed) -> Path:
    """Three methods whose seeds spread by 0.1 dB together and 0.03 dB each, over 8 images; one may be worse."""
    for seed in seeds:
        shared = 0.1 * np.random.default_rng(seed).standard_normal()
        for number, (name, mean) in enumerate(METHODS.items()):
            own = 0.03 * np.random.default_rng((seed, number, draw)).standard_normal()
            images = mean + shared + own + np.linspace(-2, 2, 8)
            worse = name == method
            store(out, name, images - (drop if worse else 0), seed, **(changed if worse else {}))
    store(out, "nlm", np.linspace(26, 29, 8), seed=None)
    return out


def failures(found: Path, old: Path, **options) -> list[regression.Comparison]:
    lines = regression.compare_with_reference(find([found]), reference.collect(find([old]), None), **options)
    return [line for line in lines if line.failed]


def test_the_same_runs_hold(tmp_path: Path) -> None:
    assert failures(runs(tmp_path), tmp_path) == []


def test_rows_that_the_reference_does_not_have_are_named(kitbench: Kitbench, tmp_path: Path) -> None:
    kitbench("check", runs(tmp_path / "old"), "--against", "ref.json", "--update")
    extra = store(runs(tmp_path / "new"), "kit", [20.0, 21.0], lr=1e-2)
    done = kitbench("check", "new", "--against", "ref.json")
    assert (
        f"not checked, because ref.json has no such row: kit on Set_A (colour) σ25 (run {extra.run.key[:10]})"
        in done.stdout
    )


@pytest.mark.parametrize(
    ("injected", "quantity"),
    [
        ({"drop": 0.3}, "PSNR"),
        ({"ssim": 0.48}, "SSIM"),
        ({"macs": 2_525_000_000}, "MACs"),
        ({"macs": 2_499_999_999}, "MACs"),
        ({"peak": round(1.2 * 3 * 2**20)}, "peak memory of a step (bytes)"),
        ({"step_seconds": 0.8}, "time of a step (calibration runs)"),
    ],
)
def test_a_single_injected_regression_fails_and_nothing_else_does(tmp_path: Path, injected, quantity) -> None:
    [line] = failures(runs(tmp_path / "new", **injected), runs(tmp_path / "old"))
    assert line.quantity == quantity
    assert str(line).startswith("kit")
    assert len(line.runs) == 3


def test_a_slower_machine_is_no_regression(tmp_path: Path) -> None:
    new = runs(tmp_path / "new", step_seconds=5.0, calibration=1.0)
    assert failures(new, runs(tmp_path / "old")) == []


def test_noise_between_seeds_is_no_regression_and_a_drop_in_it_is_still_found(tmp_path: Path) -> None:
    """Twelve times: the same seeds with other rounding noise, and other seeds altogether."""
    old = runs(tmp_path / "old")
    false, found = 0, 0
    for draw in range(1, 7):
        false += bool(failures(runs(tmp_path / f"same{draw}", draw=draw), old))
        false += bool(failures(runs(tmp_path / f"other{draw}", seeds=(draw * 3, draw * 3 + 1, draw * 3 + 2)), old))
        found += bool(failures(runs(tmp_path / f"bad{draw}", draw=draw, drop=0.3), old))
    assert false <= 2  # 5 % of 12, and what chance leaves open
    assert found >= 5


def test_one_seed_has_no_spread_and_says_so(tmp_path: Path) -> None:
    lines = regression.compare_with_reference(
        find([runs(tmp_path / "a", (0,))]), reference.collect(find([tmp_path / "a"]), None)
    )
    [kit] = [line for line in lines if line.name.startswith("kit on") and line.quantity == "PSNR"]
    assert "by default: the reference has no spread over seeds" in kit.tolerance


def test_the_shipped_reference_is_one_of_every_method_of_the_smoke_suite() -> None:
    smoke = loading.load_suite("denoise", "smoke")
    stored = reference.read_reference(SMOKE)
    assert stored.protocol == smoke.protocol.stamp
    assert {row.method for row in stored.rows} == {*smoke.methods, *smoke.references}
    assert all(len(row.psnr) == 3 for row in stored.rows if row.comparison)
    assert all(cost.step is not None for cost in stored.costs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text[:300], "is damaged, or no reference"),
        (lambda text: "", "is damaged, or no reference"),
        (lambda text: "# Notes", "is damaged, or no reference"),
        (lambda text: json.dumps(json.loads(text) | {"rows": []}), "rows is []: expected at least one value"),
        (lambda text: json.dumps(json.loads(text) | {"schema_version": 2}), "schema_version is 2: input should be 1"),
        (
            lambda text: json.dumps(json.loads(text) | {"rows": json.loads(text)["rows"] * 2}),
            "two rows are of one method",
        ),
    ],
)
@pytest.mark.parametrize("update", [(), ("--update",)])
def test_what_is_no_reference_is_neither_compared_nor_replaced(
    tmp_path: Path, change: Callable[[str], str], sentence: str, update: tuple[str, ...]
) -> None:
    file = tmp_path / "ref.json"
    file.write_text(change(SMOKE.read_text()))
    before = file.read_bytes()
    runs_of_ci = str(SMOKE.with_name("denoise-smoke-cpu"))
    done = CliRunner().invoke(cli, ["check", runs_of_ci, "--against", str(file), *update])
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert file.read_bytes() == before


def test_a_method_that_is_gone_fails(tmp_path: Path) -> None:
    runs(tmp_path / "old")
    runs(tmp_path / "new")
    for folder in (tmp_path / "new").glob("*-kit-*"):
        (folder / "run.json").unlink()
    [line] = failures(tmp_path / "new", tmp_path / "old")
    assert (line.name.split()[0], line.found) == ("kit", None)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"protocol": "awgn8-seed0"},
            r"Run [0-9a-f]{10} was scored under awgn8-seed0\.v1, the reference under awgn8\.v1;",
        ),
        (
            {"sha256": "bb"},
            r"Run [0-9a-f]{10} \(kit\) was scored on other images of Set_A \(bb\) than the reference \(aa\)",
        ),
        (
            {"lr": 1e-4},
            r"Run [0-9a-f]{10} \(kit\) differs from kit of the reference \(run [0-9a-f]{10}\) in recipe\.lr "
            r"\(0\.0001 and 0\.001\); run the suite",
        ),
    ],
)
def test_a_reference_of_other_numbers_is_refused(tmp_path: Path, other, sentence) -> None:
    store(tmp_path / "old", "kit", 30.0)
    store(tmp_path / "new", "kit", 30.0, **other)
    with pytest.raises(InputError, match=sentence):
        failures(tmp_path / "new", tmp_path / "old")


def test_the_run_that_differs_least_is_named_and_not_another(tmp_path: Path) -> None:
    """Of the reference's methods the first is conv; the runs hold a conv of a far recipe, and a window of a near one."""
    store(tmp_path / "old", "conv", 30.0)
    store(tmp_path / "old", "window", 30.0)
    store(tmp_path / "new", "conv", 30.0, lr=1e-4, steps=7)
    near = store(tmp_path / "new", "window", 30.0, steps=7)
    with pytest.raises(InputError) as caught:
        failures(tmp_path / "new", tmp_path / "old")
    assert f"Run {near.run.key[:10]} (window)" in str(caught.value)
    assert "in recipe.steps (7 and 20);" in str(caught.value)
    store(tmp_path / "untrained", "nlm", 29.0, seed=None)
    with pytest.raises(InputError, match="conv of the reference .* was trained, and none of these runs was"):
        failures(tmp_path / "untrained", tmp_path / "old")


def test_a_reference_without_settings_says_so_instead_of_guessing(tmp_path: Path) -> None:
    store(tmp_path / "old", "kit", 30.0)
    store(tmp_path / "new", "kit", 30.0, lr=1e-4)
    old = reference.collect(find([tmp_path / "old"]), None).model_copy(update={"shared": {}})
    with pytest.raises(InputError, match="does not contain its settings, because an earlier version wrote it"):
        regression.compare_with_reference(find([tmp_path / "new"]), old)


def test_a_check_that_cannot_be_made_is_an_error_in_the_junit_file(kitbench: Kitbench, tmp_path: Path) -> None:
    store(tmp_path / "old", "kit", 30.0)
    store(tmp_path / "new", "kit", 30.0, lr=1e-4)
    kitbench("check", "old", "--against", "ref.json", "--update")
    for runs_at, sentence in (("new", "recipe.lr (0.0001 and 0.001)"), ("gone", "gone is not a folder")):
        done = kitbench("check", runs_at, "--against", "ref.json", "--junit", "ci/j.xml", code=2)
        suite = ElementTree.parse(tmp_path / "ci" / "j.xml").getroot()
        assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
        [error] = suite.findall("testcase/error")
        assert sentence in (error.get("message") or "")
        assert (error.get("message") or "") in done.stderr


def test_the_command_exits_1_on_a_single_failure_and_writes_what_ci_reads(kitbench: Kitbench, tmp_path: Path) -> None:
    runs(tmp_path / "old")
    runs(tmp_path / "bad", drop=0.3)
    assert "write one with" in kitbench("check", "old", "--against", "ref.json", code=2).stderr
    assert "wrote ref.json" in kitbench("check", "old", "--against", "ref.json", "--update").stdout
    kitbench("check", "old", "--against", "ref.json")
    done = kitbench("check", "bad", "--against", "ref.json", "--junit", "j.xml", "--summary", "s.md", code=1)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert "PSNR is 29.8" in line or "PSNR is 29.9" in line
    assert "tolerance 0." in line
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()
    assert suite.get("failures") == "1"
    assert len(suite.findall("testcase/failure")) == 1
    assert (tmp_path / "s.md").read_text().startswith("## kitbench check: 1 of ")
    both = kitbench("check", "bad", "--against", "ref.json", "--update", "--junit", "n.xml", code=2)
    assert "--update compares nothing" in both.stderr
    assert not (tmp_path / "n.xml").exists()
    done = kitbench("check", "bad", "--against", "ref.json", "--update")
    assert "(-0.3000)" in done.stdout
    assert json.loads((tmp_path / "ref.json").read_text())["protocol"] == "awgn8.v1"
    (tmp_path / "ref.json").write_text("{}")
    for update in ((), ("--update",)):
        refused = kitbench("check", "bad", "--against", "ref.json", *update, code=2).stderr
        assert "is no reference of this version of kitbench: the key 'kitbench' is missing" in refused
    assert (tmp_path / "ref.json").read_text() == "{}"


def test_a_seed_that_one_method_lacks_fails_and_one_that_all_lack_is_named(kitbench: Kitbench, tmp_path: Path) -> None:
    kitbench("check", runs(tmp_path / "old"), "--against", "ref.json", "--update")
    runs(tmp_path / "part", seeds=(0, 1))
    done = kitbench("check", "part", "--against", "ref.json")
    assert "not checked, because no run here has it: seed 2 of ref.json" in done.stdout
    lost = next(run.path for run in find([runs(tmp_path / "lost")]) if (run.run.method, run.run.seed) == ("kit", 1))
    (lost / "training.json").unlink()
    assert "has scores, but no training.json" in kitbench("check", "lost", "--against", "ref.json", code=2).stderr
    assert "damaged" in kitbench("status", "lost").stdout
    shutil.rmtree(lost / "eval")
    done = kitbench("check", "lost", "--against", "ref.json", code=1)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert "kit on Set_A (colour) σ25: number of seeds is 2, reference 3, seed 1 is not in these runs" in line
    assert "seeds 0, 1, 2 -> 0, 2, which" in kitbench("check", "lost", "--against", "ref.json", "--update").stdout


def test_another_release_than_the_reference_s_is_named_and_fails_nothing(kitbench: Kitbench, tmp_path: Path) -> None:
    kitbench("check", runs(tmp_path / "old"), "--against", "ref.json", "--update")
    assert "made differently" not in kitbench("check", "old", "--against", "ref.json").stdout
    raw = json.loads((tmp_path / "ref.json").read_text())
    assert raw["made_with"] == {"torch": ["2"], "machine": ["h"]}
    raw["made_with"]["torch"] = ["1.9", "1.9+cpu"]
    (tmp_path / "ref.json").write_text(json.dumps(raw))
    done = kitbench("check", "old", "--against", "ref.json", "--summary", "s.md")
    assert "made differently from the reference: torch 2, reference 1.9 and 1.9+cpu\n" in done.stdout
    assert "Made differently from the reference: torch 2, reference 1.9 and 1.9+cpu." in (tmp_path / "s.md").read_text()
    assert kitbench("check", "old", "--against", "ref.json", "--update").stdout.startswith(
        "torch: 1.9 and 1.9+cpu -> 2"
    )


def test_an_update_prints_all_that_changes(kitbench: Kitbench, tmp_path: Path) -> None:
    kitbench("check", runs(tmp_path / "old"), "--against", "ref.json", "--update")
    kitbench("check", runs(tmp_path / "new", ssim=0.4), "--against", "new.json", "--update")
    old, new = (reference.read_reference(tmp_path / name) for name in ("ref.json", "new.json"))
    assert reference.changes(old, old) == []
    assert reference.changes(old, new) == ["kit on Set_A (colour) σ25: SSIM 0.5000 -> 0.4000 (-0.1000)"]
    [row] = [row for row in old.rows if row.method == "kit"]
    first = row.model_copy(update={"psnr": {"0": 30.0, "1": 31.0, "2": 32.0}})
    swapped = row.model_copy(update={"psnr": {"0": 32.0, "1": 31.0, "2": 30.0}})
    other = first.model_copy(update={"data_sha256": "b" * 64})
    one, two, three = (old.model_copy(update={"rows": (row,)}) for row in (first, swapped, other))
    assert reference.changes(one, two) == ["kit on Set_A (colour) σ25: PSNR of single seeds, with the same mean"]
    assert reference.changes(one, three) == [f"kit on Set_A (colour) σ25: images {row.data_sha256[:8]} -> bbbbbbbb"]
    assert "kit: MACs 2,500,000,000 -> missing" in reference.changes(old, old.model_copy(update={"costs": ()}))
    [psnr, _] = reference.changes(one, one.model_copy(update={"rows": ()}))
    assert psnr.endswith("-> missing")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--junit", "ref.json"), "name one file; give each a file of its own"),
        (("--junit", "a.md", "--summary", "a.md"), "name one file; give each a file of its own"),
        (("--junit", "a.xml", "--summary", "ref.json/s.md"), "cannot be written"),
        (("--protocol", "awgn9"), "--protocol is awgn9, but ref.json is of awgn8.v1; leave it out"),
        (("--time-tolerance", "nan"), "nan is no finite number"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_anything_is_written(
    kitbench: Kitbench, tmp_path: Path, options, sentence
) -> None:
    kitbench("check", runs(tmp_path / "old"), "--against", "ref.json", "--update")
    before = (tmp_path / "ref.json").read_bytes()
    done = kitbench("check", "old", "--against", "ref.json", *options, code=2)
    assert sentence in " ".join(done.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "ref.json", "tiny.toml"]
    assert (tmp_path / "ref.json").read_bytes() == before
    kitbench("check", "old", "--against", "ref.json", "--protocol", "awgn8")
