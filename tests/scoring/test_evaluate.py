"""Evaluation: noise by the protocol, tiles without seams, scores as the field computes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn import functional as F

from kitbench.data.cards import card
from kitbench.data.photograph import Photograph, read_set
from kitbench.scoring import evaluate, tiles
from kitbench.scoring.metrics import luma
from kitbench.spec import loading

SUITE = loading.load_suite("denoise", overrides=["protocol=awgn8"])
TASK, PROTOCOL = SUITE.task, SUITE.protocol


@pytest.fixture(scope="module")
def photo() -> Photograph:
    return read_set(card("skimage-test"), None, "colour")[1]


def test_noise_is_seeded_by_data_set_image_and_sigma(photo: Photograph) -> None:
    first = evaluate.degraded(photo, "set", TASK, 25, PROTOCOL)
    assert np.array_equal(first, evaluate.degraded(photo, "set", TASK, 25.0, PROTOCOL))
    other = Photograph("other", photo.pixels, photo.sha256)
    for changed in (
        evaluate.degraded(photo, "other", TASK, 25, PROTOCOL),
        evaluate.degraded(other, "set", TASK, 25, PROTOCOL),
    ):
        assert not np.array_equal(first, changed)
    clean = photo.pixels / 255
    assert (first - clean).std() * 255 == pytest.approx(25, rel=0.01)
    assert first.min() < 0  # not clipped
    fifty = evaluate.degraded(photo, "set", TASK, 50, PROTOCOL)
    assert abs(np.corrcoef((first - clean).ravel(), (fifty - clean).ravel())[0, 1]) < 0.01


def test_the_legacy_protocol_is_numpys_seed_0_before_every_image(photo: Photograph) -> None:
    legacy = PROTOCOL.model_copy(update={"noise_seed": "numpy0"})
    np.random.seed(0)
    expected = np.float32(photo.pixels / np.float32(255)) + np.random.normal(0, 25 / 255.0, photo.pixels.shape)
    assert np.array_equal(evaluate.degraded(photo, "any", TASK, 25, legacy), expected.astype(np.float32))


def test_scores_agree_with_scikit_image(photo: Photograph) -> None:
    restored = evaluate.degraded(photo, "set", TASK, 25, PROTOCOL)
    found = evaluate.score(restored, photo, PROTOCOL, None, 0.0)
    rounded = np.rint(np.clip(restored, 0, 1) * 255).astype(np.uint8)
    expected = structural_similarity(
        photo.pixels,
        rounded,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=-1,
    )
    assert found.psnr == pytest.approx(peak_signal_noise_ratio(photo.pixels, rounded, data_range=255), abs=1e-9)
    assert found.ssim == pytest.approx(expected, abs=1e-6)
    assert found.lpips is None


def test_conventions_move_the_number_in_the_direction_that_they_are_known_for(photo: Photograph) -> None:
    restored = evaluate.degraded(photo, "set", TASK, 25, PROTOCOL)

    def psnr(**changes: object) -> float:
        found = evaluate.score(restored, photo, PROTOCOL.model_copy(update=changes), None, 0.0).psnr
        assert found is not None
        return found

    assert 4 < psnr(space="y") - psnr() < 6  # of white noise; luma averages three channels and spans 219 levels
    assert 0 < abs(psnr(rounding="none") - psnr()) < 0.01
    # With Y rounded, errors below half a level vanish and others grow: at high PSNR the two differ.
    good = photo.pixels / np.float32(255) + np.float32(1 / 255) * (np.arange(photo.pixels.shape[1])[:, None] % 2)
    prediction, target = (luma(image.astype(float)) for image in (np.clip(np.rint(good * 255), 0, 255), photo.pixels))
    unrounded = PROTOCOL.model_copy(update={"space": "y-unrounded"})
    found = evaluate.score(good.astype(np.float32), photo, unrounded, None, 0.0).psnr
    assert found == pytest.approx(peak_signal_noise_ratio(target, prediction, data_range=255), abs=1e-9)
    assert (
        found
        != evaluate.score(good.astype(np.float32), photo, PROTOCOL.model_copy(update={"space": "y"}), None, 0.0).psnr
    )
    inner = evaluate.score(
        restored[8:-8, 8:-8], Photograph("x", np.ascontiguousarray(photo.pixels[8:-8, 8:-8]), ""), PROTOCOL, None, 0.0
    )
    assert psnr(border=8) == inner.psnr


def test_truncation_takes_the_next_lower_level(photo: Photograph) -> None:
    truncated = PROTOCOL.model_copy(update={"rounding": "8bit-truncated"})
    below = Photograph("x", np.minimum(photo.pixels, 254), "")
    restored = ((below.pixels + 0.7) / 255).astype(np.float32)
    assert evaluate.score(restored, below, truncated, None, 0.0).psnr is None  # equal
    assert evaluate.score(restored, below, PROTOCOL, None, 0.0).psnr == pytest.approx(20 * np.log10(255))  # off by 1
    for levels in np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3):  # all of them survive
        exact = Photograph("x", levels, "")
        assert evaluate.score(levels / np.float32(255), exact, truncated, None, 0.0).psnr is None


def test_a_perfect_restoration_is_infinite_and_kept_as_null(photo: Photograph) -> None:
    found = evaluate.score(photo.pixels / np.float32(255), photo, PROTOCOL, None, 0.0)
    assert (found.psnr, found.ssim) == (None, pytest.approx(1.0))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 200), (130, 97), (65, 64), (20, 300)])
def test_tiles_show_no_seam_where_the_operator_is_local(height: int, width: int) -> None:
    x = torch.rand(1, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(tiles.tiled(lambda part: part, x, 64, 16), x)

    def blur(part: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(part, 3, 1, 1, count_include_pad=False)

    ends = tiles.starts(height, 64, 16), tiles.starts(width, 64, 16)
    assert ends[0][-1] + 64 >= height
    assert ends[1][-1] + 64 >= width
    # A 3x3 mean sees one pixel beyond a tile's end: it may differ there, by the ramp's smallest weights only.
    difference = (tiles.tiled(blur, x, 64, 16) - blur(x)).abs()
    assert float(difference.max()) < 0.06
    assert float(difference.mean()) < 1e-3


def test_a_tile_larger_than_the_image_is_the_whole_image() -> None:
    x = torch.rand(1, 3, 40, 50)
    seen: list[torch.Size] = []
    tiles.tiled(lambda part: seen.append(part.shape) or part, x, 64, 16)
    assert seen == [x.shape]


def test_starts_cover_every_pixel_with_the_least_number_of_tiles() -> None:
    assert tiles.starts(64, 64, 16) == [0]
    assert tiles.starts(112, 64, 16) == [0, 48]
    assert tiles.starts(113, 64, 16) == [0, 48, 49]


@pytest.mark.parametrize("tile", [64, 100])
@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_even_starts_cover_every_pixel_at_equal_distances(tile: int, overlap: int) -> None:
    for size in range(1, 500):
        found = tiles.even_starts(size, tile, overlap)
        assert found[0] == 0
        assert found[-1] + min(tile, size) == size
        steps = np.diff(found)
        assert (steps <= tile - overlap).all()
        assert np.ptp(steps) <= 1 if len(steps) else True
        fewest = next(n for n in range(1, 500) if (n == 1 and size <= tile) or n * tile - (n - 1) * overlap >= size)
        assert len(found) == fewest


def test_no_even_tile_nearly_repeats_another() -> None:
    assert tiles.starts(481, 256, 32) == [0, 224, 225]  # as awgn8-tile places them
    assert tiles.even_starts(481, 256, 32) == [0, 112, 225]


def test_even_tiles_show_no_seam() -> None:
    x = torch.rand(1, 3, 130, 97, dtype=torch.float64)
    torch.testing.assert_close(tiles.tiled(lambda part: part, x, 64, 16, even=True), x)
