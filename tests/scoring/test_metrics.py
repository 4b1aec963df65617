"""PSNR and SSIM against scikit-image, luma against MATLAB's values."""

from __future__ import annotations

import math
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kitbench.errors import InputError
from kitbench.scoring.metrics import best_shift, luma, psnr, ssim, ssim_volume


def pair(shape: tuple[int, ...], seed: int = 0, sigma: float = 25.0, dtype: type = np.uint8):
    rng = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 256
    clean = smooth[..., None] + rng.normal(0, 20, (*shape[:2], math.prod(shape[2:])))
    noisy = clean + rng.normal(0, sigma, clean.shape)
    cast = [np.clip(x, 0, 255).reshape(shape) for x in (clean, noisy)]
    return [np.round(x).astype(dtype) if dtype == np.uint8 else x.astype(dtype) for x in cast]


def skimage_ssim(a, b):
    return structural_similarity(
        a,
        b,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=-1 if a.ndim == 3 else None,
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
@pytest.mark.parametrize(
    "shape", [(11, 11), (11, 300), (75, 64), (74, 33, 3), (200, 131, 3), (139, 40, 1), (40, 50, 4)]
)
def test_psnr_and_ssim_equal_scikit_image(shape, dtype):
    a, b = pair(shape, dtype=dtype)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    assert ssim(a, b) == pytest.approx(skimage_ssim(a, b), abs=1e-9)


def test_float32_images_are_measured_in_float64():
    a, b = pair((64, 65, 3), dtype=np.float32)
    assert psnr(a, b) == pytest.approx(psnr(a.astype(np.float64), b.astype(np.float64)), abs=1e-12)
    assert ssim(a, b) == pytest.approx(ssim(a.astype(np.float64), b.astype(np.float64)), abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(11, 90), st.integers(11, 90), st.sampled_from([1, 3]), st.integers(0, 99), st.floats(0, 80))
def test_ssim_equals_scikit_image_at_any_size(height, width, channels, seed, sigma):
    a, b = pair((height, width, channels), seed, sigma)
    assert ssim(a, b) == pytest.approx(skimage_ssim(a, b), abs=1e-9)


def test_ssim_does_not_depend_on_the_number_of_threads():
    a, b = pair((301, 200, 3))
    assert ssim(a, b, threads=1) == ssim(a, b, threads=2) == ssim(a, b, threads=4)


def test_views_and_reversed_channels_are_read_right():
    a, b = pair((80, 90, 3))
    assert ssim(a[::2, :, ::-1], b[::2, :, ::-1]) == pytest.approx(ssim(a[::2].copy(), b[::2].copy()), abs=1e-12)
    assert psnr(a[::2, :, ::-1], b[::2, :, ::-1]) == psnr(a[::2].copy(), b[::2].copy())


def volume_ssim(a, b):
    """MATLAB's ssim, written out: scipy's Gaussian of radius 5 along all axes, nearest = replicated borders."""
    a, b = a.astype(np.float64), b.astype(np.float64)

    def blur(x):
        return gaussian_filter(x, 1.5, mode="nearest", truncate=3.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = blur(a), blur(b)
    va, vb, covariance = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return np.mean((2 * ma * mb + c1) * (2 * covariance + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2)))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(64, 50, 3), (301, 40, 3), (33, 45), (20, 21, 1), (9, 4, 3), (30, 31, 7)])
def test_ssim_of_a_volume_is_three_gaussians_with_replicated_borders(shape, dtype):
    a, b = pair(shape, dtype=dtype)
    assert ssim_volume(a, b) == pytest.approx(volume_ssim(a, b), abs=1e-9)


def test_ssim_of_a_volume_is_far_from_ssim_by_channel():
    """The window spans the channels: colour itself is contrast, beside which noise matters less."""
    scene = data.astronaut()[:128, :128]
    noise = np.random.default_rng(0).normal(0, 25, scene.shape)
    noisy = np.clip(np.round(scene + noise), 0, 255).astype(np.uint8)
    assert ssim_volume(scene, noisy) > ssim(scene, noisy) + 0.05
    a, _ = pair((64, 65, 3))
    assert ssim_volume(a, a) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("offset", [(0, 0), (5, -5), (-3, 2), (1, 4)])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_best_shift_finds_the_shift_that_was_made(offset, channels):
    scene, _ = pair((80, 90, *channels))
    _, noise = pair((80, 90, *channels), seed=3)
    y, x = offset
    target, prediction = scene[10:70, 10:80], scene[10 - y : 70 - y, 10 - x : 80 - x]
    found, inner = best_shift(prediction, target, 5)
    assert np.array_equal(inner, target[5:-5, 5:-5])
    assert np.array_equal(found, inner)
    # With noise on it the same place wins: it is the best of all places, tried one by one.
    noisy = np.clip(prediction + 0.2 * noise[:60, :70], 0, 255).astype(np.uint8)
    found, inner = best_shift(noisy, target, 5)
    places = [noisy[i : i + 50, j : j + 60] for i in range(11) for j in range(11)]
    assert psnr(found, inner) == max(psnr(np.ascontiguousarray(place), inner) for place in places)
    assert np.shares_memory(found[:1, :1], noisy[5 + y : 6 + y, 5 + x : 6 + x])


def test_of_equal_shifts_the_least_is_taken_and_no_shift_is_the_whole_image():
    flat = np.full((20, 20), 7, np.uint8)
    found, inner = best_shift(flat, flat, 3)
    assert found.shape == inner.shape == (14, 14)
    assert np.shares_memory(found[:1, :1], flat[3:4, 3:4])
    a, b = pair((30, 31))
    assert all(np.array_equal(x, y) for x, y in zip(best_shift(a, b, 0), (a, b), strict=True))
    with pytest.raises(InputError, match="larger than 20 px a side, found 20 x 20"):
        best_shift(flat, flat, 10)


def test_equal_images_have_infinite_psnr_and_ssim_one():
    a, _ = pair((32, 32, 3))
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)


def test_psnr_of_a_known_error():
    a = np.zeros((16, 16), np.uint8)
    assert psnr(a, a + np.uint8(1)) == pytest.approx(48.130803608679, abs=1e-9)
    assert psnr(a / 255.0, (a + np.uint8(1)) / 255.0, data_range=1.0) == pytest.approx(48.130803608679, abs=1e-9)


def test_psnr_of_a_large_image_does_not_overflow():
    a = np.zeros((3000, 3000), np.uint8)
    assert psnr(a, a + np.uint8(255)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("rgb", "y"),
    [  # MATLAB: rgb2ycbcr(uint8([r g b]))
        ((0, 0, 0), 16),
        ((255, 255, 255), 235),
        ((255, 0, 0), 81),
        ((0, 255, 0), 145),
        ((0, 0, 255), 41),
        ((128, 128, 128), 126),
        ((255, 255, 0), 210),
        ((0, 255, 255), 170),
        ((255, 0, 255), 106),
        ((1, 2, 3), 18),
        ((200, 100, 50), 123),
    ],
)
def test_luma_of_uint8_is_matlabs(rgb, y):
    image = np.array(rgb, np.uint8).reshape(1, 1, 3)
    assert luma(image).dtype == np.uint8
    assert luma(image).item() == y
    assert luma(image.astype(np.float64)).item() == pytest.approx(y, abs=0.5)


def test_luma_of_floats_is_not_rounded():
    assert luma(np.full((2, 2, 3), 127.5)) == pytest.approx(np.full((2, 2), 125.5), abs=1e-9)


def test_ssim_works_in_a_forked_worker():
    a, b = pair((301, 200, 3))
    expected = ssim(a, b, threads=2)
    with multiprocessing.get_context("fork").Pool(1) as workers:
        assert workers.apply_async(ssim, (a, b), {"threads": 2}).get(timeout=60) == expected


def test_what_cannot_be_compared_is_refused():
    a, b = pair((32, 32, 3))
    with pytest.raises(InputError, match=r"\[32, 32, 3\] of uint8 and \[31, 32, 3\] of uint8"):
        psnr(a, b[:31])
    with pytest.raises(InputError, match=r"uint8 and .* float64"):
        ssim(a, b.astype(np.float64))
    with pytest.raises(InputError, match="uint16"):
        psnr(a.astype(np.uint16), b.astype(np.uint16))
    with pytest.raises(InputError, match="at least 11 x 11 pixels, found 10 x 32"):
        ssim(a[:10], b[:10])
    with pytest.raises(InputError, match="not empty"):
        psnr(a[:0], b[:0])
    with pytest.raises(InputError, match=r"\[H, W, 3\]"):
        luma(a[..., 0])
