"""Commands that `claims` proposes: they parse, and train as the stored runs that they add to were trained."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from kitbench.cli.main import cli
from kitbench.model.methods import method_kinds
from kitbench.spec import loading
from kitbench.spec.suite import Suite
from kitbench.verdict.claims import claims, load
from tests.conftest import TINY
from tests.stored import evidence_of
from tests.verdict.test_claims import GOOD, LR, QUICK, everything, page, runs

EQUAL = dict.fromkeys(GOOD, 0.0)


def parsed(command: str) -> tuple[str, dict[str, Any], Suite | None]:
    """The group, its options and the suite that it would run, as the real command line reads them."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "kitbench"]
    options = cli.commands[words[3]].make_context(words[3], words[4:]).params  # raises for what it does not know
    if "suite" not in options:
        return words[3], options, None
    return words[3], options, loading.load_suite(
        options["suite"], options["preset"], options["overrides"], options["method"], shipped=method_kinds()
    )  # fmt: skip


def reach(*paths: Path) -> tuple[str, dict[str, Any], Suite]:
    """What is proposed for the contrast of KiT and local attention."""
    group, options, suite = parsed(page(*paths)[2].parts[0].command)
    assert suite is not None
    return group, options, suite


@pytest.mark.parametrize("longer", [1, 4])
def test_a_search_of_rates_is_proposed_at_the_length_that_lacks_it(tmp_path: Path, longer: int) -> None:
    everything(tmp_path, GOOD, (700 if longer == 4 else 2800,))
    runs(tmp_path, GOOD, steps=700 * longer)
    group, _, suite = reach(tmp_path)
    assert (group, suite.recipe.steps, suite.preset) == ("tune", 700 * longer, "quick")
    assert set(suite.methods) == {"kit", "local"}


def test_a_stored_search_without_one_of_the_methods_is_proposed_with_all_that_it_has(tmp_path: Path) -> None:
    runs(tmp_path, {"kit": 0.5, "window": 0.2, "local": 0.0})
    [file] = everything(tmp_path / "searched", {"kit": 0.5, "window": 0.2}, (700,)).glob("tuning-700.json")
    file.rename(tmp_path / file.name)
    shutil.rmtree(tmp_path / "searched")
    group, _, suite = reach(tmp_path)
    assert (group, set(suite.methods)) == ("tune", {"kit", "local", "window"})


def test_where_rates_are_known_and_the_runs_at_them_are_not_these_are_proposed(tmp_path: Path) -> None:
    everything(tmp_path, GOOD)
    for file in tmp_path.glob("tuning-*.json"):
        text = file.read_text()
        file.unlink()
        record = json.loads(text)
        record.pop("sha256")
        record["rates"] = [LR, 2 * LR]
        record["trials"] += [t | {"lr": 2 * LR, "psnr_db": 31, "key": t["key"] + "x"} for t in record["trials"]]
        record["best"] = dict.fromkeys(record["best"], 2 * LR)
        file.write_text(json.dumps(record))
    group, options, suite = reach(tmp_path)
    assert (group, options["tuned"], suite.recipe.steps) == ("run", True, 3000)
    assert set(suite.methods) == {"kit", "local"}


def test_more_seeds_are_proposed_for_the_setup_that_decides_nothing(tmp_path: Path) -> None:
    everything(tmp_path, EQUAL)
    group, options, suite = reach(tmp_path)
    assert (group, options["tuned"], options["seeds"]) == ("run", True, "0,1,2,3,4,5,6,7,8,9")
    assert (suite.recipe.steps, set(suite.methods)) == (700, {"kit", "local"})


@pytest.mark.parametrize(
    "changes",
    [{}, {"lr": 1e-3}, {"batch": 2, "clip": 0.5}, {"precision": "bf16"}, {"ema": 0.99, "weight_decay": 1e-5}],
)
def test_what_is_proposed_trains_as_the_runs_that_it_adds_to(tmp_path: Path, changes: dict[str, Any]) -> None:
    changed = QUICK.model_copy(
        update={
            "recipe": QUICK.recipe.model_copy(update=changes),
            "backbone": QUICK.backbone.model_copy(update={"blocks": (1, 2, 1), "width": 24}),
        }
    )
    stored = {"of": changed, "lr": changed.recipe.lr}
    runs(tmp_path, GOOD, **stored)
    _, _, suite = reach(tmp_path)
    assert (suite.recipe, suite.backbone) == (changed.recipe, changed.backbone)
    longer = runs(tmp_path / "longer", EQUAL, steps=1400, **stored)
    _, _, suite = reach(longer)
    assert suite.recipe == changed.recipe.model_copy(update={"steps": 1400})


def test_a_suite_of_the_users_own_is_proposed_by_the_file_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("suites").mkdir()
    Path("suites/tiny.toml").write_text(TINY)
    for file in runs(tmp_path / "runs", {"kit": 0.0, "local": 0.0}, seeds=(0,)).glob("*/run.json"):
        record = json.loads(file.read_text()) | {"suite": "tiny", "preset": "only"}
        record.pop("sha256")
        record["environment"]["command"] = ["kitbench", "run", "--suite", "suites/tiny.toml"]
        file.write_text(json.dumps(record))
    command = page(tmp_path / "runs")[2].parts[0].command
    assert "--suite suites/tiny.toml" in command
    _, _, suite = parsed(command)
    assert suite is not None
    assert (suite.name, suite.preset, suite.recipe.steps) == ("tiny", "only", QUICK.recipe.steps)


@pytest.mark.parametrize("task", ["denoise", "derain", "deblur", "denoise-real"])
@pytest.mark.parametrize("preset", ["quick", "standard", "full"])
def test_every_command_of_a_page_of_any_shipped_suite_parses(tmp_path: Path, task: str, preset: str) -> None:
    of = loading.load_suite(task, preset)
    sigma = 25 if task == "denoise" else None
    runs(tmp_path, GOOD, seeds=(0,), of=of, lr=of.recipe.lr, protocol=of.protocol.id, sigma=sigma)
    commands = {part.command for claim in claims(*load([tmp_path])) for part in claim.parts}
    groups = {parsed(command)[0] for command in commands}
    assert groups == {"run", "tune", "scale"}
    assert not any("smoke" in command for command in commands)


def test_no_more_seeds_are_proposed_where_images_are_too_few(tmp_path: Path) -> None:
    everything(tmp_path, EQUAL)
    for file in tmp_path.glob("*/eval/*.json"):
        record = json.loads(file.read_text())
        record.pop("sha256")
        record["scores"] = record["scores"][:3]
        file.write_text(json.dumps(record))
    part = page(tmp_path)[2].parts[0]
    assert "3 images are too few to decide a difference" in evidence_of(part)
    assert part.command == ""


def recorded(out: Path, command: list[str] | None = None, **record: Any) -> None:
    """Change what the stored runs record of themselves."""
    for file in out.glob("*/run.json"):
        changed = json.loads(file.read_text())
        changed.pop("sha256")
        changed["environment"]["command"] = command or changed["environment"]["command"]
        file.write_text(json.dumps(changed | record))


def test_images_and_noise_levels_that_the_runs_command_chose_are_proposed_again(tmp_path: Path) -> None:
    runs(tmp_path, GOOD, seeds=(0,))
    chosen = ["--train-set", "my/photos", "--set=task.sigma_test=[25]", "--set", "methods.kit.k=9", "--test-set=Set12"]
    recorded(tmp_path, command=["kitbench", "run", "--suite", "denoise", "--set", "recipe.lr=0.7", *chosen])
    _, options, suite = reach(tmp_path)
    assert (options["train_set"], options["test_set"]) == (("my/photos",), ("Set12",))
    assert suite.task.sigma_test == (25,)
    assert suite.recipe == QUICK.recipe
    assert suite.methods == {name: QUICK.methods[name] for name in ("kit", "local")}


def test_runs_on_embedded_photographs_are_proposed_on_these(tmp_path: Path) -> None:
    runs(tmp_path, GOOD, seeds=(0,))
    assert page(tmp_path)[2].parts[0].command.endswith("--data DIR --out OUT")
    recorded(tmp_path, train_sets={"skimage-train": "aa"})
    assert page(tmp_path)[2].parts[0].command.endswith("--method kit --method local --out OUT")
