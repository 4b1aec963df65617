"""Cards, reading and batches: what is wrong is named, and a batch is a pure function of seed and step."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kitbench.data import pixels
from kitbench.data.batches import AHEAD, Batches
from kitbench.data.cards import Card, card
from kitbench.data.degrade import add_noise
from kitbench.data.overlap import assert_disjoint
from kitbench.data.photograph import Photograph, read_set
from kitbench.errors import InputError
from kitbench.seeds import generator
from kitbench.spec import loading

RECIPE = loading.load_suite("denoise", "smoke").recipe
TASK = loading.load_suite("denoise", "smoke").task


@pytest.fixture(scope="module")
def photographs() -> list[Photograph]:
    return read_set(card("skimage-train"), None, "colour")


def own_card(count: int, **fields: object) -> Card:
    required = {"name": "own", "title": "t", "tasks": ["denoise"], "colour": True, "home": "h", "licence": "l"}
    return Card.model_validate(required | {"citation": "c", "layouts": [["*.png"]], "count": count} | fields)


def write_images(folder: Path, count: int, mode: str = "RGB", size: tuple[int, int] = (40, 32)) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_embedded_photographs_match_their_cards_and_are_disjoint() -> None:
    train = {"skimage-train": read_set(card("skimage-train"), None, "gray")}
    test = {name: read_set(card(name), None, "gray") for name in ("skimage-test", "skimage-gray")}
    assert_disjoint(train, test)
    assert [len(photos) for photos in (*train.values(), *test.values())] == [4, 2, 5]


@pytest.mark.parametrize("name", ["Set12", "BSD68", "CBSD68", "BSDS500"])
def test_a_real_set_matches_its_card(name: str, data_root: Path) -> None:
    photos = read_set(card(name), data_root, "colour" if card(name).colour else "gray")
    assert len(photos) == card(name).count
    assert all(photo.pixels.dtype == np.uint8 and photo.pixels.ndim == 3 for photo in photos)


def test_bsd68_is_cbsd68_made_gray_pixel_for_pixel(data_root: Path) -> None:
    ours = {photo.sha256 for photo in read_set(card("CBSD68"), data_root, "gray")}
    assert ours == {photo.sha256 for photo in read_set(card("BSD68"), data_root, "gray")}


def test_training_on_the_val_split_of_bsds500_would_be_refused(data_root: Path) -> None:
    leaky = card("BSDS500").model_copy(
        update={"layouts": (("images/val/*.jpg",),), "count": 100, "checksum": "none", "sha256": {}}
    )
    train, test = read_set(leaky, data_root, "colour"), read_set(card("CBSD68"), data_root, "colour")
    with pytest.raises(InputError, match="overlap"):
        assert_disjoint({"val": train}, {"CBSD68": test})


@pytest.mark.parametrize("turned", [lambda p: p, np.flipud, np.fliplr, np.rot90, lambda p: np.rot90(p, 3)[::-1]])
def test_a_turned_copy_of_a_test_image_is_not_allowed_in_training(turned, photographs: list[Photograph]) -> None:
    copy = np.ascontiguousarray(turned(photographs[0].pixels))
    twin = Photograph("twin", copy, pixels.pixel_sha256(copy))
    with pytest.raises(InputError, match=r"train/twin contains all or part of test/"):
        assert_disjoint({"train": [twin]}, {"test": photographs})


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    own = own_card(3, folders=["own"])
    with pytest.raises(InputError, match=r"not in .*looked for own"):
        read_set(own, tmp_path, "colour")
    (tmp_path / "own").mkdir()
    with pytest.raises(InputError, match="no image"):
        read_set(own, tmp_path, "colour")
    write_images(tmp_path / "own", 2)
    with pytest.raises(InputError, match="2 images in .* expected 3"):
        read_set(own, tmp_path, "colour")
    write_images(tmp_path / "own", 3)
    assert len(read_set(own, tmp_path, "colour")) == 3
    (tmp_path / "own" / "1.png").write_text("no image")
    with pytest.raises(InputError, match="not a readable image"):
        read_set(own, tmp_path, "colour")
    write_images(tmp_path / "own", 3)
    whole = (tmp_path / "own" / "1.png").read_bytes()
    (tmp_path / "own" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable image"):
        read_set(own, tmp_path, "colour")


def test_the_wrong_kind_of_image_is_named(tmp_path: Path) -> None:
    own = own_card(1, folders=["own"])
    write_images(tmp_path / "own", 1, mode="L")
    with pytest.raises(InputError, match="is gray, expected colour"):
        read_set(own, tmp_path, "colour")
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(tmp_path / "own" / "0.png")
    with pytest.raises(InputError, match=r"pixel format I;16"):
        read_set(own, tmp_path, "colour")
    with pytest.raises(InputError, match="gray and cannot be used in mode 'colour'"):
        read_set(own.model_copy(update={"colour": False}), tmp_path, "colour")


def test_an_altered_file_is_named_with_both_checksums(tmp_path: Path, data_root: Path) -> None:
    shutil.copytree(data_root / "Set12", tmp_path / "Set12")
    path = tmp_path / "Set12" / "03.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=r"03\.png has pixels checksum \w{12}, expected \w{12}"):
        read_set(card("Set12"), tmp_path, "gray")


def test_a_batch_is_a_pure_function_of_seed_and_step(photographs: list[Photograph]) -> None:
    batches = Batches(photographs, TASK, RECIPE, 7)
    again = Batches(photographs, TASK, RECIPE, 7)
    for step in (0, 3):
        assert all(torch.equal(a, b) for a, b in zip(batches[step], again[step], strict=True))
    assert not torch.equal(batches[0][1], batches[1][1])
    assert not torch.equal(batches[0][1], Batches(photographs, TASK, RECIPE, 8)[0][1])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_number_of_workers_and_the_first_step_change_nothing(workers: int, photographs: list[Photograph]) -> None:
    batches = Batches(photographs, TASK, RECIPE.model_copy(update={"steps": 3 + 2 * AHEAD}), 7)
    prepared = list(batches.from_step(3, workers))
    assert len(prepared) == 2 * AHEAD
    for step, found in enumerate(prepared, 3):
        assert all(torch.equal(a, b) for a, b in zip(found, batches[step], strict=True))


def test_crops_are_cut_turned_and_made_noisy_as_asked(photographs: list[Photograph]) -> None:
    recipe = RECIPE.model_copy(update={"augment": False, "crop": 24, "batch": 64})
    sharp = TASK.model_copy(update={"sigma_train": (25.0, 25.0)})
    degraded, clean = Batches(photographs, sharp, recipe, 0)[0]
    assert degraded.shape == clean.shape == (64, 3, 24, 24)
    assert degraded.dtype == clean.dtype == torch.float32
    assert 0 <= float(clean.min()) <= float(clean.max()) <= 1
    assert float((degraded - clean).std() * 255) == pytest.approx(25, rel=0.01)
    windows = [np.lib.stride_tricks.sliding_window_view(p.pixels, (24, 24), axis=(0, 1)) for p in photographs]
    first = (clean[0].numpy() * 255).round().astype(np.uint8)
    assert any((window == first).all(axis=(2, 3, 4)).any() for window in windows)


def test_noise_has_the_stated_deviation_and_is_not_clipped() -> None:
    clean = np.ones((256, 256, 1), np.float32)
    degraded = add_noise(clean, 50, generator("test"))
    assert degraded.dtype == np.float32
    assert (degraded - clean).std() * 255 == pytest.approx(50, rel=0.02)
    assert degraded.max() > 1.2


def test_an_image_smaller_than_the_crop_is_named(photographs: list[Photograph]) -> None:
    with pytest.raises(InputError, match="600 x 400 px, smaller than the crop of 512"):
        Batches(photographs, TASK, RECIPE.model_copy(update={"crop": 512}), 0)
