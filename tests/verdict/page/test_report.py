"""The report: one file that holds everything, traced to runs, and that a browser shows without an error."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kitbench.errors import InputError
from kitbench.store.folder import find
from kitbench.verdict.claims import load
from kitbench.verdict.entries import Entry
from kitbench.verdict.page import pictures
from kitbench.verdict.page.figures import galleries_of
from kitbench.verdict.page.report import report
from tests.conftest import run_kitbench
from tests.stored import store
from tests.verdict.test_claims import sweep
from tests.verdict.test_contrasts import LR, QUICK, tuned

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: install the package chromium")


@pytest.fixture(scope="module")
def page(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    sweep(folder / "scale", {"kit": 1.0, "window": 1.0, "global": 2.0})
    run_kitbench(folder, "report", str(tiny_runs), "scale", "--out", "r.html")
    return folder / "r.html"


def test_the_page_is_small_and_needs_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text()
    assert len(text) < 10_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", text)
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_has_every_part_and_names_every_run(page: Path, tiny_runs: Path) -> None:
    text = page.read_text()
    ids = (
        "verdict",
        "claims",
        "tables",
        "curves",
        "crops",
        "figures",
        "published",
        "settings",
        "environment",
        "reproduce",
    )
    places = [text.index(f'<section id="{name}"') for name in ids]
    assert places == sorted(places)
    runs = find([tiny_runs])
    for folder in runs:
        assert folder.run.key[:10] in text
        assert folder.path.name in text
    assert text.count('class="gallery"') == 2  # two test images, one sigma
    assert text.count('<figure data-name="') == 2 * 4  # input, conv, kit, ground truth
    assert text.count('<figure class="picture') == 5  # two fronts, curves, differences, the sweep
    assert "python -m kitbench run --suite tiny.toml --seeds 0,1" in html.unescape(text)


def test_the_same_runs_give_the_same_page(page: Path, tiny_runs: Path) -> None:
    runs = find([tiny_runs])
    assert report(runs, []) == report(runs[::-1], [])


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    store(tmp_path, "conv", 30.0, note="<script>alert(1)</script>")
    text = report(find([tmp_path]), [])
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "No crops are stored with these runs" in text


def test_one_seed_decides_nothing_in_words(tmp_path: Path) -> None:
    for number, method in enumerate(("kit", "window")):
        store(tmp_path, method, 30.0 + number)
    text = report(find([tmp_path]), [])
    assert "Nothing is decided about kit: one seed: no interval." in text
    assert "better than" not in text[: text.index('id="claims"')]
    assert "trained long enough" not in text
    store(tmp_path, "nlm", 35.0, seed=None)
    assert "nlm, without any training, scores higher" in report(find([tmp_path]), [])


def test_a_reference_is_compared_over_the_columns_that_both_have_and_given_weights_are_no_lack_of_training(
    tmp_path: Path,
) -> None:
    for number, method in enumerate(("kit", "window")):
        for sigma, psnr in ((15, 33.0), (50, 27.0)):
            store(tmp_path, method, psnr + number, sigma=sigma)
    store(tmp_path, "nlm", 32.0, seed=None, sigma=15)  # above the mean over both levels, below at its own
    assert "nlm, without any training" not in report(find([tmp_path]), [])
    given = store(tmp_path, "ffdnet", 35.0, seed=None, sigma=15).path / "run.json"
    record = json.loads(given.read_text())
    record.pop("sha256")
    record["identity"]["weights_sha256"] = "aa"
    given.write_text(json.dumps(record))
    text = report(find([tmp_path]), [])
    assert "ffdnet, with weights trained elsewhere, scores higher." in text
    assert "not trained long enough" not in text


def test_methods_that_cannot_be_compared_are_not_called_too_few(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0, seed=0)
    assert "There are fewer than two trained methods" in report(find([tmp_path]), [])
    store(tmp_path, "window", 31.0, seed=1)
    text = report(find([tmp_path]), [])
    assert "No two of the trained methods have the same seeds and test images" in text
    for seed, method in ((0, "conv"), (0, "local"), (2, "san")):
        store(tmp_path, method, 20.0 + seed, seed=seed)
    text = report(find([tmp_path]), [])
    assert "kit has the highest mean PSNR of the trained methods with the same seeds." in text
    assert "With other seeds, and so not compared, these have a higher mean: window." in text


def test_a_set_that_one_seed_was_scored_on_hides_no_verdict(tmp_path: Path) -> None:
    """Nor does one that a single method was scored on."""
    for seed in range(4):
        for number, method in enumerate(("kit", "window")):
            store(tmp_path, method, [30.0 + number + 0.01 * (seed + i) for i in range(8)], seed)
    store(tmp_path, "kit", 20.0, data_set="Set_C")
    assert "Over all test images, window has the highest mean PSNR" in report(find([tmp_path]), [])
    for method in ("kit", "window"):
        store(tmp_path, method, 20.0, data_set="Set_B")
    text = report(find([tmp_path]), [])
    left_out = "without Set_B σ25, which fewer than 3 of these seeds were scored on"
    assert f"Over all test images, {left_out}, window has the highest mean PSNR of the trained methods." in text
    assert f'<p class="note">W{left_out[1:]}.</p>' in text


def test_the_ablation_says_what_its_p_is_corrected_for(tmp_path: Path) -> None:
    for method in ("kit", "kit-random", "kit-exact"):
        store(tmp_path, method, 30.0)
    text = report(find([tmp_path]), [])
    assert text.count("p is corrected for all pairs of methods") == 1
    assert text.count("p is corrected for all variants") == 1


def test_differences_beyond_noise_are_told_in_words(tmp_path: Path) -> None:
    for number, (method, gain) in enumerate({"kit": 0.5, "window": 0.5, "conv": 0.0}.items()):
        for seed in range(4):
            noise = 0.02 * np.random.default_rng((seed, number)).standard_normal(12)
            store(tmp_path, method, 30 + np.linspace(-3, 3, 12) + gain + noise, seed)
    text = report(find([tmp_path]), [])
    assert re.search(r"It is significantly better than conv", text)
    assert re.search(r"It is not distinguishable from (kit|window)", text)


def test_a_crop_is_cut_into_its_squares_and_a_damaged_one_is_refused(tiny_runs: Path, tmp_path: Path) -> None:
    path = next(tiny_runs.glob("*-conv-s0-*/crops/*-0.png"))
    crop = pictures.crop(path)
    assert all(
        data.startswith(b"\x89PNG") for data in (crop.whole, crop.degraded, crop.restored, crop.clean, crop.error)
    )
    left, top, width, height = crop.place
    assert 0 <= left <= 100 - width
    assert 0 <= top <= 100 - height
    bad = tmp_path / "bad.png"
    bad.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match="is not a stored crop"):
        pictures.crop(bad)


CURVE = {200: 20.0, 400: 25.0, 700: 30.0}


def curves_and_searches(out: Path) -> Path:
    """Two validated methods at two budgets, three noise levels, with every metric and a search of learning rates."""
    for steps in (700, 3000):
        for number, method in enumerate(("conv", "kit")):
            for seed in range(3):
                gain = 0.1 * number + 0.02 * np.random.default_rng((seed, number)).standard_normal(8)
                curve = {step: psnr - number for step, psnr in CURVE.items()}
                for sigma in (15, 25, 50):
                    store(
                        out, method, np.linspace(28, 33, 8) + gain, seed, steps=steps, of=QUICK, sigma=sigma,
                        ssim=0.8 + 0.01 * seed, lpips=0.1234, curve=curve, lr=LR, data_set="McMaster",
                    )  # fmt: skip
    return tuned(out, {"conv": 0.0, "kit": 0.1})


def section(text: str, name: str) -> str:
    return text[text.index(f'<section id="{name}"') :].partition("</section>")[0]


def test_the_page_shows_curves_ladder_and_search(tmp_path: Path) -> None:
    out = curves_and_searches(tmp_path)
    runs, sweeps, tunings = load([out])
    text = section(report([r for r in runs if r.run.seed != 99], sweeps, tunings), "curves")
    for axis in ("steps", "seconds", "multiply-adds"):
        assert text.count(f"<figcaption>Validation PSNR against {axis}</figcaption>") == 2  # a figure for each budget
    assert "Crops of Validation_A σ25. Mean over seeds; band" in text
    target = text[text.index('id="target-') :].partition("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in target.split("<tr>")[2:]]
    assert rows[0][:5] == ["conv", "3 of 3", "30.00", "700", "350"]
    assert rows[1] == ["kit", "0 of 3", "29.00", "never", "never", "never"]
    assert (
        text.count("<figcaption>Difference against budget") == 1
    )  # kit - conv; of the claims' contrasts there are no runs
    assert "Budget ladder: denoise, colour, 4 x 64 px per step" in text
    assert "Validation PSNR against the learning rate" in text
    assert re.search(r'class="best">21\.00\*</td>', text)


def test_the_figures_command_writes_those_of_the_page(page: Path, tiny_runs: Path) -> None:
    folder = page.parent

    def written(*arguments: str) -> dict[str, bytes]:
        said = run_kitbench(folder, "figures", str(tiny_runs), "scale", *arguments).stdout
        paths = re.findall(r"wrote (.+)", said)
        return {Path(path).name: (folder / path).read_bytes() for path in paths}

    drawn = written("--out", "drawn")
    stem = "tiny-colour-smoke-12-lr0.002"
    assert {name for name in drawn if not name.startswith("scale-")} == {
        f"{stem}-psnr-multiply-adds.svg", f"{stem}-psnr-memory.svg", f"{stem}-differences.svg", f"{stem}-training.svg",
    }  # fmt: skip
    embedded = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page.read_text())
    assert sorted(drawn.values()) == sorted(base64.b64decode(one) for one in embedded)
    pdf = written("--out", "drawn", "--format", "pdf")
    assert {Path(name).stem for name in pdf} == {Path(name).stem for name in drawn}
    assert all(content.startswith(b"%PDF-") for content in pdf.values())
    assert written("--out", "again", "--format", "pdf") == pdf
    (folder / "file").touch()
    refused = run_kitbench(folder, "figures", "scale", "--out", "file", code=2).stderr
    assert "file cannot be written (Not a directory)" in refused


def test_runs_that_were_not_validated_show_their_training_curve_and_say_so(page: Path) -> None:
    text = section(page.read_text(), "curves")
    assert text.count("<figcaption>Training curves</figcaption>") == 1
    assert "These runs were not validated during training, so there is no time to target." in text
    assert "No two lengths of one training are stored" in text
    assert "No search is stored" in text


def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    command = [BROWSER, *options, f"--user-data-dir={page.parent / 'profile'}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@needs_browser
def test_chromium_shows_the_page_without_a_console_error(page: Path, tmp_path: Path) -> None:
    assert "CONSOLE" not in browse(page, "--dump-dom").stderr
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", "<script>missing()</script></body>"))
    assert "CONSOLE" in browse(broken, "--dump-dom").stderr  # the check can fail


@needs_browser
def test_tables_sort_sliders_compare_and_every_image_loads(page: Path, tmp_path: Path) -> None:
    script = """<script>addEventListener("load", () => {
      const table = document.querySelector("#table-1"), sort = table.querySelectorAll("th button")[1];
      const first = () => table.tBodies[0].rows[0].cells[1].dataset.key;
      sort.click(); const high = first(); sort.click(); const low = first();
      const box = document.querySelector(".compare"), range = box.querySelector("input");
      range.value = 20; range.dispatchEvent(new Event("input"));
      const images = [...document.images];
      document.body.dataset.seen = [Number(high) > Number(low), box.querySelector(".top").style.clipPath,
        box.hidden, images.length, images.every(i => i.complete && i.naturalWidth > 0),
        document.documentElement.scrollWidth <= innerWidth].join("|");
    });</script></body>"""
    tried = tmp_path / "tried.html"
    tried.write_text(page.read_text().replace("</body>", script))
    for size in ("1280,900", "390,800"):
        [seen] = re.findall(r'data-seen="([^"]*)"', browse(tried, "--dump-dom", f"--window-size={size}").stdout)
        sorts, clip, hidden, images, loaded, fits = seen.split("|")
        assert (sorts, clip, hidden, loaded, fits) == ("true", "inset(0px 80% 0px 0px)", "false", "true", "true")
        assert int(images) > 20


@needs_browser
def test_a_crop_enlarges_on_click_and_key_and_the_arrows_show_the_next(page: Path, tmp_path: Path) -> None:
    script = """<script>addEventListener("load", () => {
      const shots = [...document.querySelectorAll(".gallery")][1].querySelectorAll(".shot");
      const large = document.querySelector("#large"), seen = [large.open];
      const key = (target, name) => target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
      const shows = number => seen.push(large.open && large.querySelector("img").src === shots[number].src);
      shots[1].click(); shows(1); key(large, "ArrowRight"); shows(2); key(large, "ArrowLeft"); key(large, "ArrowLeft"); shows(0);
      key(large, "ArrowLeft"); shows(shots.length - 1);
      large.querySelector("button").click(); seen.push(large.open);
      key(shots[2], "Enter"); shows(2);
      seen.push(large.getBoundingClientRect().width <= innerWidth, large.querySelector("span").textContent);
      document.body.dataset.seen = seen.join("|");
    });</script></body>"""
    tried = tmp_path / "tried.html"
    tried.write_text(page.read_text().replace("</body>", script))
    for size in ("1300,900", "400,800"):
        [seen] = re.findall(r'data-seen="([^"]*)"', browse(tried, "--dump-dom", f"--window-size={size}").stdout)
        *states, title = seen.split("|")
        assert states == ["false", "true", "true", "true", "true", "false", "true", "true"]
        assert re.fullmatch(r"skimage-test: chelsea σ25 \(colour\): conv \(3 of 4\)", title)


def test_the_ground_truth_stands_beside_the_whole_image(page: Path) -> None:
    for gallery in page.read_text().split('<section class="gallery">')[1:]:
        names = re.findall(r'data-name="([^"]*)"', gallery)
        assert names == ["ground truth", "input", "conv", "kit"]


def test_a_gallery_shows_the_runs_of_one_comparison(tiny_runs: Path, tmp_path: Path) -> None:
    """Two lengths of training: each in a gallery of its own, with the input; not the one's conv beside the other's kit."""
    shutil.copytree(tiny_runs, tmp_path / "runs")
    for folder in find([tiny_runs]):
        if folder.run.method == "kit" and folder.run.seed == 0:
            other = store(tmp_path / "runs", "kit", 30.0, steps=99, data_set="skimage-test")
            stem = next(folder.path.glob("eval/*.json")).stem
            other_stem = next(other.path.glob("eval/*.json")).stem
            (other.path / "crops").mkdir()
            for number in (0, 1):
                shutil.copy(
                    folder.path / "crops" / f"{stem}-{number}.png", other.path / "crops" / f"{other_stem}-{number}.png"
                )
    contents = {e.data_set: e.data_sha256 for e in find([tiny_runs])[0].evaluations()}
    found = [
        Entry(f.run, f.training, e.model_copy(update={"data_sha256": contents[e.data_set]}))
        for f in find([tmp_path / "runs"])
        for e in f.evaluations()
    ]
    galleries, left_out = galleries_of(found, {f.run.key: f for f in find([tmp_path / "runs"])})
    shown = {(g.title.partition(" σ25")[0], len(g.panels), "99 steps" in g.comparison) for g in galleries}
    assert left_out == 0
    assert shown == {
        (f"skimage-test: {name}", count, long)
        for name in ("astronaut", "chelsea")
        for count, long in ((4, False), (3, True))
    }


@needs_browser
def test_the_sort_arrow_stands_on_the_line_of_the_headings_last_word(tmp_path: Path) -> None:
    """The height of a heading of one word is that of one line."""
    script = """<script>addEventListener("load", () => {
      const buttons = [...document.querySelectorAll("#table-1 th button")].filter(b => !b.textContent.includes(" "));
      document.body.dataset.seen = [buttons.length, ...buttons.map(b => b.getClientRects().length)].join("|");
    });</script></body>"""
    tried = tmp_path / "tried.html"
    store(tmp_path / "runs", "kit", 30.0)
    tried.write_text(report(find([tmp_path / "runs"]), []).replace("</body>", script))
    [seen] = re.findall(r'data-seen="([^"]*)"', browse(tried, "--dump-dom", "--window-size=1300,900").stdout)
    count, *lines = seen.split("|")
    assert int(count) >= 3
    assert set(lines) == {"1"}


@needs_browser
def test_the_main_table_fits_a_desktop_and_keeps_the_method_in_view_on_a_phone(tmp_path: Path) -> None:
    script = """<script>addEventListener("load", () => {
      const table = document.querySelector("#table-1"), box = table.parentElement, cell = table.tBodies[0].rows[0].cells[0];
      const fits = box.scrollWidth <= box.clientWidth, before = cell.getBoundingClientRect().left;
      box.scrollLeft = 200;
      document.body.dataset.seen = [table.tBodies[0].rows[0].cells.length, fits, box.scrollLeft,
        cell.getBoundingClientRect().left - before].join("|");
    });</script></body>"""
    runs = [run for run in load([curves_and_searches(tmp_path)])[0] if run.run.seed != 99]
    tried = tmp_path / "tried.html"
    tried.write_text(report(runs, []).replace("</body>", script))
    for size, expected in (("1300,900", "15|true|0|0"), ("400,800", "15|false|200|0")):
        [seen] = re.findall(r'data-seen="([^"]*)"', browse(tried, "--dump-dom", f"--window-size={size}").stdout)
        assert seen == expected
