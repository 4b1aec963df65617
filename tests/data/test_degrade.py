"""Degradation models against their own formulas, and the crops that are trained on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitbench.data import degrade
from kitbench.data.batches import Batches
from kitbench.data.photograph import Photograph
from kitbench.data.pixels import pixel_sha256
from kitbench.scoring import evaluate
from kitbench.seeds import generator
from kitbench.spec import loading

SUITES = {name: loading.load_suite(name, "smoke") for name in ("denoise", "deblur", "derain", "denoise-real")}
CLEAN = np.random.default_rng(3).random((40, 50, 3), dtype=np.float32)


def photograph(name: str = "a", degraded: bool = False, side: int = 96) -> Photograph:
    pixels = np.random.default_rng(len(name)).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    return Photograph(name, pixels, pixel_sha256(pixels), 255 - pixels if degraded else None)


@pytest.mark.parametrize("name", SUITES)
def test_a_degradation_is_a_pure_function_of_its_generator(name: str) -> None:
    task = SUITES[name].task
    first = degrade.degrade(CLEAN, task, generator("x"))
    assert first.shape == CLEAN.shape
    assert first.dtype == np.float32
    assert np.array_equal(first, degrade.degrade(CLEAN, task, generator("x")))
    assert not np.array_equal(first, degrade.degrade(CLEAN, task, generator("y")))
    assert 0.001 < np.abs(first - CLEAN).mean() < 0.3


@pytest.mark.parametrize("name", ["deblur", "derain", "denoise-real"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_from_a_camera_have_eight_bits(name: str, channels: int) -> None:
    image = degrade.degrade(CLEAN[..., :channels], SUITES[name].task, generator("x"))
    assert image.shape[2] == channels
    assert 0 <= image.min() <= image.max() <= 1
    assert np.abs(image * 255 - np.rint(image * 255)).max() < 1e-4


@given(st.floats(0.5, 40), st.integers(0, 10**6))
def test_a_motion_kernel_is_a_centred_mean_along_a_path_of_its_length(length: float, seed: int) -> None:
    kernel = degrade.motion_kernel(length, np.random.default_rng(seed)).astype(np.float64)
    radius = len(kernel) // 2
    assert kernel.shape == (2 * radius + 1, 2 * radius + 1)
    assert kernel.min() >= 0
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    offset = np.arange(-radius, radius + 1)
    assert kernel.sum(1) @ offset == pytest.approx(0, abs=1e-4)
    assert kernel.sum(0) @ offset == pytest.approx(0, abs=1e-4)
    # No point of a path of that length is farther from its mean than half of it; then a point is spread over pixels.
    y, x = np.nonzero(kernel)
    assert np.hypot(y - radius, x - radius).max() <= length / 2 + math.sqrt(2)


def test_blur_is_the_kernel_where_there_is_a_point_and_keeps_what_is_flat() -> None:
    task = SUITES["deblur"].task.model_copy(update={"sigma": (0.0, 0.0), "length": (6.0, 6.0)})
    point = np.zeros((41, 41, 1), np.float32)
    point[20, 20] = 1
    seen = degrade.degrade(point, task, generator("k"))[..., 0]
    random = generator("k")
    kernel = degrade.motion_kernel(random.uniform(6, 6), random)
    radius = len(kernel) // 2
    around = slice(20 - radius, 21 + radius)
    assert np.abs(seen[around, around] - kernel[::-1, ::-1]).max() <= 0.5 / 255 + 1e-6
    assert seen.sum() == pytest.approx(seen[around, around].sum())
    flat = np.full((30, 30, 3), 128 / 255, np.float32)
    assert np.allclose(degrade.degrade(flat, task, generator("k")), flat, atol=1e-6)


def test_rain_has_the_stated_density_strength_and_direction() -> None:
    ranges = {"density": (0.001, 0.001), "length": (20.0, 20.0), "width": (2.0, 2.0), "strength": (0.4, 0.4)}
    for angle in (-30.0, 0.0, 25.0):
        task = SUITES["derain"].task.model_copy(update=ranges | {"angle": (angle, angle)})
        rain = degrade.streaks((400, 400), task, generator("rain"))
        assert rain.min() >= 0
        expected = 0.001 * 0.4 * degrade.streak(20, 2.0, angle).sum()
        assert rain.mean() == pytest.approx(expected, rel=0.15)
        # The structure tensor: brightness changes least along the streaks.
        dy, dx = np.gradient(rain)
        turn = 0.5 * math.degrees(math.atan2(2 * (dx * dy).mean(), (dx**2).mean() - (dy**2).mean()))
        assert -turn == pytest.approx(angle, abs=5)


def test_camera_noise_has_the_variance_of_its_model() -> None:
    task = SUITES["denoise-real"].task.model_copy(update={"shot": (0.002, 0.002), "mosaic": False})
    for level in (0.3, 0.6):
        image = np.full((300, 300, 1), level, np.float32)
        light = degrade.camera_noise(image, task, generator("n")).astype(np.float64) ** degrade.GAMMA
        random = generator("n")
        random.uniform(0, 1)
        read = math.exp(2.18 * math.log(0.002) + 1.20 + 0.26 * random.standard_normal())
        expected = 0.002 * level**degrade.GAMMA + read
        assert light.mean() == pytest.approx(level**degrade.GAMMA, rel=0.01)
        assert light.var() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("phase", range(4))
def test_demosaicing_keeps_flat_colours_and_what_each_pixel_saw(phase: int) -> None:
    flat = np.broadcast_to(np.array([0.2, 0.5, 0.9], np.float32), (12, 14, 3))
    assert np.allclose(degrade.demosaiced(flat.copy(), phase)[1:-1, 1:-1], flat[1:-1, 1:-1])
    values = np.random.default_rng(0).standard_normal((12, 14, 3)).astype(np.float32)
    same = degrade.demosaiced(values, phase) == values
    kept = same[1:-1, 1:-1].mean((0, 1))
    assert kept == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize("place", [(0, 0), (30, 31), (64, 72), (5, 70)])
def test_a_crop_with_its_surroundings_is_that_of_the_mirrored_image(place: tuple[int, int]) -> None:
    from kitbench.data.batches import _cut

    pixels = photograph().pixels
    around, crop, (top, left) = 9, 32, place
    whole = np.pad(pixels, ((around, around), (around, around), (0, 0)), "reflect")
    expected = whole[top : top + crop + 2 * around, left : left + crop + 2 * around]
    assert np.array_equal(_cut(pixels, top, left, crop, around), expected)


@pytest.mark.parametrize("name", SUITES)
def test_batches_are_crops_of_the_photographs_degraded_alike(name: str) -> None:
    recipe = SUITES[name].recipe.model_copy(update={"augment": False, "crop": 24, "batch": 16})
    degraded, clean = Batches([photograph()], SUITES[name].task, recipe, 0)[0]
    assert degraded.shape == clean.shape == (16, 3, 24, 24)
    windows = np.lib.stride_tricks.sliding_window_view(photograph().pixels, (24, 24), axis=(0, 1))
    first = (clean[0].numpy() * 255).round().astype(np.uint8)
    assert (windows == first).all(axis=(2, 3, 4)).any()
    assert 0.001 < float((degraded - clean).abs().mean()) < 0.4


def test_the_crops_of_a_pair_lie_at_one_place_and_are_turned_together() -> None:
    recipe = SUITES["derain"].recipe.model_copy(update={"crop": 24, "batch": 16})
    degraded, clean = Batches([photograph(degraded=True)], SUITES["derain"].task, recipe, 0)[0]
    assert float((degraded + clean - 1).abs().max()) < 1e-6


def test_a_test_image_is_its_pairs_input_or_made_by_the_task_alone() -> None:
    chosen = SUITES["derain"]
    pair, alone = photograph(degraded=True), photograph()
    seen = evaluate.degraded(pair, "set", chosen.task, None, chosen.protocol)
    assert np.array_equal(np.rint(seen * 255), 255 - pair.pixels)
    made = evaluate.degraded(alone, "set", chosen.task, None, chosen.protocol)
    assert np.array_equal(made, evaluate.degraded(alone, "set", chosen.task, None, chosen.protocol))
    assert not np.array_equal(made, evaluate.degraded(alone, "other", chosen.task, None, chosen.protocol))
