"""Learning curves and time to target, on stored runs whose values are known."""

from __future__ import annotations

from pathlib import Path

from kitbench.store.folder import find
from kitbench.verdict.contrasts import blocks
from kitbench.verdict.curves import Curve, CurveSet, Reached, learning_curves, target_sheet, time_to_target
from kitbench.verdict.entries import entries
from tests.conftest import Kitbench
from tests.stored import SUITE, store
from tests.verdict.test_contrasts import tuned

STEP_MACS = 3 * 2_500_000_000 * 4 * 48**2 / 256**2
"""Of store's 2.5 GMACs at 256 px, in the smoke recipe's batch of 4 crops of 48 px."""


def curves(out: Path, curve_of: dict[str, list[list[float]]], steps: tuple[int, ...] = (10, 20, 30), **stored) -> Path:
    """Runs of 30 steps. curve_of: by method and seed, validation PSNR at the steps."""
    for method, of_seeds in curve_of.items():
        for seed, values in enumerate(of_seeds):
            curve = dict(zip(steps, values, strict=True))
            store(out, method, 30.0, seed, steps=30, curve=curve, **stored)
    return out


def found(out: Path) -> CurveSet | None:
    runs = find([out])
    [block] = blocks(entries(runs, None))
    return learning_curves(block, {folder.run.key: folder for folder in runs})


def known(out: Path) -> CurveSet:
    one = found(out)
    assert one is not None
    return one


def reached(out: Path) -> dict[str, Reached]:
    target = time_to_target(known(out))
    assert target is not None
    return {line.method: line for line in target.lines}


CONV = [[25, 27, 29], [25, 27, 30], [25, 27, 31]]
RANDOM = [[25, 29, 29.5]] * 3
KIT = [[25, 30, 32], [24, 30.5, 32], [25, 29, 33]]
WINDOW = [[25, 26, 27], [25, 26, 28], [25, 26, 31]]


def test_the_recipe_is_the_one_that_the_multiply_adds_assume() -> None:
    assert (SUITE.recipe.batch, SUITE.recipe.crop) == (4, 48)


def test_time_to_target_is_when_half_of_the_seeds_reach_the_best_controls_median(tmp_path: Path) -> None:
    curves(tmp_path, {"conv": CONV, "kit-random": RANDOM, "kit": KIT, "window": WINDOW})
    target = time_to_target(known(tmp_path))
    assert target is not None
    assert (target.control, target.psnr_db) == ("conv", 30)
    lines = reached(tmp_path)
    assert lines["kit"] == Reached("kit", 3, 3, 32, 20, 20 * 0.5, 20 * STEP_MACS)
    assert lines["conv"] == Reached("conv", 3, 2, 30, 30, 30 * 0.5, 30 * STEP_MACS)
    never = float("inf")
    assert lines["window"] == Reached("window", 3, 1, 28, never, never, never)
    assert lines["kit-random"].steps == never
    rows = {line[0]: line[1:] for line in target_sheet(known(tmp_path)).lines}
    assert rows["kit"] == ("3 of 3", "32.00", "20", "10", f"{20 * STEP_MACS / 1e12:.3g}")
    assert rows["window"] == ("1 of 3", "28.00", "never", "never", "never")


def test_the_other_control_sets_the_target_where_it_ends_higher(tmp_path: Path) -> None:
    curves(tmp_path, {"conv": CONV, "kit-random": [[25, 30, 31]] * 3})
    assert reached(tmp_path)["kit-random"].steps == 30
    assert reached(tmp_path)["conv"].reached == 1


def test_of_two_seeds_the_control_reaches_its_own_median(tmp_path: Path) -> None:
    curves(tmp_path, {"conv": [[25, 27, 29], [25, 27, 31]]})
    assert reached(tmp_path)["conv"] == Reached("conv", 2, 1, 30, 30, 15, 30 * STEP_MACS)


def test_a_target_that_is_lost_again_was_reached(tmp_path: Path) -> None:
    curves(tmp_path, {"conv": CONV, "kit": [[31, 25, 26]]})
    assert reached(tmp_path)["kit"].steps == 10


def test_what_was_not_measured_is_not_available(tmp_path: Path) -> None:
    curves(tmp_path, {"conv": CONV, "kit": KIT}, step_seconds=None)
    assert reached(tmp_path)["kit"].seconds is None
    assert {line[4] for line in target_sheet(known(tmp_path)).lines} == {"n/a"}


def test_runs_that_did_not_fix_their_threads_say_so(tmp_path: Path) -> None:
    free = SUITE.model_copy(update={"recipe": SUITE.recipe.model_copy(update={"threads": None})})
    curves(tmp_path, {"conv": CONV}, of=free)
    assert target_sheet(known(tmp_path)).header[4] == "Seconds (threads not fixed)"


def test_without_a_control_there_is_no_target(tmp_path: Path) -> None:
    curves(tmp_path, {"kit": KIT})
    assert time_to_target(known(tmp_path)) is None
    sheet = target_sheet(known(tmp_path))
    assert sheet.lines == ()
    assert sheet.notes[0].startswith("No target: no run of a control (conv or kit-random) has validation PSNR; train")


def test_a_curve_has_the_steps_at_which_every_seed_was_validated(tmp_path: Path) -> None:
    curves(tmp_path, {"conv": [[25, 26, 29]]}, steps=(10, 20, 30))
    store(tmp_path, "conv", 30.0, 1, steps=30, curve={15: 26, 20: 27, 25: None, 30: 31})
    [curve] = known(tmp_path).curves
    assert isinstance(curve, Curve)
    assert curve.steps.tolist() == [20, 30]
    assert curve.psnr_db.tolist() == [[26, 29], [27, 31]]


def test_curves_on_other_crops_are_left_out_and_named(tmp_path: Path) -> None:
    curves(tmp_path, {"conv": CONV, "kit": KIT})
    store(tmp_path, "kit", 30.0, 3, steps=30, curve={30: 99.0}, validation_sets={"Validation_B": "cc"})
    store(tmp_path, "window", 30.0, 0, steps=30, curve={30: None})
    store(tmp_path, "local", 30.0, 0, steps=30)
    one = known(tmp_path)
    assert {curve.method: len(curve.psnr_db) for curve in one.curves} == {"conv": 3, "kit": 3}
    assert one.measured_on == "Validation_A σ25"
    assert set(one.left_out) == {"kit (1 of 4 runs)", "window (1 of 1 runs)", "local (1 of 1 runs)"}
    assert any("kit (1 of 4 runs)" in note for note in target_sheet(one).notes)


def test_runs_that_were_not_validated_have_no_curves(tmp_path: Path) -> None:
    store(tmp_path, "conv", 30.0, steps=30, curve={30: None})
    assert found(tmp_path) is None


def table(text: str) -> list[list[str]]:
    """The cells of the first Markdown table of a text."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_command_prints_all_three_tables(kitbench: Kitbench, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    curves(out, {"conv": CONV, "kit": KIT})
    text = kitbench("curves", "runs").stdout
    assert [row[0] for row in table(text)[2:]] == ["conv", "kit"]
    assert "Target: 30.00 dB on Validation_A σ25" in text
    assert "Budget ladder" not in text
    for seed in range(2):
        for method in ("conv", "kit"):
            store(out, method, 31.0, seed, steps=60)
    tuned(out, {"kit": 0.0})
    text = kitbench("curves", "runs").stdout
    assert "| kit - conv " in text
    assert "**Budget ladder: denoise, colour, 4 x 48 px per step, learning rate 0.001" in text
    assert "* the method's best" in text
    kitbench("curves", "runs", "--out", "curves.md")
    assert (tmp_path / "curves.md").read_text() == text


def test_the_command_says_what_is_missing(kitbench: Kitbench, tmp_path: Path) -> None:
    store(tmp_path / "runs", "conv", 30.0)
    message = kitbench("curves", "runs", code=2).stderr
    assert "hold no validation PSNR, no two lengths of one recipe and no search of learning rates; train" in message
    assert "is not a folder" in kitbench("curves", "nowhere", code=2).stderr
