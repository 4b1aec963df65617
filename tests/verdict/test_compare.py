"""Paired comparisons between stored runs, and how tables show them; LaTeX that compiles."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kitbench.data.cards import card
from kitbench.data.photograph import read_set
from kitbench.spec.loading import load_suite
from kitbench.store.folder import RunFolder, find
from kitbench.verdict.against import against_sheets
from kitbench.verdict.compare import against_best, compare, equal_seeds, paired_scores, scene
from kitbench.verdict.contrasts import blocks
from kitbench.verdict.entries import entries
from kitbench.verdict.render import render
from kitbench.verdict.rows import rows
from tests.conftest import ROOT
from tests.stored import store


def photographs(seed: int, method: int, gain: float) -> np.ndarray:
    """24 images that differ by decibels, what the seed does to all methods, and a little noise."""
    images = 30 + np.linspace(-4, 4, 24)
    random = np.random.default_rng((seed, method))
    return images + 0.1 * np.sin(seed) + gain + 0.02 * random.standard_normal(24)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for seed in range(4):
        for number, (method, gain) in enumerate({"kit": 0.2, "window": 0.2, "conv": 0.0}.items()):
            store(tmp_path, method, photographs(seed, number, gain), seed, data_set="CBSD68", sigma=50)
    store(tmp_path, "input", photographs(0, 9, -10), None, data_set="CBSD68", sigma=50)
    return tmp_path


def test_differences_are_paired_by_seed_and_image(tmp_path: Path) -> None:
    for method, gain in (("kit", 0.5), ("conv", 0.0)):
        for seed in (0, 1, 2) if method == "kit" else (1, 2, 3):
            store(tmp_path, method, [30.0 + seed + gain, 20.0 + gain], seed)
    [block] = blocks(entries(find([tmp_path]), None))
    found = paired_scores([block.methods["kit"], block.methods["conv"]])
    np.testing.assert_allclose(found.values[0] - found.values[1], np.full((2, 2), 0.5), atol=1e-12)
    assert found.seeds == (1, 2)
    assert found.images == (("Set_A", "0"), ("Set_A", "1"))
    assert paired_scores([block.methods["kit"], {}]) is None


def test_the_sigmas_of_one_image_count_as_one_image(tmp_path: Path) -> None:
    for sigma, gain in ((15, 0.1), (25, 0.3)):
        store(tmp_path, "kit", [30.0 + gain, 28.0 + gain], sigma=sigma)
        store(tmp_path, "conv", [30.0, 28.0], sigma=sigma)
    [block] = blocks(entries(find([tmp_path]), None))
    found = paired_scores([block.methods["kit"], block.methods["conv"]])
    np.testing.assert_allclose(found.values[0] - found.values[1], [[0.2, 0.2]], atol=1e-12)


def test_rows_separate_noise_from_a_difference(three: Path) -> None:
    table = rows(find([three])).set_index("method")
    assert table.loc["conv", "within_noise"] == False  # noqa: E712
    other = next(name for name in ("kit", "window") if table.loc[name, "best"])
    assert table.loc[other, "within_noise"] == True  # noqa: E712
    assert table.loc["conv", "to_best_low"] < -0.2 < table.loc["conv", "to_best_high"]
    assert 0 < table.loc["conv", "detectable_db"] < 0.15
    half = 3.182 * np.std([photographs(s, 2, 0).mean() for s in range(4)], ddof=1) / 2  # t of 3 degrees of freedom
    assert table.loc["conv", "psnr_pm_seeds"] == pytest.approx(half, rel=1e-3)


def test_the_star_stands_where_the_difference_to_the_best_is_noise(three: Path) -> None:
    text = render(find([three]), "markdown")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert sum(r"\*" in lines[name] for name in ("kit", "window")) == 1
    assert r"\*" not in lines["conv"]
    assert "±" in lines["conv"]
    assert "±" not in lines["input"]
    assert r"\* not distinguishable from the best of its column at 5 %" in text
    assert re.search(r"These seeds and images detect differences of 0\.\d\d dB or more with 80 % power\.", text)


def test_one_seed_says_no_interval(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0)
    store(tmp_path, "conv", 31.0)
    text = render(find([tmp_path]), "terminal")
    assert "One seed: no interval" in text
    assert "±" not in text
    assert rows(find([tmp_path]))["within_noise"].isna().all()


def test_the_caption_names_a_learning_rate_and_an_average_that_are_not_the_recipes(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0, lr=2e-3, of=load_suite("denoise", "smoke", ["recipe.ema=0.9"]))
    for rate in (2e-3, 4e-3):  # that of the recipe smoke, and twice as much
        store(tmp_path, "kit", 30.0, lr=rate)
    text = render(find([tmp_path]), "markdown")
    assert sorted(re.findall(r" px(.*?)\), width", text)) == ["", ", ema 0.9", ", learning rate 0.004"]


def test_the_caption_names_every_suite_of_a_table(tmp_path: Path) -> None:
    """Runs of two suites are compared where all that decides their numbers is the same."""
    store(tmp_path, "kit", 30.0, of=load_suite("denoise", "quick"))
    alone = {"attention": "kit", "settings": {"k": 1, "patch": 4}, "of": load_suite("ablate", "quick")}
    store(tmp_path, "kit-k1", 29.0, **alone)
    for form in ("markdown", "terminal"):
        assert "ablate, denoise, colour, recipe quick" in " ".join(render(find([tmp_path]), form).split())
    [sheet] = against_sheets(find([tmp_path]), "kit")
    assert "that of kit: ablate, denoise, colour" in sheet.caption


def student_with_all_pairs(methods: dict[str, np.ndarray]) -> dict[frozenset[str], float]:
    """Holm-adjusted p values of all pairs of scores [seeds, images], by Student's test over seeds alone."""
    pairs = [frozenset(pair) for pair in combinations(methods, 2)]
    raw = []
    for a, b in pairs:
        raw.append(float(stats.ttest_rel(methods[a].mean(1), methods[b].mean(1)).pvalue))
    adjusted, running = {}, 0.0
    for rank, place in enumerate(np.argsort(raw)):
        running = max(running, min(1.0, raw[place] * (len(pairs) - rank)))
        adjusted[pairs[place]] = running
    return adjusted


@pytest.mark.parametrize(
    "name", ["denoise-cbsd68-cpu", "denoise-cbsd68-first-cpu", "denoise-real-cc15-cpu", "derain-rain100l-cpu"]
)
def test_the_stored_runs_decide_nothing_that_students_test_over_seeds_does_not(name: str) -> None:
    found = find([ROOT / "results" / "reference" / name])
    table = rows(found)
    ranked = table[table["best"].notna()]
    for block in blocks(entries(found, None)):
        scores = paired_scores(list(block.methods.values()))
        expected = student_with_all_pairs(dict(zip(block.methods, scores.values, strict=True)))
        compared = ranked[ranked["comparison"] == block.first.run.comparison[:10]]
        assert len(compared) == len(block.methods) - 1
        for row in compared.to_dict("records"):
            student = expected[frozenset((row["method"], row["best"]))]
            assert row["p_holm"] >= student * (1 - 1e-6)
            assert row["within_noise"] or student < 0.05


def test_other_seeds_are_marked_and_do_not_strip_the_ranked_rows_of_their_statistics(three: Path) -> None:
    expected = rows(find([three])).set_index("method")
    store(three, "global", photographs(0, 5, 3.0), 0, data_set="CBSD68", sigma=50)
    store(three, "nlm", photographs(0, 9, 5.0), None, data_set="CBSD68", sigma=50)
    table = rows(find([three])).set_index("method")
    assert dict(table["ranked"]) == {
        "input": False, "nlm": False, "global": False, "kit": True, "window": True, "conv": True
    }  # fmt: skip
    for column in ("best", "p_holm", "detectable_db", "psnr_pm_seeds"):
        assert table.loc[["kit", "window", "conv"], column].equals(expected.loc[["kit", "window", "conv"], column])
    text = render(find([three]), "markdown")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    marks = {name: [mark for mark in ("**", "<u>", r"\*", "§") if mark in lines[name]] for name in lines}
    assert marks["nlm"] == marks["input"] == []
    assert marks["global"] == ["§"]
    assert "**" in lines["kit"] + lines["window"]
    assert "§ not ranked and not compared: other seeds than the ranked rows (0,1,2,3)." in text


def test_ranked_are_those_of_several_seeds_then_most_methods_then_most_seeds(tmp_path: Path) -> None:
    def ranked(**seeds: range) -> list[str]:
        columns = {}
        for method, own in seeds.items():
            folder = tmp_path / f"{method}{own}"
            group = [e for seed in own for e in entries([store(folder, method, 30.0, seed)], None)]
            columns[method] = {("Set_A", "σ25"): group}
        return equal_seeds(columns)

    one, three, five = range(1), range(3), range(5)
    assert ranked(kit=one, local=one, window=one, conv=three) == ["kit", "local", "window"]
    assert ranked(kit=one, local=one, window=one, conv=three, pair=three) == ["conv", "pair"]
    assert ranked(kit=three, local=three, window=three, conv=five, pair=five) == ["kit", "local", "window"]
    assert ranked(kit=three, local=three, conv=five, pair=five) == ["conv", "pair"]
    assert ranked() == []


def test_a_column_that_cannot_decide_is_marked_in_a_table_that_can(three: Path) -> None:
    for seed in range(4):
        for number, method in enumerate(("kit", "window", "conv")):
            store(three, method, photographs(seed, number, number)[:3], seed, data_set="Set_B", sigma=50)
    table = rows(find([three])).set_index(["data_set", "method"])
    assert table.loc[("CBSD68", "conv"), "within_noise"] == False  # noqa: E712
    assert table.loc[("Set_B", "kit"), "within_noise"] == True  # noqa: E712
    assert "3 images are too few to decide a difference, at least 6 are needed" in render(find([three]), "markdown")
    [block] = blocks(entries(find([three]), None))
    alone, both = (
        against_best({one: {name: {one: of[one]} for name, of in block.methods.items()} for one in columns})
        for columns in ([("CBSD68", "σ50")], [("CBSD68", "σ50"), ("Set_B", "σ50")])
    )
    found, expected = ([(c.p_holm, c.detectable, c.family) for c in of["CBSD68", "σ50"]] for of in (both, alone))
    assert found == expected
    assert {family for _, _, family in found} == {3}  # not 6: the pairs on Set_B have no p value


SEVERAL_OF_A_SCENE = {
    "Levin09": [[f"im{i}_kernel{k}_img" for k in range(1, 9)] for i in range(1, 5)],
    "GoPro": [[f"GOPR0{v}_11_00/blur/{f:06d}" for f in range(v)] for v in (3, 4)]
    + [[f"input/GOPR0{v}_11_00-{f:06d}" for f in range(v)] for v in (5, 6)],
    "GoPro-gamma": [[f"GOPR0{v}_11_00/blur_gamma/{f:06d}" for f in range(v)] for v in (3, 4)],
    "RealBlur-J": [[f"RealBlur-J_ECC_IMCORR/scene{s:03d}/blur/blur_{n}" for n in range(5)] for s in (1, 2)],
    "RealBlur-R": [[f"RealBlur-R_BM3D_ECC_IMCORR/scene{s:03d}/blur/blur_{n}" for n in range(5)] for s in (1, 2)],
    "HIDE": [["test/test-close-ups/1fromGOPR1000", "test/test-long-shot/2fromGOPR1000"], ["input/1fromGOPR1001"]],
    "PolyU": [[f"CroppedImages/Canon5D2_5_160_3200_{what}_{n}_real" for n in (5, 11)] for what in ("chair", "plug")],
    "Test2800": [[f"input/{picture}_{rain}" for rain in range(1, 15)] for picture in (901, 902)],
    "SIDD-validation": [[f"ValidationNoisyBlocksSrgb/{p:02d}_{b:02d}" for b in range(1, 33)] for p in range(1, 41)],
    "CBSD68": [["101085"], ["101087"], ["102061"]],
    "Rain100L": [["input/3", "input/4"], ["rainy/rain-005", "rainy/rain-014"], ["input/1"], ["input/30"]],
}


@pytest.mark.parametrize("data_set", SEVERAL_OF_A_SCENE)
def test_images_of_one_scene_count_as_one_image(data_set: str) -> None:
    scenes = SEVERAL_OF_A_SCENE[data_set]
    named = [{scene(data_set, image) for image in images} for images in scenes]
    assert [len(names) for names in named] == [1] * len(scenes)
    assert len(set.union(*named)) == len(scenes)


def test_pictures_that_rain100l_holds_twice_count_once(data_root: Path) -> None:
    if not (data_root / "Rain100L").is_dir():
        pytest.skip(f"Rain100L is not in {data_root}")
    scenes: dict[bytes, set[str]] = {}
    for photo in read_set(card("Rain100L"), data_root, "colour"):
        scenes.setdefault(photo.pixels.tobytes(), set()).add(scene("Rain100L", photo.name))
    assert len(scenes) == len(set.union(*scenes.values())) == 91


@pytest.mark.parametrize("data_set", ["GoPro", "HIDE", "RealBlur-R", "SIDD-validation", "PolyU", "Test2800"])
def test_images_whose_names_tell_no_scene_count_as_one(data_set: str) -> None:
    assert len({scene(data_set, f"input/{n}") for n in range(30)}) == 1


def test_a_scene_in_two_sets_counts_once(tmp_path: Path) -> None:
    for method in ("kit", "conv"):
        for data_set in ("Repetition", "Repetition-none", "CBSD68"):
            store(tmp_path, method, [30.0, 31.0, 32.0], data_set=data_set)
    [block] = blocks(entries(find([tmp_path]), None))
    found = paired_scores([block.methods["kit"], block.methods["conv"]])
    assert found.values.shape == (2, 1, 6)
    assert {data_set for data_set, _ in found.images} == {"Repetition", "CBSD68"}
    assert scene("Urban100", "HR/img_001_SRF_4_HR") == scene("Urban100-centre512", "img_001") == "img_001"
    assert scene("Kodak24-full", "kodim01") == scene("Kodak24", "kodim01")


def rename(run: RunFolder, images: list[str]) -> None:
    """Give the scored images these names."""
    [file] = (run.path / "eval").glob("*.json")
    record = json.loads(file.read_text())
    record.pop("sha256")
    record["scores"] = [s | {"image": image} for s, image in zip(record["scores"], images, strict=True)]
    file.write_text(json.dumps(record))


def test_what_differs_between_scenes_alone_decides_nothing_however_many_images_show_them(tmp_path: Path) -> None:
    """Four pictures under eight kernels: the methods differ by what suits the picture, alike for all its kernels."""
    images = [image for images in SEVERAL_OF_A_SCENE["Levin09"] for image in images]
    of_scene = np.repeat([0.9, 1.1, 1.0, 1.2], 8)
    random = np.random.default_rng(0)
    for method, gain in (("kit", of_scene), ("conv", 0 * of_scene)):
        for seed in range(5):
            scores = 28 + gain + 0.05 * random.standard_normal(32)
            run = store(tmp_path, method, scores, seed, data_set="Levin09", sigma=None)
            rename(run, images)
    [block] = blocks(entries(find([tmp_path]), None))
    found = compare("kit", "conv", block.methods["kit"], block.methods["conv"])
    assert (found.found.seeds, found.found.images, found.found.p) == (5, 4, None)
    row = rows(find([tmp_path])).set_index("method").loc["conv"]
    assert row["images"] == 32
    assert row["to_best_db"] == pytest.approx(found.found.mean * -1, abs=1e-12)
    assert row["to_best_db"] == pytest.approx(row["psnr_db"] - rows(find([tmp_path]))["psnr_db"].max(), abs=1e-9)
    text = render(find([tmp_path]), "markdown")
    assert "4 images are too few to decide a difference" in text
    assert "Levin09: the images of one scene are averaged and count as one image." in text


def test_where_the_best_over_scenes_is_not_the_best_mean_the_table_says_so(tmp_path: Path) -> None:
    """kit is better on four of five pictures, conv on the one that most kernels show."""
    images = [
        f"im{picture}_kernel{k}_img" for picture, kernels in enumerate((1, 1, 1, 1, 8), 1) for k in range(kernels)
    ]
    for method, gain in (("kit", [0.5] * 4 + [-0.5] * 8), ("conv", [0.0] * 12)):
        run = store(tmp_path, method, 30 + np.array(gain), data_set="Levin09", sigma=None)
        rename(run, images)
    table = rows(find([tmp_path])).set_index("method")
    assert table.loc["conv", "psnr_db"] > table.loc["kit", "psnr_db"]
    assert table.loc["conv", "best"] == "kit"
    assert "Levin09: the others are compared with kit, whose mean is the highest" in render(
        find([tmp_path]), "markdown"
    )


def test_every_table_names_the_runs_of_every_row(three: Path) -> None:
    runs = find([three])
    for form in ("markdown", "latex", "terminal", "csv", "json"):
        text = render(runs, form, wide=True)
        assert all(run.run.key[:10] in text for run in runs)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here: install texlive-latex-recommended")
def test_the_latex_compiles(three: Path, tmp_path: Path) -> None:
    store(
        three,
        "my_method^~",
        photographs(0, 5, 0.1),
        0,
        note="50 % of a\\b & c #1 {x} are $n/a",
        data_set="CBSD68",
        sigma=50,
    )
    body = render(find([three]), "latex")
    document = "\\documentclass{article}\n\\usepackage{booktabs}\n\\usepackage{graphicx}\n\\begin{document}\n"
    (tmp_path / "t.tex").write_text(document + body + "\\end{document}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "t.pdf").stat().st_size > 10_000
