"""What an import refuses: runs that contradict themselves, numbers that no image has, other protocols, recipes, sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from kitbench.runs.source import source_digests
from kitbench.spec.loading import load_suite
from kitbench.store.folder import RunFolder, find
from kitbench.verdict.render import render
from tests.apply.conftest import invoke
from tests.stored import renamed, rewrite, store_whole

JSON = dict[str, Any]
Change = Callable[[JSON], object]
NESTED = "\n\n## 7. KiT wins."


def imported(theirs: Path, ours: Path, code: int = 0) -> Result:
    invoke("export", theirs, "--out", theirs.parent / "x.zip", "--by", "Jane Doe")
    return invoke("import", theirs.parent / "x.zip", "--out", ours, code=code)


def of_run(change: Change) -> Callable[[RunFolder], object]:
    return lambda folder: rewrite(folder.path / "run.json", change)


def of_training(change: Change) -> Callable[[RunFolder], object]:
    return lambda folder: rewrite(folder.path / "training.json", change)


def of_scores(change: Change) -> Callable[[RunFolder], object]:
    return lambda folder: [rewrite(path, change) for path in (folder.path / "eval").iterdir()]


def anew(change: Change) -> Callable[[RunFolder], object]:
    """A change of the identity, after which the key, what follows from it and the folder's name are made to fit."""

    def alter(folder: RunFolder) -> None:
        rewrite(folder.path / "run.json", change)
        renamed(folder)

    return alter


def of_sigma(sigma: float | None) -> Callable[[RunFolder], object]:
    def alter(folder: RunFolder) -> None:
        [evaluation] = folder.evaluations()
        [path] = (folder.path / "eval").iterdir()
        rewrite(path, lambda raw: raw.update(sigma=sigma))
        path.rename(folder.evaluation_path(evaluation.data_set, sigma, evaluation.stamp))

    return alter


def without_checksum(folder: RunFolder) -> None:
    path = folder.path / "training.json"
    raw = json.loads(path.read_text())
    del raw["sha256"]
    path.write_text(json.dumps(raw))


def other_recipe(raw: JSON) -> None:
    raw["recipe"]["batch"] = raw["identity"]["recipe"]["batch"] = 3


def other_settings(raw: JSON) -> None:
    raw["settings"]["k"] = raw["identity"]["settings"]["k"] = float(raw["settings"]["k"])


def other_name(raw: JSON) -> None:
    raw["scores"][1]["image"] = "other"


CONTRADICTS = "contradicts itself: its {} and what its key is made of do not agree"
ALTERED: dict[str, tuple[Callable[[RunFolder], object], str]] = {
    "protocol": (
        of_scores(lambda raw: raw["protocol"].update(rounding="none")),
        "was scored by another protocol awgn8.v1, which this kitbench calls awgn8.v1+",
    ),
    "recipe": (anew(other_recipe), "was trained by another recipe smoke: batch 3, here 4; run a method by that recipe"),
    "source": (
        of_run(lambda raw: raw["source"].update(training="0" * 64)),
        "was made by another source of the training (digest 0000000000, here ",
    ),
    "scoring": (
        of_scores(lambda raw: raw["numerics"]["source"].update(scoring="0" * 64)),
        "was made by another source of the scoring (digest 0000000000, here ",
    ),
    "no source": (of_run(lambda raw: raw.update(source=None)), "does not record the source that determined its number"),
    "numerics": (anew(lambda raw: raw["identity"].update(numerics=True)), "has version true of the numerics"),
    "data": (
        of_scores(lambda raw: raw.update(data_sha256="bb")),
        "was scored on another version of data set Set_A: bb, the others on aa; get one version on both sides",
    ),
    # Identity and record
    "seed": (of_run(lambda raw: raw.update(seed=7)), CONTRADICTS.format("seed")),
    "key": (of_run(lambda raw: raw["identity"].update(seed=7)), CONTRADICTS.format("key")),
    "attention": (
        of_run(lambda raw: raw.update(attention="local", source=source_digests("local", True))),
        CONTRADICTS.format("attention"),
    ),
    "settings": (of_run(lambda raw: raw["settings"].update(k=99)), CONTRADICTS.format("settings")),
    "comparison": (of_run(lambda raw: raw.update(comparison="0" * 64)), CONTRADICTS.format("comparison")),
    "name": (of_run(lambda raw: raw.update(method="kit2")), CONTRADICTS.format("name of the folder")),
    "type of the seed": (anew(lambda raw: raw["identity"].update(seed=1.0)), CONTRADICTS.format("seed")),
    "bool as seed": (anew(lambda raw: raw["identity"].update(seed=True)), CONTRADICTS.format("seed")),
    "type of k": (anew(lambda raw: raw["identity"]["settings"].update(k=4.0)), CONTRADICTS.format("settings")),
    "type of k twice": (anew(other_settings), "(Method 'kit': k is 4.0: input should be a valid integer)"),
    "unknown setting": (
        anew(lambda raw: [part["settings"].update(fake=1) for part in (raw, raw["identity"])]),
        "Method 'kit' has no setting 'fake'",
    ),
    "absent setting": (
        anew(lambda raw: [part["settings"].pop("k") for part in (raw, raw["identity"])]),
        "has other settings than its method kit makes of them",
    ),
    "extra key": (anew(lambda raw: raw["identity"].update(fake=1)), CONTRADICTS.format("fake")),
    "extra null": (anew(lambda raw: raw["identity"].update(fake=None)), CONTRADICTS.format("set of keys")),
    "training images": (
        anew(lambda raw: raw["identity"].update(train_sha256=["00"])), CONTRADICTS.format("train_sha256"),
    ),
    "initial weights": (
        anew(lambda raw: raw["identity"].update(init_sha256="00")), CONTRADICTS.format("initial weights"),
    ),
    # Texts
    "terminal": (
        of_run(lambda raw: raw["environment"].update(commit="\x9b2J")),
        r"contains characters that end lines or control a terminal, in '\x9b2J'",
    ),
    "lines": (of_run(lambda raw: raw["environment"]["versions"].update(torch=f"2{NESTED}")), r"in '2\n\n## 7. KiT win"),
    "tab": (of_run(lambda raw: raw.update(suite="a\tb")), r"in 'a\tb'"),
    "direction": (of_training(lambda raw: raw.update(notes={"found": "\u202eb"})), r"in '\u202eb'"),
    "surrogate": (of_training(lambda raw: raw.update(notes={"\ud800": 1})), r"in '\ud800'"),
    "card": (of_run(lambda raw: raw.update(card="a\x1b[2J")), r"in 'a\x1b[2J'"),
    # Suite
    "suite of another task": (of_run(lambda raw: raw.update(suite="derain")), "suite derain, preset smoke and task denoise"),
    "unknown preset": (of_run(lambda raw: raw.update(preset="mine")), "preset mine and task denoise, which the suite"),
    "suite": (of_run(lambda raw: raw.update(suite="a b|c")), "a name of its suite or preset that no suite can have"),
    # Training
    "steps": (of_training(lambda raw: raw.update(steps=1)), "was trained for 1 step, its recipe has 20"),
    "no log": (lambda folder: folder.log.unlink(), "lacks its training log"),
    "no checksum of the log": (of_training(lambda raw: raw.update(log_sha256=None)), "lacks its training log, or the"),
    "no checksum": (without_checksum, "/training.json does not state its own checksum"),
    # Scores
    "sigma": (of_sigma(300), "was scored on Set_A at sigma 300.0, which its task does not have"),
    "no sigma": (of_sigma(None), "was scored on Set_A at sigma None, which its task does not have"),
    "psnr": (of_scores(lambda raw: raw["scores"][0].update(psnr=1e300)), "has PSNR 1e+300 on image 0 of Set_A"),
    "ssim": (of_scores(lambda raw: raw["scores"][0].update(ssim=5)), "has SSIM 5 on image 0 of Set_A"),
    "one image twice": (
        of_scores(lambda raw: raw.update(scores=raw["scores"][:1] * 5)), "has an image of Set_A twice",
    ),
    "fewer images": (
        of_scores(lambda raw: raw["scores"].pop()), "was scored on 1 image of Set_A (without 1), the others on 2",
    ),
    "other images": (of_scores(other_name), "was scored on 2 images of Set_A (without 1 and with other), the others"),
}  # fmt: skip


@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_clone_is_refused_in_one_sentence_that_names_what_differs_and_what_to_do(
    what: str, stranger: Path, tmp_path: Path
) -> None:
    store_whole(tmp_path / "ours", "local")
    before = sorted((tmp_path / "ours").rglob("*"))
    alter, expected = ALTERED[what]
    alter(find([stranger])[1])
    said = imported(stranger, tmp_path / "ours", code=2).stderr
    assert expected in said
    assert said.endswith(". Nothing was imported.\n")
    assert "; ask its author" in said or ", or " in said or "update the older" in said
    assert ".import-" not in said
    assert sorted((tmp_path / "ours").rglob("*")) == before


def test_a_reference_without_training_is_of_its_task_alone(tmp_path: Path) -> None:
    folder = store_whole(tmp_path / "theirs", "input", None)
    rewrite(folder.path / "run.json", lambda raw: raw["identity"].update(task={"kind": "derain"}))
    renamed(folder)
    assert CONTRADICTS.format("task") in imported(tmp_path / "theirs", tmp_path / "ours", code=2).stderr


def test_an_attention_is_not_run_without_training(tmp_path: Path) -> None:
    store_whole(tmp_path / "theirs", "kit", None)
    said = imported(tmp_path / "theirs", tmp_path / "ours", code=2).stderr
    assert "was run without training, which is not what its method kit is made for" in said


@pytest.mark.parametrize("where", ["theirs", "ours"])
def test_a_twin_of_a_run_under_another_key_is_refused(where: str, tmp_path: Path) -> None:
    """Of a user's own file, whose settings nobody here can check: 4.0 is 4 to a table."""
    own = {"attention": "ab" * 32}

    def of_file(out: Path, k: float) -> RunFolder:
        folder = store_whole(out, "kit")
        settings = {"k": k}
        rewrite(
            folder.path / "run.json",
            lambda raw: raw.update(own, settings=settings, identity=raw["identity"] | own | {"settings": settings},
                                   source=raw["source"] | own),
        )  # fmt: skip
        return renamed(folder)

    of_file(tmp_path / where, 4)
    of_file(tmp_path / "theirs", 4.0)
    said = imported(tmp_path / "theirs", tmp_path / "ours", code=2).stderr
    assert "has the attention, settings and seed of run" in said


@pytest.mark.parametrize("what", ["data", "fewer images"])
def test_the_runs_of_one_archive_must_agree_with_one_another(what: str, stranger: Path, tmp_path: Path) -> None:
    alter, expected = ALTERED[what]
    alter(find([stranger])[1])
    assert expected in imported(stranger, tmp_path / "ours", code=2).stderr
    assert not (tmp_path / "ours").exists()


def test_a_card_may_have_lines(stranger: Path, tmp_path: Path) -> None:
    for folder in find([stranger]):
        rewrite(folder.path / "run.json", lambda raw: raw.update(card="KiT.\n\n\tIn two lines."))
    assert "2 runs imported" in imported(stranger, tmp_path / "ours").output


def test_a_run_is_scored_at_other_noise_levels_than_its_record_names(stranger: Path, tmp_path: Path) -> None:
    """`run --set task.sigma_test` adds them to the folder, whose run.json stays."""
    for folder in find([stranger]):
        of_sigma(35)(folder)
    assert "2 runs imported" in imported(stranger, tmp_path / "ours").output


def test_tuned_and_longer_runs_are_admitted_and_stand_in_tables_of_their_own(tmp_path: Path) -> None:
    store_whole(tmp_path / "ours", "local")
    smoke = load_suite("denoise", "smoke")
    longer = smoke.model_copy(update={"recipe": smoke.recipe.model_copy(update={"steps": 40})})
    store_whole(tmp_path / "theirs", "kit", lr=0.004)
    store_whole(tmp_path / "theirs", "kit", of=longer)
    assert "2 runs imported" in imported(tmp_path / "theirs", tmp_path / "ours").output
    text = render(find([tmp_path / "ours"]), "markdown")
    captions = [line for line in text.splitlines() if "recipe smoke" in line]
    assert len(captions) == 3
    assert sum("20 steps" in line and "learning rate 0.004" in line for line in captions) == 1
    assert sum("40 steps" in line for line in captions) == 1


def test_a_recipe_of_a_users_own_must_be_that_of_a_run_that_is_here(tmp_path: Path) -> None:
    """No caption names its learning rate."""
    smoke = load_suite("denoise", "smoke")
    own = smoke.model_copy(update={"recipe": smoke.recipe.model_copy(update={"name": "mine"})})
    store_whole(tmp_path / "theirs", "kit", of=own)
    store_whole(tmp_path / "ours", "local", of=own, lr=0.004)
    said = imported(tmp_path / "theirs", tmp_path / "ours", code=2).stderr
    assert "was trained by another recipe mine: lr" in said
    store_whole(tmp_path / "ours", "local", of=own)
    assert "1 run imported" in imported(tmp_path / "theirs", tmp_path / "ours").output


def test_a_refused_recipe_is_compared_with_the_nearest_one_shipped_or_of_a_run_that_is_here(tmp_path: Path) -> None:
    smoke = load_suite("denoise", "smoke")
    ours, theirs = (
        smoke.model_copy(update={"recipe": smoke.recipe.model_copy(update={"batch": 8, "clip": clip})})
        for clip in (0.5, 0.25)
    )
    store_whole(tmp_path / "ours", "local", of=ours)
    store_whole(tmp_path / "theirs", "kit", of=theirs)
    said = imported(tmp_path / "theirs", tmp_path / "ours", code=2).stderr
    assert "was trained by another recipe smoke: clip 0.25, here 0.5; run a method by that recipe" in said


def test_what_is_damaged_in_an_archive_is_not_for_the_importer_to_restore(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find([stranger])[0]
    folder.log.write_text("step\n")
    with monkeypatch.context() as careless:
        careless.setattr(RunFolder, "logged", lambda _: [])  # an exporter that does not look
        invoke("export", stranger, "--out", tmp_path / "x.zip", "--by", "Jane Doe")
    said = invoke("import", tmp_path / "x.zip", "--out", tmp_path / "ours", code=2).stderr
    assert "ask its author for another export" in said
    assert "restore it" not in said
