"""`score`: two folders of pictures, a protocol, a table; and `eval --run`: a stored run scored on another set."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageOps
from skimage import data as photographs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kitbench.apply.score_folders import partners, scores_of, scores_table
from kitbench.cli.main import cli
from kitbench.scoring import lpips, metrics
from kitbench.scoring.lpips import LPIPS
from kitbench.spec.loading import read_protocol
from kitbench.store.folder import RunFolder, find
from tests.conftest import TINY


def invoke(folder: Path, *arguments: str, code: int = 0) -> Result:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(cli, arguments)
    torch.use_deterministic_algorithms(False)
    assert done.exit_code == code, done.output
    return done


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three clean crops, and the same ones with noise under the names that `restore` gives."""
    for number, name in enumerate(("astronaut", "chelsea", "rocket")):
        clean = getattr(photographs, name)()[40:104, 40:120]
        noise = np.random.default_rng(number).normal(0, 12, clean.shape)
        save(tmp_path / "clean" / f"{name}.png", clean)
        save(tmp_path / "restored" / f"{name}-restored.png", np.clip(clean + noise, 0, 255).astype(np.uint8))
    return tmp_path


def test_the_table_has_the_values_of_scikit_image_for_every_picture_and_their_mean(folders: Path) -> None:
    done = invoke(folders, "score", "restored", "clean", "--protocol", "awgn8", "--format", "csv", "--out", "s.csv")
    assert "wrote s.csv" in done.stdout
    *lines, mean = csv.DictReader(io.StringIO((folders / "s.csv").read_text()))
    assert [line["picture"] for line in lines] == ["astronaut", "chelsea", "rocket"]
    for line in lines:
        a, b = (
            np.asarray(Image.open(folders / folder / f"{line['picture']}{end}.png"))
            for folder, end in (("restored", "-restored"), ("clean", ""))
        )
        assert float(line["PSNR dB"]) == pytest.approx(peak_signal_noise_ratio(b, a), abs=1e-9)
        expected = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1
        )
        assert float(line["SSIM"]) == pytest.approx(expected, abs=1e-9)
    for column in ("PSNR dB", "SSIM"):
        assert float(mean[column]) == pytest.approx(np.mean([float(line[column]) for line in lines]), abs=1e-12)
    terminal = invoke(folders, "score", "restored", "clean", "--protocol", "awgn8").stdout.splitlines()
    assert re.fullmatch(rf"mean +{float(mean['PSNR dB']):.2f} +{float(mean['SSIM']):.4f}", terminal[-1])


def test_the_protocol_decides_what_is_compared(folders: Path) -> None:
    pairs = partners(folders / "restored", folders / "clean")
    rain = read_protocol("rain-y8-ssim2d")
    assert rain.space == "y"
    found = list(scores_of(pairs, rain, None, lambda done, name: None))
    for pair, score in zip(pairs, found, strict=True):
        a, b = (metrics.luma(np.asarray(Image.open(path))) for path in (pair.restored, pair.clean))
        assert score.psnr == pytest.approx(peak_signal_noise_ratio(b, a), abs=1e-9)


@pytest.mark.parametrize("rounding", ["8bit", "8bit-truncated", "none"])
def test_equal_pictures_are_infinitely_good_under_every_rounding(folders: Path, rounding: str) -> None:
    save(folders / "all" / "a.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
    protocol = read_protocol("awgn8").model_copy(update={"rounding": rounding})
    told: list[tuple[int, str]] = []
    scores = list(scores_of(partners(folders / "all", folders / "all"), protocol, None, lambda *of: told.append(of)))
    assert told == [(1, "a")]
    assert scores[0].psnr is None
    assert scores[0].ssim == 1.0
    assert "inf" in scores_table(scores, "markdown")


def test_lpips_is_a_column_where_its_weights_are_given(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance:
        """Stands in for the network, whose weights are not here: the mean difference."""

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean()

    protocol = read_protocol("awgn8")
    assert protocol.lpips != "none"
    pairs = partners(folders / "restored", folders / "clean")
    found = list(scores_of(pairs, protocol, Distance(), lambda done, name: None))  # type: ignore[arg-type]
    assert scores_table(found, "csv").splitlines()[0] == "picture,PSNR dB,SSIM,LPIPS"
    a, b = (np.asarray(Image.open(path), float) / 255 for path in (pairs[0].restored, pairs[0].clean))
    assert found[0].lpips == pytest.approx(np.abs(a - b).mean(), abs=1e-6)
    assert LPIPS is lpips.LPIPS
    monkeypatch.setenv("KITBENCH_LPIPS_WEIGHTS", str(folders / "none.pth"))
    refused = invoke(folders, "score", "restored", "clean", "--protocol", "awgn8", code=2)
    assert "none.pth" in refused.stderr
    monkeypatch.setenv("KITBENCH_LPIPS_WEIGHTS", str(folders))
    done = invoke(folders, "score", "restored", "clean", "--protocol", "awgn8")
    assert "without LPIPS: " in done.stderr.replace("\n", " ")
    assert "LPIPS" not in done.stdout


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_pictures_are_compared_as_a_viewer_shows_them(tmp_path: Path, suffix: str, orientation: int) -> None:
    """A clean picture with an EXIF orientation, and what `restore` writes: upright and without one."""
    scene, exif = photographs.astronaut()[:48, :64], Image.Exif()
    exif[0x0112] = orientation
    for folder in ("clean", "restored"):
        (tmp_path / folder).mkdir()
    Image.fromarray(scene).save(tmp_path / "clean" / f"a.{suffix}", exif=exif, quality=100)
    with Image.open(tmp_path / "clean" / f"a.{suffix}") as stored:
        ImageOps.exif_transpose(stored).save(tmp_path / "restored" / "a.png")
    [found] = scores_of(
        partners(tmp_path / "restored", tmp_path / "clean"), read_protocol("awgn8"), None, lambda done, name: None
    )
    assert found.psnr is None  # no difference


def test_what_cannot_be_scored_is_refused_in_one_sentence(folders: Path) -> None:
    clean, restored = folders / "clean", folders / "restored"
    for number in range(5):
        save(folders / "more" / f"{number}.png", np.zeros((20, 20, 3), np.uint8))
    shutil.copytree(restored, folders / "lacks")
    (folders / "lacks" / "rocket-restored.png").rename(folders / "lacks" / "else.png")
    shutil.copytree(restored, folders / "twice")
    save(folders / "twice" / "rocket.png", np.zeros((64, 80, 3), np.uint8))
    shutil.copytree(restored, folders / "size")
    save(folders / "size" / "rocket-restored.png", np.zeros((64, 79, 3), np.uint8))
    shutil.copytree(restored, folders / "gray")
    save(folders / "gray" / "rocket-restored.png", np.zeros((64, 80), np.uint8))
    shutil.copytree(restored, folders / "broken")
    (folders / "broken" / "rocket-restored.png").write_bytes(b"no picture")
    save(folders / "tiny" / "a.png", np.zeros((5, 5, 3), np.uint8))
    save(folders / "alpha" / "a.png", np.zeros((20, 20, 4), np.uint8))
    (folders / "deep").mkdir()
    cv2.imwrite(str(folders / "deep" / "a.png"), np.zeros((20, 20, 3), np.uint16))
    (folders / "empty").mkdir()
    for arguments, sentence in (
        (("none", "clean"), "none is not a folder"),
        (("empty", "clean"), "Folder empty has no pictures"),
        (
            ("more", "clean"),
            "0, 1, 2 and 2 more of more have no partner in clean; astronaut, chelsea, rocket of clean have no partner in",
        ),
        (
            ("lacks", "clean"),
            "else of lacks has no partner in clean; rocket of clean has no partner in lacks; give two",
        ),
        (("twice", "clean"), "twice has two pictures for one of clean"),
        (("size", "clean"), "rocket-restored.png is 79 x 64 px, RGB and clean/rocket.png is 80 x 64 px, RGB; the two"),
        (("gray", "clean"), "is 80 x 64 px, gray and"),
        (("broken", "clean"), "rocket-restored.png is not a readable image"),
        (("alpha", "alpha"), "alpha/a.png has pixel format RGBA, expected 8-bit RGB or gray; convert the file"),
        (("deep", "deep"), "deep/a.png has 16 bits a channel, expected 8-bit RGB or gray; convert the file"),
        (("tiny", "tiny"), "a: SSIM needs images of at least 11 x 11 pixels"),
        (("restored", "clean", "--protocol", "awgn"), "Unknown protocol 'awgn'; did you mean 'awgn8'?"),
    ):
        words = arguments if "--protocol" in arguments else (*arguments, "--protocol", "awgn8-tile")
        done = invoke(folders, "score", *words, code=2)
        last = done.stderr.splitlines()[-1]
        assert sentence in last, last
    assert clean.is_dir()


# A stored run on another set


@pytest.fixture
def results(tiny_runs: Path, tmp_path: Path) -> Path:
    """Runs of conv and the input in `results`, and a folder of two held-out pictures."""
    for method in ("conv-s0", "input"):
        found = next(tiny_runs.glob(f"*-{method}-*"))
        shutil.copytree(found, tmp_path / "results" / found.name)
    for name in ("chelsea", "astronaut"):
        save(tmp_path / "held" / f"{name}.png", getattr(photographs, name)()[50:114, 100:164])
    return tmp_path


def run_of(folder: Path, method: str) -> RunFolder:
    return RunFolder(next((folder / "results").glob(f"*-{method}-*")))


def test_scoring_a_set_again_gives_the_bits_that_the_run_itself_stored(results: Path) -> None:
    for method in ("conv", "input"):
        run = run_of(results, method)
        [before] = run.evaluations()
        (run.path / "eval" / next((run.path / "eval").iterdir()).name).unlink()
        invoke(
            results,
            "eval",
            "--run",
            str(run.path),
            "--test-set",
            "skimage-test",
            "--protocol",
            str(own(results, before)),
        )
        [after] = run.evaluations()
        assert [(s.image, s.psnr, s.ssim) for s in after.scores] == [(s.image, s.psnr, s.ssim) for s in before.scores]
        assert (after.data_sha256, after.stamp, after.sigma) == (before.data_sha256, before.stamp, before.sigma)


def own(folder: Path, evaluation) -> Path:
    """The protocol of an evaluation as a file."""
    lines = [f"{key} = {value!r}" for key, value in evaluation.protocol.model_dump().items()]
    (folder / "own.toml").write_text("\n".join(lines))
    return folder / "own.toml"


def test_a_run_named_by_its_hash_is_scored_on_a_folder_of_pictures(results: Path) -> None:
    run = run_of(results, "conv")
    short = run.path.name.rpartition("-")[2][:5]
    record = (run.path / "run.json").read_bytes()
    done = invoke(results, "eval", "--run", short, "--test-set", "held/", "--test-set", "skimage-test")
    assert "./held" in done.output
    assert {e.data_set: len(e.scores) for e in run.evaluations()} == {"./held": 2, "skimage-test": 2}
    assert (run.path / "run.json").read_bytes() == record
    files = {path: path.stat().st_mtime_ns for path in (run.path / "eval").iterdir()}
    invoke(results, "eval", "--run", short, "--test-set", "./held")  # stored already
    assert {path: path.stat().st_mtime_ns for path in (run.path / "eval").iterdir()} == files
    assert "./held" in invoke(results, "table", "results").output


def test_what_a_run_cannot_be_scored_on_is_refused_in_one_sentence(results: Path) -> None:
    run = run_of(results, "conv").path
    trained_on = photographs.coffee()
    save(results / "seen" / "a.png", trained_on[:200, :200])
    shutil.copytree(run, results / "renamed")
    shutil.copytree(run, results / "unscored")
    shutil.rmtree(results / "unscored" / "eval")
    for arguments, sentence in (
        ((str(run),), "--run needs --test-set"),
        ((str(run), "--test-set", "Kodak24"), "Test set Kodak24 is not in any data folder: give one with --data"),
        ((str(run), "--test-set", "held"), "named by a path with a slash: ./held"),
        ((str(run), "--test-set", "./seen"), "Training and test images overlap: skimage-train/"),
        ((str(run), "--test-set", "./held", "--suite", "denoise"), "--suite does not go with --run"),
        (("none", "--test-set", "./held"), "none is not a folder"),
        ((str(run), "--test-set", "./held", "--out", "there"), "--out does not go with --run"),
        (("renamed", "--test-set", "./held"), "renamed was renamed; name it denoise-colour-conv-s0-"),
        (("unscored", "--test-set", "./held"), "unscored has no scores; choose with --protocol"),
    ):
        done = invoke(results, "eval", "--run", *arguments, code=2)
        last = done.stderr.splitlines()[-1]
        assert sentence in last, last
    assert "eval needs --method and --suite" in invoke(results, "eval", code=2).stderr


def test_given_weights_and_references_are_scored_on_a_folder_too(results: Path) -> None:
    asked = ("--suite", "denoise", "--preset", "smoke", "--test-set", "./held", "--protocol", "awgn8-seed0")
    invoke(results, "eval", "--method", "input", *asked, "--out", "new")
    [run] = find([results / "new"])
    assert [(e.data_set, e.stamp) for e in run.evaluations()] == [("./held", "awgn8-seed0.v1")]


def test_the_file_of_a_protocol_lies_where_one_is_wherever_the_suite_lies(results: Path) -> None:
    [before] = run_of(results, "input").evaluations()
    (results / "suites").mkdir()
    (results / "suites" / "tiny.toml").write_text(TINY)
    assert own(results, before).parent == results
    asked = ("--method", "input", "--suite", "suites/tiny.toml", "--protocol", "own.toml", "--test-set", "./held")
    assert before.stamp in invoke(results, "eval", *asked, "--out", "new").output


OWN = '''"""mine: a darker image."""


def restore(image, sigma):
    return 0.9 * image
'''


def test_a_run_of_ones_own_function_is_scored_on_by_that_function_alone(results: Path) -> None:
    (results / "mine.py").write_text(OWN)
    (results / "other.py").write_text(OWN.replace("0.9", "0.8"))
    asked = ("--suite", "denoise", "--preset", "smoke", "--test-set", "./held", "--protocol", "awgn8-seed0")
    invoke(results, "eval", "--method", "mine.py", *asked, "--out", "new")
    [run] = find([results / "new"])
    more = ("eval", "--run", str(run.path), "--test-set", "skimage-test")
    for words, sentence in (
        (more, "mine is not a shipped method; give its Python file with --method FILE"),
        ((*more, "--method", "other.py"), "other.py is not the version that the run was made with"),
        (("reproduce", str(run.path)), "was scored by a user's own training-free method: score them again"),
    ):
        assert sentence in invoke(results, *words, code=2).stderr
    assert [e.data_set for e in run.evaluations()] == ["./held"]
    invoke(results, *more, "--method", "mine.py")
    assert {e.data_set for e in run.evaluations()} == {"./held", "skimage-test"}
