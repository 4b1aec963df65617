"""Overlap of training and test images: copies, turned copies and crops are found by content, and nothing else."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from kitbench.data import overlap
from kitbench.data.cards import card
from kitbench.data.locate import locate
from kitbench.data.overlap import assert_disjoint, overlaps
from kitbench.data.photograph import Photograph, read_set
from kitbench.data.pixels import pixel_sha256
from kitbench.data.repetition import images_of
from kitbench.errors import InputError
from kitbench.spec import fields, loading, shipped
from tests.conftest import Kitbench


def photo(pixels: np.ndarray, name: str = "photo") -> Photograph:
    pixels = np.ascontiguousarray(pixels)
    return Photograph(name, pixels, pixel_sha256(pixels))


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return read_set(card("skimage-test"), None, "colour")[0].pixels[:160, :200]


ORIENTATIONS = [(turns, mirror) for turns in range(4) for mirror in (False, True)]


@pytest.mark.parametrize(("turns", "mirror"), ORIENTATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_turned_crop_is_found_whichever_side_it_is_on(
    turns: int, mirror: bool, channels: int, scene: np.ndarray
) -> None:
    whole, crop = scene[..., :channels], scene[37:101, 53:143, :channels]
    crop = np.rot90(crop[:, ::-1] if mirror else crop, turns)
    for train, test in ((whole, crop), (crop, whole)):
        [found] = overlaps({"a": [photo(train)]}, {"b": [photo(test)]})
        assert (found.train, found.test) == ("a/photo", "b/photo")
        assert found.shared >= overlap.ENOUGH


def test_images_that_share_a_region_of_47_pixels_are_found(scene: np.ndarray) -> None:
    left, right = scene[:100, :110], scene[53:, 63:]  # they share [53:100, 63:110]
    assert overlaps({"a": [photo(left)]}, {"b": [photo(right)]})
    assert not overlaps({"a": [photo(scene[:100, :100])]}, {"b": [photo(scene[:, 100:])]})


def test_one_changed_pixel_in_every_square_is_another_image(scene: np.ndarray) -> None:
    changed = scene.copy()
    changed[::8, ::8] ^= 1
    assert not overlaps({"a": [photo(scene)]}, {"b": [photo(changed)]})


@pytest.mark.parametrize("shape", [(8, 8, 3), (300, 12, 3)])
def test_an_image_smaller_than_a_square_shares_no_region(scene: np.ndarray, shape: tuple[int, ...]) -> None:
    small = [photo(np.tile(scene, (2, 1, 1))[: shape[0], : shape[1]])]
    assert overlaps({"a": [photo(scene)]}, {"b": small}) == overlaps({"a": small}, {"b": [photo(scene)]}) == []


def test_flat_regions_prove_nothing() -> None:
    random = np.random.default_rng(0)
    skies = [np.full((128, 128, 3), 255, np.uint8) for _ in range(2)]
    for sky in skies:
        sky[96:] = random.integers(0, 256, (32, 128, 3))
        sky[:8] = 0
    assert not overlaps({"a": [photo(skies[0])]}, {"b": [photo(skies[1])]})


def test_the_hash_of_a_place_is_that_of_the_square_cut_there(scene: np.ndarray) -> None:
    pixels = scene[:40, :53]
    places = overlap._everywhere(pixels).reshape(25, 38)
    for top, left in ((0, 0), (24, 37), (7, 20)):
        square = pixels[top : top + 16, left : left + 16]
        hashes = overlap._squares(square)
        assert hashes.shape == (1, 8)
        assert hashes[0, 0] == places[top, left]
        turned = {int(overlap._everywhere(np.rot90(square, n))[0]) for n in range(4)}
        turned |= {int(overlap._everywhere(np.rot90(square[:, ::-1], n))[0]) for n in range(4)}
        assert set(hashes[0].tolist()) == turned


def test_every_pair_that_overlaps_is_told_and_the_first_is_named(scene: np.ndarray) -> None:
    test = {"t": [photo(scene[:80], "top"), photo(scene[80:], "bottom"), photo(scene[:80], "top again")]}
    found = overlaps({"w": [photo(scene, "whole")]}, test)
    assert [pair.test for pair in found] == ["t/top", "t/bottom", "t/top again"]
    with pytest.raises(
        InputError, match=r"Training and test images overlap: w/whole contains all or part of t/top: .*3 such pairs"
    ):
        assert_disjoint({"w": [photo(scene, "whole")]}, test)


def test_the_message_says_whether_the_image_is_one_of_validation_and_how_to_choose_another(kitbench: Kitbench) -> None:
    words = ("--train-set", "skimage-train", "--set", "data.validation=['skimage-train']", "--dry-run")
    done = kitbench("run", "--suite", "tiny.toml", *words, code=2)
    assert "Training and validation images overlap: skimage-train/" in done.stderr
    assert "choose disjoint sets, or another validation set: --set data.validation=SET." in done.stderr


def test_a_quarter_of_the_backgrounds_of_rain100l_are_crops_of_the_val_split_of_bsds500(data_root: Path) -> None:
    if locate(card("Rain100L"), data_root) is None:
        pytest.skip(f"Rain100L is not in {data_root}")
    val = card("BSD500").model_copy(update={"layouts": (("images/val/*.jpg",),), "count": 100})
    found = overlaps(
        {"val": read_set(val, data_root, "colour")}, {"Rain100L": photographs("Rain100L", data_root, "colour")}
    )
    assert len({pair.test for pair in found}) == len(found) == 25
    assert all(pair.shared == pair.squares for pair in found)


def sets_of_suites(source: str) -> list[tuple[fields.Mode, str, tuple[str, ...]]]:
    """What shipped suites train on, each set once, and all that they then test on."""
    tests: dict[tuple[fields.Mode, str], set[str]] = {}
    for name in shipped.suite_names():
        data = getattr(loading.load_suite(name).data, source)
        for mode in data.modes:
            sets = getattr(data, mode)
            for train in sets.train:
                tests.setdefault((mode, train), set()).update(sets.test)
    return sorted((mode, train, tuple(sorted(names))) for (mode, train), names in tests.items())


@cache
def photographs(name: str, root: Path | None, mode: fields.Mode) -> list[Photograph]:
    return images_of(card(name), root, mode)


@pytest.mark.parametrize(("mode", "train", "tests"), sets_of_suites("embedded"))
def test_the_embedded_sets_of_shipped_suites_are_disjoint(
    mode: fields.Mode, train: str, tests: tuple[str, ...]
) -> None:
    assert_disjoint({train: photographs(train, None, mode)}, {name: photographs(name, None, mode) for name in tests})


@pytest.mark.parametrize(("mode", "train", "tests"), sets_of_suites("folder"))
def test_the_real_sets_of_shipped_suites_are_disjoint(
    mode: fields.Mode, train: str, tests: tuple[str, ...], data_root: Path
) -> None:
    present = [name for name in tests if locate(card(name), data_root) is not None]
    if locate(card(train), data_root) is None or not present:
        pytest.skip(f"{train} and one of {', '.join(tests)} are not in {data_root}")
    assert_disjoint(
        {train: photographs(train, data_root, mode)}, {name: photographs(name, data_root, mode) for name in present}
    )


def test_set12_shows_a_part_of_a_training_photograph(data_root: Path) -> None:
    """Whoever trains on BSD400, as most print does, trains on the starfish of Set12."""
    train = {"BSDS500": [photo for photo in read_set(card("BSDS500"), data_root, "gray") if "12003" in photo.name]}
    [found] = overlaps(train, {"Set12": photographs("Set12", data_root, "gray")})
    assert (found.train, found.test) == ("BSDS500/images/train/12003", "Set12/04")
