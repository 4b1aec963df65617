"""The pictures that a run keeps of its test images."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from kitbench.data.photograph import Photograph
from kitbench.scoring.crops import CROP, crop_place, crop_strip


def photograph(height: int, width: int, channels: int) -> Photograph:
    random = np.random.default_rng(height)
    return Photograph("p", random.integers(0, 256, (height, width, channels), dtype=np.uint8), "00")


@pytest.mark.parametrize("shape", [(300, 200, 3), (150, 400, 1), (40, 90, 3)])
def test_a_strip_holds_whole_noisy_restored_and_clean_of_one_place(shape) -> None:
    photo = photograph(*shape)
    clean = photo.pixels / 255
    file = Image.open(io.BytesIO(crop_strip(photo, "set", clean + 2, clean * 0.5)))
    top, left, side, height, width = json.loads(file.text["place"])
    assert (height, width) == shape[:2]
    assert side == min(CROP, *shape[:2])
    strip = np.asarray(file).reshape(side, 4 * side, shape[2])
    crop = photo.pixels[top : top + side, left : left + side]
    assert crop.shape[:2] == (side, side)
    assert (strip[:, side : 2 * side] == 255).all()  # noisy, clipped
    np.testing.assert_array_equal(strip[:, 2 * side : 3 * side], np.rint(crop / 2).astype(np.uint8))
    np.testing.assert_array_equal(strip[:, 3 * side :], crop)


def test_the_place_is_a_function_of_data_set_and_image_and_has_detail() -> None:
    photo = photograph(400, 400, 3)
    photo.pixels[:, :300] = 128  # flat but for the right quarter
    assert crop_place(photo, "a") == crop_place(photo, "a")
    assert crop_place(photo, "a") != crop_place(photo, "b")
    assert crop_place(photo, "a").left + CROP > 300
