"""PSNR and SSIM against scikit-image, luma against MATLAB's values."""

from __future__ import annotations

import math
import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kitbench.errors import InputError
from kitbench.metrics import luma, psnr, ssim


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
