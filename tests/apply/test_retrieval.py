"""`kitbench retrieval`: true copies are found without noise, and what methods gain from copies is computed by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from kitbench.apply import retrieval
from kitbench.apply.retrieval import FeatureMap, measure_recall, network_features, pixel_features, share_of_copies
from kitbench.apply.trained import load_trained
from kitbench.attention import layout
from kitbench.cli.main import cli
from kitbench.data.repetition import SCENES
from kitbench.store.folder import find
from kitbench.verdict import repetition
from kitbench.verdict.contrasts import blocks
from kitbench.verdict.entries import entries
from tests.stored import store

CPU = torch.device("cpu")


def test_the_sets_have_one_name() -> None:
    from kitbench.data import repetition as generated

    assert (repetition.WITH, repetition.WITHOUT) == (generated.WITH, generated.WITHOUT)
    assert {scene.kind for scene in SCENES} == set(repetition.KINDS)


def test_the_share_of_copies_is_that_of_a_loop() -> None:
    random = np.random.default_rng(0)
    group = random.integers(0, 12, 40)  # groups of one to several
    neighbours = np.stack([np.r_[i, random.choice(np.delete(np.arange(40), i), 4, replace=False)] for i in range(40)])
    expected = []
    for i in range(40):
        copies = [j for j in range(40) if j != i and group[j] == group[i]]
        if copies:
            expected.append(len(set(copies) & set(neighbours[i, 1:])) / min(4, len(copies)))
    assert 0 < len(expected) < 41
    np.testing.assert_allclose(share_of_copies(neighbours, group), expected)


def test_without_noise_exact_search_finds_the_true_copies_and_noise_hides_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = measure_recall([0], None, CPU)
    monkeypatch.setattr(retrieval, "SCENES", [scene for scene in SCENES if scene.side < 256])
    with_noise = measure_recall([0, 50], None, CPU)
    kinds = {kind for kind, _ in found}
    assert kinds == {"copies", "periodic"}
    assert {(s.descriptor, s.patch, s.k) for _, s in found} == {
        (descriptor, patch, k) for descriptor in ("flat", "mean") for patch in (4, 8) for k in (4, 8)
    }
    for search, by_sigma in found.items():
        clean = by_sigma[0]
        assert clean.exact / clean.counted >= 0.99
        assert clean.hashed <= clean.exact
        assert clean.hashed / clean.counted > 0.5  # a copy has the same hash code
        clean, noisy = with_noise[search].values()
        assert clean.counted == noisy.counted > 100
        assert noisy.exact < 0.9 * clean.exact
        assert noisy.exact > 1.2 * noisy.chance


def test_random_neighbours_find_as_many_copies_as_chance_says() -> None:
    """The share that `chance` predicts, by drawing."""
    [scene] = [scene for scene in SCENES if scene.name == "periodic-128-016-a"]
    group = retrieval.copies_of_patches(scene, 8)
    count, k = len(group), 8
    tables = [
        retrieval.retrieval.random_neighbours(count, k, torch.randint(2**62, (k,), generator=g)).numpy()
        for g in (torch.Generator().manual_seed(seed) for seed in range(40))
    ]
    drawn = np.mean([share_of_copies(table, group).mean() for table in tables])
    found: retrieval.Recall = {}
    [flat, _] = pixel_features(torch.zeros(1, 128, 128, 3).normal_(generator=torch.Generator().manual_seed(0)))
    retrieval._count(found, scene, 0.0, flat, 8)
    [tally] = [by_sigma[0.0] for (_, search), by_sigma in found.items() if search.k == k]
    assert drawn == pytest.approx(tally.chance / tally.counted, rel=0.05)
    assert tally.exact / tally.counted < 3 * drawn  # noise alone: nothing to find


def test_patches_that_are_larger_than_what_was_copied_do_not_count() -> None:
    [scene] = [scene for scene in SCENES if scene.name == "copies-128-032-a"]
    found: retrieval.Recall = {}
    for stride, expected in ((4, 2), (8, 0)):  # 8 x 8 positions are 32 px, then 64 px: a square has 32
        retrieval._count(found, scene, 0.0, FeatureMap(f"{stride}", stride, "mean", torch.rand(1, 32, 32, 2)), 8)
        assert sum(search.features == f"{stride}" for _, search in found) == expected


def test_a_map_of_few_patches_has_no_row_for_more_neighbours_than_it_has() -> None:
    """As at the deepest level of a network of four: 8 x 8 positions of 8 px are 4 patches of an image of 128 px."""
    [scene] = [scene for scene in SCENES if scene.name == "copies-128-064-a"]
    found: retrieval.Recall = {}
    retrieval._count(found, scene, 0.0, FeatureMap("bottom.0", 8, "mean", torch.rand(1, 16, 16, 2)), 8)
    [(_, search)] = found
    assert search.k == 4
    tally = found["copies", search][0.0]
    assert tally.counted == 2
    assert tally.exact == tally.hashed == tally.chance == 2  # all patches are neighbours


def test_the_features_of_a_network_are_the_tokens_that_its_attentions_get(tiny_runs: Path) -> None:
    [folder] = [run for run in find([tiny_runs]) if run.run.method == "kit" and run.run.seed == 0]
    model, _ = load_trained(folder, None, CPU)
    seen: list[torch.Tensor] = []
    [(name, attention)] = model.attentions()
    handle = attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    image = torch.rand(1, 64, 64, 3)
    [found] = network_features(model, image)
    handle.remove()
    assert torch.equal(found.tokens, seen[0])
    assert (f"{found.name}.attention", found.stride, found.descriptor) == (name, 2, "mean")
    assert found.tokens.shape == (1, 32, 32, 16)
    assert layout.grid(32, 32, 4) == (8, 8)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["retrieval", *map(str, arguments)])


def test_the_command_prints_a_row_for_each_feature_map(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "SCENES", [scene for scene in SCENES if scene.side == 128])
    folders = {folder.run.method: folder.path for folder in find([tiny_runs])}
    done = run("--run", folders["kit"], "--sigma", "0,25", "--out", tmp_path / "found.md")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "found.md").read_text()
    assert "σ0 |" in text.replace("  ", " ")
    for row in ("pixels", "bottom.0"):
        assert sum(line.startswith(f"| {row} ") for line in text.splitlines()) == {"pixels": 16, "bottom.0": 8}[row]
    without = run("--run", folders["conv"], "--sigma", "0")
    assert without.exit_code == 2
    assert "does not select patches; give a run of kit" in without.output


@pytest.mark.parametrize("text", ["", "a,b", "25;50", "-1", "300", "0,,25"])
def test_a_wrong_noise_level_is_refused(text: str) -> None:
    done = run("--sigma", text)
    assert done.exit_code == 2
    assert "--sigma takes noise levels from 0 to 255, like 0,15,25" in done.output


def test_a_protocol_without_runs_is_refused() -> None:
    done = run("--protocol", "awgn8")
    assert done.exit_code == 2
    assert "--protocol chooses among the scores of stored RUNS; name some, or leave it out." in done.output


# The gain from copies

IMAGES = ("copies-a", "copies-b", "copies-c", "periodic-a", "periodic-b", "periodic-c")


def scored(out: Path, method: str, data_set: str, psnr: list[float], seed: int, exact: int = 0) -> None:
    """A stored run with an evaluation whose images have the names of the generated sets; the first were restored
    exactly.
    """
    folder = store(out, method, psnr, seed, data_set=data_set)
    [evaluation] = [e for e in folder.evaluations() if e.data_set == data_set]
    named = tuple(
        score.model_copy(update={"image": name} | ({"psnr": None} if number < exact else {}))
        for number, (score, name) in enumerate(zip(evaluation.scores, IMAGES, strict=True))
    )
    path = folder.evaluation_path(data_set, evaluation.sigma, evaluation.stamp)
    folder.write(f"eval/{path.name}", evaluation.model_copy(update={"scores": named}))


@pytest.fixture
def gained(tmp_path: Path) -> Path:
    """conv gains .1 dB on every image; kit gains .5, .6, .7 on copies and 1.1 on periodic textures; two seeds."""
    base = np.array([25, 26, 27, 28, 29, 30.0])
    for seed, effect in ((0, -0.2), (1, 0.2)):
        for method, gain in (("conv", [0.1] * 6), ("kit", [0.5, 0.6, 0.7, 1.1, 1.1, 1.1])):
            scored(tmp_path, method, repetition.WITHOUT, list(base + effect), seed)
            scored(tmp_path, method, repetition.WITH, list(base + effect + np.array(gain)), seed)
    return tmp_path


def test_a_gain_is_the_mean_over_images_and_seeds_of_one_kind(gained: Path) -> None:
    [block] = blocks(entries(find([gained]), None))
    by_method = {gain.method: gain for gain in repetition.gains(block, "σ25", "copies")}
    kit = by_method["kit"]
    assert (kit.seeds, *kit.values.mean((1, 2))) == ((0, 1), pytest.approx(26.6), pytest.approx(26))
    np.testing.assert_allclose(kit.by_image, [0.5, 0.6, 0.7])
    assert kit.error == pytest.approx(0.1 / 3**0.5)
    [copies, periodic] = repetition.gain_sheets(find([gained]), None)
    assert copies.lines == (
        ("conv", "26.10", "26.00", "+0.100", "0.000", "-", "2"),
        ("kit", "26.60", "26.00", "+0.600", "0.058", "+0.500 ± 0.058", "2"),
    )
    assert periodic.lines[1] == ("kit", "30.10", "29.00", "+1.100", "0.000", "+1.000 ± 0.000", "2")
    assert "squares that stand twice" in copies.caption
    assert "periodic textures" in periodic.caption


def test_an_image_that_was_restored_exactly_has_no_gain(gained: Path) -> None:
    scored(gained, "kit", repetition.WITH, [25.3, 26.6, 27.7, 29.1, 30.1, 31.1], 0, exact=1)
    [block] = blocks(entries(find([gained]), None))
    [kit] = [gain for gain in repetition.gains(block, "σ25", "copies") if gain.method == "kit"]
    assert len(kit.by_image) == 2


def test_a_gain_beyond_the_control_is_paired_by_image_and_seed(gained: Path) -> None:
    base = np.array([25, 26, 27, 28, 29, 30.0])
    # No finite score of conv on image a, nor of kit on image c; a third seed of kit alone.
    scored(gained, "conv", repetition.WITH, list(base - 0.1), 0, exact=1)
    scored(gained, "kit", repetition.WITHOUT, list(base + 9), 2)
    scored(gained, "kit", repetition.WITH, list(base), 2)
    for seed in (0, 1, 2):
        folder = store(gained, "kit", 30.0, seed, data_set="unused")
        [of] = [e for e in folder.evaluations() if e.data_set == repetition.WITH]
        scores = [s.model_copy(update={"psnr": None if s.image == "copies-c" else s.psnr}) for s in of.scores]
        path = folder.evaluation_path(repetition.WITH, of.sigma, of.stamp)
        folder.write(f"eval/{path.name}", of.model_copy(update={"scores": tuple(scores)}))
    sheet = repetition.gain_sheets(find([gained]), None)[0]
    [kit] = [line for line in sheet.lines if line[0] == "kit"]
    assert kit[5] == "+0.500"  # image b, seeds 0 and 1: .6 beyond .1
    assert "Means over the 2 images" in sheet.notes[0]


def test_runs_that_were_not_scored_on_both_sets_are_refused(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0, data_set="Repetition")
    done = run(tmp_path)
    assert done.exit_code == 2
    assert "None of these trained runs was scored on both Repetition and Repetition-none" in done.output
