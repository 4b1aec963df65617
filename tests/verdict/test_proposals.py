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
from tests.stored import evidence_of, rewrite, store
from tests.verdict.test_claims import ALONE as PATCH_ALONE
from tests.verdict.test_claims import GOOD, LR, QUICK, everything, page, runs

EQUAL = dict.fromkeys(GOOD, 0.0)
ALONE = "do the nearest patches restore better than the patch alone, without neighbours?"


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
    own = {method: gain for method, gain in GOOD.items() if method != "kit-k1"}
    runs(tmp_path, own, seeds=(0,), of=of, lr=of.recipe.lr, protocol=of.protocol.id, sigma=sigma)
    trained_on = of.data.folder.colour
    assert trained_on is not None
    recorded(tmp_path, train_sets=dict.fromkeys(trained_on.train, "aa"))
    parts = [part for claim in claims(*load([tmp_path])) for part in claim.parts]
    groups = {parsed(part.command)[0] for part in parts if part.command}
    commands = {part.command for part in parts}
    # The patch alone is a row of a suite for denoising.
    without = [part for part in parts if not part.command]
    assert [part.question.partition(", ")[2] for part in without] == ([] if task == "denoise" else [ALONE])
    assert all(part.reason.endswith(", and no shipped suite trains both like the stored runs") for part in without)
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


def alone(*paths: Path) -> str:
    """What is proposed for the contrast of KiT and its own patch alone."""
    return page(*paths)[3].parts[2].command


@pytest.mark.parametrize(
    ("suite", "preset", "changes", "proposed"),
    [
        ("denoise", "quick", [], "ablate"),
        ("ablate", "quick", [], "ablate"),
        ("denoise", "gpu-hour", [], None),  # a preset that the other suite does not have
        ("reach", "standard", [], None),  # another degradation, and other tiles
        ("denoise", "quick", ["protocol=awgn8"], None),
        ("derain", "quick", [], None),
    ],
)
def test_another_suite_is_proposed_only_where_it_trains_like_the_stored_runs(
    tmp_path: Path, suite: str, preset: str, changes: list[str], proposed: str | None
) -> None:
    of = loading.load_suite(suite, preset, changes)
    sigma = 25 if of.task.kind == "denoise" else None
    runs(tmp_path, {"kit": 0.5, "local": 0.0}, seeds=(0,), of=of, lr=of.recipe.lr, protocol=of.protocol.id, sigma=sigma)
    recorded(tmp_path, train_sets=dict.fromkeys(of.data.folder.colour.train if of.data.folder.colour else (), "aa"))
    command = alone(tmp_path)
    assert (f"--suite {proposed} " in command) if proposed else command == ""
    assert "local" not in command
    of_local = page(tmp_path)[2].parts[0].command
    assert f"--suite {suite} --preset {preset}" in of_local  # what its own suite can train stays there


def test_a_suite_of_the_users_own_is_not_asked_for_a_method_that_it_may_not_have(tmp_path: Path) -> None:
    for file in runs(tmp_path, {"kit": 0.0, "local": 0.0}, seeds=(0,)).glob("*/run.json"):
        rewrite(file, lambda raw: raw.update(suite="tiny", preset="only"))
    assert alone(tmp_path) == ""
    assert "--suite tiny.toml" in page(tmp_path)[2].parts[0].command


def test_of_two_searches_that_hold_side_by_side_the_runs_that_lack_are_proposed(tmp_path: Path) -> None:
    """And a search where theirs were not made alike: no run at such rates would be compared."""
    both = {"kit": 0.5, "kit-k1": 0.4}
    everything(tmp_path, both, (700, 3000), notes=None)
    for file in tmp_path.glob("tuning-*.json"):
        record = json.loads(file.read_text())
        file.unlink()
        record.pop("sha256")
        for method, suite in (("kit", "denoise"), ("kit-k1", "ablate")):
            trials = [t | {"lr": rate, "key": trial_of(tmp_path, method, rate)} for t in record["trials"]
                      if t["method"] == method for rate in (LR, 2 * LR)]  # fmt: skip
            best = {"kit": LR, "kit-k1": 2 * LR}[method]
            trials = [t | {"psnr_db": 31.0 if t["lr"] == best else 30.0} for t in trials]
            changes = {"suite": suite, "trials": trials, "best": {method: best}, "rates": [LR, 2 * LR]}
            (tmp_path / f"tuning-{method}-{record['steps']}.json").write_text(json.dumps(record | changes))
    group, options, suite = parsed(alone(tmp_path))
    assert suite is not None
    assert (group, options["tuned"], suite.name, set(suite.methods)) == ("run", True, "ablate", {"kit-k1"})
    for file in tmp_path.glob("tuning-kit-k1-*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seed": 98}))
    group, _, suite = parsed(alone(tmp_path))
    assert suite is not None
    assert (group, suite.name, set(suite.methods)) == ("tune", "ablate", {"kit", "kit-k1"})


def trial_of(out: Path, method: str, lr: float) -> str:
    """A stored trial of a search, and its key."""
    stored = {"lr": lr, "data_set": "validation"} | (PATCH_ALONE if method == "kit-k1" else {"of": QUICK})
    return store(out, method, 30.0, 99, **stored).run.key
