"""`kitbench pools`: stored weights scored in tiles of several sizes; every size is a protocol of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from pydantic import ValidationError

from kitbench.apply.pools import PoolScoring
from kitbench.apply.trained import load_trained
from kitbench.cli.main import cli
from kitbench.data.cards import card
from kitbench.data.photograph import Photograph, read_set
from kitbench.errors import InputError, Interrupted
from kitbench.scoring import evaluate
from kitbench.spec import loading
from kitbench.spec.pools import WHOLE, pool_family, pool_protocol
from kitbench.spec.suite import Protocol
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Score
from kitbench.system.interrupt import Stop
from kitbench.verdict.pools import pool_sheets
from tests.stored import store

SHIPPED = {protocol.id: protocol for protocol in loading.protocols()}
SIZES = (64, 128, 256, 512, WHOLE)
"""Those of `pools` by default."""


# Protocols


@pytest.mark.parametrize("of", ["awgn8", "awgn8-tile", "awgn8-tile64", "awgn8-tile512"])
def test_a_family_of_shipped_protocols_is_reached_from_each_member(of: str) -> None:
    names = {size: pool_protocol(SHIPPED[of], size).stamp for size in SIZES}
    assert names == {WHOLE: "awgn8.v1"} | {size: f"awgn8-tile{size}.v1" for size in SIZES if size}


def test_members_differ_in_their_tiles_alone() -> None:
    tiles = {"tile", "overlap", "placement"}
    for base in SHIPPED.values():
        for size in SIZES:
            member = pool_protocol(base, size)
            names = {"id", "version", "summary"} | tiles
            assert member.model_dump(exclude=names) == base.model_dump(exclude=names)
            assert (member.tile, member.overlap, member.placement) == (
                (size, min(32, size // 4), "even") if size else (0, 0, "edge")
            )
            assert pool_family(member) == pool_protocol(base, WHOLE).stamp


def test_a_protocol_with_tiles_of_another_kind_is_in_no_family() -> None:
    assert pool_family(SHIPPED["awgn8-tile"]) is None  # its last tile may lie a pixel from the one before
    assert pool_family(SHIPPED["awgn8"]) == "awgn8.v1"
    changed = SHIPPED["awgn8-tile64"].model_copy(update={"lpips": "none"})
    assert pool_family(changed) not in (None, "awgn8.v1")
    with pytest.raises(ValidationError, match="tile must be at least 32"):
        pool_protocol(SHIPPED["awgn8"], 16)


def test_a_protocol_of_the_users_own_is_the_member_of_its_family_that_it_describes() -> None:
    """Else a run would be scored again by the same protocol of another version."""
    mine = SHIPPED["awgn8"].model_copy(update={"id": "mine", "version": 2, "border": 4})
    assert pool_protocol(mine, WHOLE).stamp == mine.stamp == pool_family(mine)
    assert pool_family(pool_protocol(mine, 64)) == mine.stamp
    assert pool_protocol(mine, 64).version == 2


def test_stamps_of_older_protocols_did_not_change_with_the_new_key() -> None:
    old = SHIPPED["awgn8"].model_copy(update={"border": 4})
    assert old.stamp == "awgn8.v1+972716"
    assert old.model_copy(update={"placement": "even"}).stamp != old.stamp


# Scoring


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["pools", *map(str, arguments)])


@pytest.fixture
def runs(tiny_runs: Path, tmp_path: Path) -> Path:
    """A copy of kit, seed 0, and of the input, which may be changed."""
    for folder in find([tiny_runs]):
        if folder.run.method == "input" or (folder.run.method == "kit" and folder.run.seed == 0):
            shutil.copytree(folder.path, tmp_path / "runs" / folder.path.name)
    return tmp_path / "runs"


def kit_of(runs: Path) -> RunFolder:
    [folder] = [folder for folder in find([runs]) if folder.run.method == "kit"]
    return folder


def test_a_stored_run_is_scored_in_tiles_from_its_weights(runs: Path) -> None:
    folder = kit_of(runs)
    [whole] = folder.evaluations()
    done = run(runs, "--tile", "64,whole")
    assert done.exit_code == 0, done.output
    assert "1 evaluation\n" in done.output  # whole images were scored before, under the same protocol
    [tiled] = [e for e in folder.evaluations() if e.stamp != whole.stamp]
    assert (tiled.protocol.tile, tiled.protocol.overlap, tiled.protocol.placement) == (64, 16, "even")
    assert (tiled.data_sha256, tiled.sigma, tiled.key) == (whole.data_sha256, whole.sigma, whole.key)
    # Restored here by the same tiles, written out.
    model, record = load_trained(folder, None, torch.device("cpu"))
    photo = read_set(card("skimage-test"), None, "colour")[1]
    noisy = evaluate.degraded(photo, "skimage-test", record.task, 25, tiled.protocol)
    restored = by_loop(model, noisy, 64, 16)
    score = evaluate.score(restored, photo, tiled.protocol, None, 0.0)
    [stored] = [score for score in tiled.scores if score.image == photo.name]
    assert stored.psnr == pytest.approx(score.psnr, abs=1e-4)
    assert stored.psnr != next(s.psnr for s in whole.scores if s.image == photo.name)
    rows = [line.split("|")[1].strip() for line in done.output.splitlines() if line.startswith("| ")]
    assert rows == ["Method", "kit"]
    again = run(runs, "--tile", "64,whole")
    assert "evaluations" not in again.output
    assert run(runs, "--stored").output == again.output


def by_loop(model: torch.nn.Module, image: np.ndarray, tile: int, overlap: int) -> np.ndarray:
    """Each tile's weight is a product of ramps that rise by equal steps over `overlap` pixels from a border inside."""
    height, width = image.shape[:2]
    total, weight = np.zeros(image.shape), np.zeros((height, width, 1))

    def places(size: int) -> list[int]:
        steps = int(np.ceil((size - tile) / (tile - overlap)))
        return [int(np.floor(n * (size - tile) / steps)) for n in range(steps + 1)]

    def ramp(start: int, size: int) -> np.ndarray:
        at = np.arange(tile)
        left = np.where(start > 0, np.minimum(1, (at + 1) / (overlap + 1)), 1)
        right = np.where(start + tile < size, np.minimum(1, (tile - at) / (overlap + 1)), 1)
        return np.minimum(left, right)

    for top in places(height):
        for left in places(width):
            part = image[top : top + tile, left : left + tile]
            x = torch.from_numpy(np.ascontiguousarray(part.transpose(2, 0, 1)))[None]
            with torch.inference_mode():
                y = model(x)[0].permute(1, 2, 0).double().numpy()
            share = (ramp(top, height)[:, None] * ramp(left, width)[None, :])[..., None]
            total[top : top + tile, left : left + tile] += y * share
            weight[top : top + tile, left : left + tile] += share
    return total / weight


@pytest.mark.parametrize("tiles", ["", "64,abc", "16", "64;128", "-64"])
def test_a_size_that_is_none_is_refused(tiles: str, runs: Path) -> None:
    done = run(runs, "--tile", tiles)
    assert done.exit_code == 2
    assert "--tile takes sides in pixels, at least 32, or whole, like 64,128,whole" in done.output


def test_one_size_is_nothing_to_compare_and_refused_before_anything_is_scored(runs: Path) -> None:
    done = run(runs, "--tile", "96")
    assert done.exit_code == 2
    assert "--tile takes two sides or more, which are compared, like 64,whole; found '96'." in done.output
    assert len(kit_of(runs).evaluations()) == 1


def test_what_cannot_be_scored_is_refused_before_anything_is_written(runs: Path) -> None:
    folder = kit_of(runs)
    other = run(runs, "--test-set", "CBSD68")
    assert other.exit_code == 2
    assert "was scored on none of CBSD68" in other.output
    [evaluation] = folder.evaluations()
    path = folder.evaluation_path(evaluation.data_set, evaluation.sigma, evaluation.stamp)
    folder.write(str(path.relative_to(folder.path)), evaluation.model_copy(update={"data_sha256": "00"}))
    changed = run(runs, "--tile", "64,128")
    assert changed.exit_code == 2
    assert "are not those that run" in changed.output
    folder.write(str(path.relative_to(folder.path)), evaluation)
    folder.weights.unlink()
    gone = run(runs, "--tile", "64,128")
    assert gone.exit_code == 2
    assert "is stored without its weights" in gone.output
    assert len(folder.evaluations()) == 1


def test_no_run_is_scored_where_one_of_them_cannot_be(runs: Path, tiny_runs: Path) -> None:
    conv = next(folder for folder in find([tiny_runs]) if folder.run.method == "conv")
    shutil.copytree(conv.path, runs / conv.path.name)
    *_, last = [folder for folder in find([runs]) if folder.trained]
    last.weights.unlink()
    done = run(runs, "--tile", "64,128")
    assert done.exit_code == 2
    assert f"{last.path.name} is stored without its weights" in done.output
    assert {len(folder.evaluations()) for folder in find([runs])} == {1}


def test_a_stop_keeps_the_evaluations_that_are_complete(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, stop = kit_of(runs), Stop()
    scoring = PoolScoring((64, 128), (), None, torch.device("cpu"))
    images = len(scoring.photographs("skimage-test", "colour"))

    def scores(restore: object, photos: list[Photograph], conditions: object) -> list[Score]:
        return [Score(image=photo.name, psnr=30.0, ssim=0.5, lpips=None, seconds=0.0) for photo in photos]

    def advance(done: int, total: int) -> None:
        assert (done <= total, total) == (True, 2 * images)
        stop.asked = done == images

    monkeypatch.setattr(evaluate, "scores", scores)
    with pytest.raises(Interrupted, match="complete evaluations are kept"):
        scoring.score(folder, stop, advance)
    assert len(folder.evaluations()) == 2  # of whole images, as before, and of the first size
    assert scoring.score(folder, Stop(), lambda done, total: None) == 1
    assert len(folder.evaluations()) == 3


# Tables


def stored_at(out: Path, method: str, seed: int, by_size: dict[int, list[float]]) -> None:
    for size, psnr in by_size.items():
        store(out, method, psnr, seed, protocol=pool_protocol(SHIPPED["awgn8"], size).id)


def test_a_table_ranks_within_a_size_and_names_the_best_one(tmp_path: Path) -> None:
    for seed, effect in ((0, -0.1), (1, 0.1)):
        base = np.array([28, 29, 30]) + effect
        stored_at(
            tmp_path,
            "kit",
            seed,
            {64: list(base), 256: list(base + np.array([0.2, 0.3, 0.4])), WHOLE: list(base + 0.3)},
        )
        stored_at(tmp_path, "global", seed, {64: list(base + 0.1), 256: list(base), WHOLE: list(base - 0.2)})
    store(tmp_path, "kit", [27.0, 28.0, 29.0], 0, protocol="awgn8-tile")  # of no family: in no column
    [sheet] = pool_sheets(find([tmp_path]))
    assert "mean ± standard error over images" in sheet.notes[0]
    assert sheet.header == ("Method", "64 px", "256 px", "whole", "Widest - narrowest", "At its best size", "Seeds")
    assert sheet.lines == (
        ("global", "**29.10**", "29.00", "28.80", "-0.300 ± 0.000", "29.10 (64 px)", "0,1"),
        ("kit", "29.00", "**29.30**", "**29.30**", "+0.300 ± 0.000", "29.30 (256 px)", "0,1"),
    )
    assert "Set_A σ25, awgn8.v1" in sheet.caption
    assert pool_sheets(find([tmp_path]), ["Set_A"]) == [sheet]
    [sheet] = pool_sheets(find([tmp_path]), sizes=[64, WHOLE])
    assert sheet.header == ("Method", "64 px", "whole", "Widest - narrowest", "At its best size", "Seeds")
    with pytest.raises(InputError, match="two of these sizes"):
        pool_sheets(find([tmp_path]), sizes=[64, 128])


def test_the_error_is_that_of_the_mean_over_images(tmp_path: Path) -> None:
    stored_at(tmp_path, "kit", 0, {64: [28.0, 29.0, 30.0], WHOLE: [28.2, 29.4, 30.3]})
    [sheet] = pool_sheets(find([tmp_path]))
    assert sheet.lines[0][3] == f"+0.300 ± {0.1 / 3**0.5:.3f}"


def test_images_of_one_scene_count_as_one_in_the_error(tmp_path: Path) -> None:
    names = ("im1_kernel1", "im1_kernel2", "im2_kernel1", "im2_kernel2")
    names = (*names, "im2_kernel3")
    for size, psnr in ((64, [28.0] * 5), (WHOLE, [28.1, 28.3, 28.5, 28.7, 28.6])):
        member = pool_protocol(SHIPPED["awgn8"], size)
        folder = store(tmp_path, "kit", psnr, data_set="Levin09", protocol=member.id)
        path = folder.evaluation_path("Levin09", 25, member.stamp)
        evaluation = next(e for e in folder.evaluations() if e.stamp == member.stamp)
        named = [score.model_copy(update={"image": n}) for n, score in zip(names, evaluation.scores, strict=True)]
        folder.write(str(path.relative_to(folder.path)), evaluation.model_copy(update={"scores": tuple(named)}))
    [sheet] = pool_sheets(find([tmp_path]))
    assert sheet.lines[0][3] == "+0.400 ± 0.200"  # of .2 and .6 dB, though the second scene has three images


def test_methods_of_other_seeds_are_not_ranked(tmp_path: Path) -> None:
    stored_at(tmp_path, "kit", 0, {64: [28.0, 29.0], WHOLE: [28.2, 29.4]})
    stored_at(tmp_path, "conv", 1, {64: [28.0, 29.0], WHOLE: [28.2, 29.4]})
    [sheet] = pool_sheets(find([tmp_path]))
    assert "**" not in "".join(map("".join, sheet.lines))
    assert "different seeds" in sheet.notes[0]


def test_a_method_that_is_alone_at_a_size_is_not_the_best_there(tmp_path: Path) -> None:
    stored_at(tmp_path, "kit", 0, {64: [28.0, 29.0], 128: [28.2, 29.2], WHOLE: [28.4, 29.4]})
    stored_at(tmp_path, "conv", 0, {64: [27.0, 28.0], WHOLE: [27.2, 28.4]})
    [sheet] = pool_sheets(find([tmp_path]))
    assert [line[1:4] for line in sheet.lines] == [("27.50", "n/a", "27.80"), ("**28.50**", "28.70", "**28.90**")]


def test_one_size_is_no_table(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0)
    done = run(tmp_path, "--stored")
    assert done.exit_code == 2
    assert "None of these trained runs was scored at two sizes of tiles" in done.output


def test_tables_of_one_protocol_never_show_another(tmp_path: Path) -> None:
    stored_at(tmp_path, "kit", 0, {64: [28.0, 29.0], WHOLE: [28.2, 29.4]})
    refused = CliRunner().invoke(cli, ["table", str(tmp_path)])
    assert refused.exit_code == 2
    assert "Rows of different protocols cannot be in one table" in refused.output
    assert isinstance(pool_protocol(SHIPPED["awgn8"], 64), Protocol)
