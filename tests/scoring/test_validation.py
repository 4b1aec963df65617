"""Validation crops: which, of what, how degraded, and how a network is scored on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kitbench.data.photograph import Photograph
from kitbench.scoring.evaluate import degraded
from kitbench.scoring.validation import IMAGES, SIDE, validation_crops, validator
from kitbench.spec.loading import load_suite

SUITE = load_suite("denoise")


def photographs(count: int, height: int = 200, width: int = 150) -> list[Photograph]:
    random = np.random.default_rng(count)
    return [Photograph(f"{n}", random.integers(0, 256, (height, width, 3), np.uint8), "") for n in range(count)]


def test_crops_are_the_middle_of_the_first_images_of_the_sets_in_turn_at_the_middle_noise() -> None:
    sets = {"A": photographs(2), "B": photographs(9, 100, 131)}
    assert len(SUITE.task.conditions) == 3
    crops = validation_crops(sets, SUITE.task, SUITE.protocol)
    taken = [("A", 0), ("B", 0), ("A", 1), ("B", 1), ("B", 2), ("B", 3), ("B", 4), ("B", 5)]
    assert len(crops) == len(taken) == IMAGES
    for (noisy, clean), (name, number) in zip(crops, taken, strict=True):
        photo = sets[name][number]
        height, width = photo.shape[:2]
        side = min(SIDE, height, width)
        inside = np.s_[(height - side) // 2 :, (width - side) // 2 :]
        whole = degraded(photo, name, SUITE.task, SUITE.task.conditions[1], SUITE.protocol)
        for tensor, image in ((clean, photo.pixels.astype(np.float32) / 255), (noisy, whole)):
            np.testing.assert_array_equal(tensor[0].permute(1, 2, 0), image[inside][:side, :side])


def test_a_network_is_scored_by_the_mean_psnr_of_its_clipped_and_unrounded_output() -> None:
    clean = torch.full((1, 3, 16, 16), 1.0)
    far, near = clean - 0.1, clean + 0.5  # above white: clipped, so that nothing is wrong
    validate = validator([(far, clean), (near, clean)], torch.device("cpu"), "float32")
    assert validate(nn.Identity()) == pytest.approx((20 + 120) / 2, abs=1e-4)  # an exact one counts as 120 dB
