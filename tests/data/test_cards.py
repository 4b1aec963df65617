"""Cards of pairs: every published tree is read, pairs are found by name, and what is wrong is told in one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from kitbench.data import cards, photograph
from kitbench.data.batches import Batches
from kitbench.data.cards import Card, Pairs, card
from kitbench.data.images import kernels
from kitbench.data.locate import locate
from kitbench.data.photograph import Photograph, read_set
from kitbench.data.pixels import pixel_sha256
from kitbench.errors import InputError
from kitbench.spec import loading

PAIRED = [
    (name, number) for name, found in cards.cards().items() for number in range(len(found.pairs)) if not found.blind
]


def image(seed: int, width: int = 24, height: int = 16, colour: bool = True) -> np.ndarray:
    shape = (height, width, 3) if colour else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def small(name: str, count: int, **update: object) -> Card:
    """A shipped card, of a set with fewer and smaller images."""
    free = {"count": count, "size": None, "averaged": "", "checksum": "none", "sha256": {}}
    return card(name).model_copy(update=free | update)


def own_card(count: int, **fields: object) -> Card:
    required = {"name": "own", "title": "t", "tasks": ["derain"], "colour": True, "home": "h", "licence": "l"}
    pairs = [{"inputs": ["input/*.png"], "targets": ["target/*.png"]}]
    return Card.model_validate(
        required | {"citation": "c", "pairs": pairs, "count": count, "folders": ["own"]} | fields
    )


def own_pairs(root: Path, count: int) -> None:
    for number in range(count):
        write(root / "own" / "input" / f"{number}.png", image(100 + number))
        write(root / "own" / "target" / f"{number}.png", image(number))


@pytest.mark.parametrize(("name", "number"), PAIRED)
def test_every_layout_of_every_card_is_found_and_paired(name: str, number: int, tmp_path: Path) -> None:
    pairs = card(name).pairs[number]
    chosen = small(name, 3 * len(pairs.inputs))
    folder = tmp_path / chosen.folders[0]
    folder.mkdir(parents=True)
    if pairs.inputs[0].endswith(".mat"):
        block = np.stack([image(n) for n in range(3)])
        for [pattern] in (pairs.inputs, pairs.targets):
            savemat(folder / pattern, {Path(pattern).stem: block})
    else:
        expected = write_tree(folder, pairs, chosen.colour)
    photos = read_set(chosen, tmp_path, "colour" if chosen.colour else "gray")
    assert len(photos) == chosen.count
    if not pairs.inputs[0].endswith(".mat"):
        assert {(pixel_sha256(p.degraded), pixel_sha256(p.pixels)) for p in photos} == expected


def write_tree(folder: Path, pairs: Pairs, colour: bool) -> set[tuple[str, str]]:
    """Three pairs for each pattern of inputs, under names that stars stand for; the checksums of input and target."""
    expected, named = set(), []
    for which, pattern in enumerate(pairs.inputs):
        # Patterns for two suffixes come in twos; several folders of inputs may share one of targets.
        of_target = pairs.targets[which] if len(pairs.targets) == len(pairs.inputs) else pairs.targets[0]
        for number in range(3):
            stars = [f"{which}{number}{letter}" for letter in "ab"[: pattern.count("*")]]
            paths = []
            for half, text in ((0, pattern), (1, of_target)):
                for star in stars[: text.count("*")]:
                    text = text.replace("*", star, 1)
                suffix_free = image(1000 * half + 10 * which + number, colour=colour)
                write(folder / text, suffix_free)
                paths.append(folder / text)
                named.append(text)
            halves = [np.asarray(Image.open(path)).reshape(16, 24, -1) for path in paths]
            expected.add((pixel_sha256(halves[0]), pixel_sha256(halves[1])))
    if pairs.only:
        (folder / pairs.only).write_text("\n".join(f"{a} {b}" for a, b in zip(named[::2], named[1::2], strict=True)))
    return expected


TREES = {
    "GoPro": ("GOPRO_Large/test", [("GOPR0384_11_00/blur/000001.png", "GOPR0384_11_00/sharp/000001.png")]),
    "GoPro-gamma": ("GOPRO_Large/test", [("GOPR0384_11_00/blur_gamma/000001.png", "GOPR0384_11_00/sharp/000001.png")]),
    "HIDE": ("HIDE_dataset", [("test/test-close-ups/1fromGOPR1000.png", "GT/1fromGOPR1000.png"),
                              ("test/test-long-shot/2fromGOPR1000.png", "GT/2fromGOPR1000.png")]),
    "Levin09": ("Levin09", [("im1_kernel4_img.png", "gt/im1.png"), ("im1_kernel5_img.png", "gt/im1.png")]),
    "Rain13K": ("Rain13K", [("input/1.jpg", "target/1.jpg")]),
    "Rain100L": ("Rain100L", [("rainy/rain-001.png", "norain-001.png")]),
    "Rain100H-train": ("RainTrainH", [("rain-1.png", "norain-1.png"), ("rain-1800.png", "norain-1800.png")]),
    "Rain100H-new": ("rain_data_test_Heavy", [("rain/X2/norain-1x2.png", "norain/norain-1.png")]),
    "SPA-Data": ("real_test_1000", [("rain/000.png", "gt/000gt.png")]),
    "SIDD-small": ("SIDD_Small_sRGB_Only", [("Data/0001_001_S6/NOISY_SRGB_010.PNG", "Data/0001_001_S6/GT_SRGB_010.PNG")]),
    "SIDD-medium": ("SIDD_Medium_Srgb", [(f"Data/0001_001_S6/0001_NOISY_SRGB_{n}.PNG", f"Data/0001_001_S6/0001_GT_SRGB_{n}.PNG")
                                         for n in ("010", "011")]),
    "PolyU": ("PolyU", [("CroppedImages/Canon5D2_5_160_3200_chair_5_real.JPG", "CroppedImages/Canon5D2_5_160_3200_chair_5_mean.JPG")]),
    "CC15": ("CC15", [("5dmark3_iso3200_1_real.png", "5dmark3_iso3200_1_mean.png")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_set_is_read_as_its_authors_publish_it(name: str, tmp_path: Path) -> None:
    folder, pairs = TREES[name]
    colour = card(name).colour
    for number, paths in enumerate(pairs):
        for half, path in enumerate(paths):
            if not (tmp_path / folder / path).exists():
                write(tmp_path / folder / path, image(10 * number + half, colour=colour))
    write(tmp_path / folder / "5dmark3_iso3200_1_ours.png", image(99))  # other files do no harm
    photos = read_set(small(name, len(pairs)), tmp_path, "colour" if colour else "gray")
    for photo, (degraded, clean) in zip(photos, pairs, strict=True):
        assert photo.name == degraded.rsplit(".", 1)[0]
        for pixels, path in ((photo.degraded, degraded), (photo.pixels, clean)):
            assert np.array_equal(pixels.squeeze(), np.asarray(Image.open(tmp_path / folder / path)))


def test_the_split_of_realblur_is_the_one_of_its_list(tmp_path: Path) -> None:
    folder = tmp_path / "RealBlur"
    tree = "RealBlur-J_ECC_IMCORR_centroid_itensity_ref"
    for scene in ("scene001", "scene002"):
        write(folder / tree / scene / "blur" / "blur_1.png", image(1))
        write(folder / tree / scene / "gt" / "gt_1.png", image(2))
    with pytest.raises(InputError, match=r"RealBlur_J_test_list\.txt is missing"):
        read_set(small("RealBlur-J", 1), tmp_path, "colour")
    (folder / "RealBlur_J_test_list.txt").write_text(f"{tree}/scene002/gt/gt_1.png {tree}/scene002/blur/blur_1.png\n")
    [photo] = read_set(small("RealBlur-J", 1), tmp_path, "colour")
    assert photo.name == f"{tree}/scene002/blur/blur_1"


@pytest.mark.parametrize(("name", "count"), [("Rain100L", 100), ("Levin09", 32), ("CC15", 15)])
def test_a_real_set_of_pairs_matches_its_card(name: str, count: int, data_root: Path) -> None:
    if locate(card(name), data_root) is None:
        pytest.skip(f"{name} is not in {data_root}")
    photos = read_set(card(name), data_root, "colour" if card(name).colour else "gray")
    assert len(photos) == len({photo.sha256 for photo in photos}) == count
    assert all(photo.degraded.shape == photo.pixels.shape == photo.shape for photo in photos)
    assert not any(np.array_equal(photo.degraded, photo.pixels) for photo in photos)


def mat_file(path: Path, name: str, array: np.ndarray, version: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if version == "5":
        savemat(path, {name: array})
    else:
        with h5py.File(path, "w", userblock_size=512) as file:
            file[name] = array.T  # MATLAB 7.3 stores the axes reversed


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_the_blocks_of_a_mat_file_are_images(version: str, tmp_path: Path) -> None:
    noisy, clean = (np.random.default_rng(n).integers(0, 256, (2, 3, 20, 16, 3), dtype=np.uint8) for n in (0, 1))
    folder = tmp_path / "SIDD_Validation_sRGB"
    mat_file(folder / "ValidationNoisyBlocksSrgb.mat", "ValidationNoisyBlocksSrgb", noisy, version)
    mat_file(folder / "ValidationGtBlocksSrgb.mat", "ValidationGtBlocksSrgb", clean, version)
    photos = read_set(small("SIDD-validation", 6), tmp_path, "colour")
    assert photos[4].name == "ValidationNoisyBlocksSrgb/02_02"
    assert np.array_equal(photos[4].degraded, noisy[1, 1])
    assert np.array_equal(photos[4].pixels, clean[1, 1])
    with pytest.raises(InputError, match="6 pairs in .*expected 1280"):
        read_set(card("SIDD-validation"), tmp_path, "colour")


BAD_MATS = {
    "another name": ({"other": np.zeros((1, 1, 8, 8, 3), np.uint8)}, "has no variable 'ValidationGtBlocksSrgb', it contains other"),
    "16 bits": ({"ValidationGtBlocksSrgb": np.zeros((1, 1, 8, 8, 3), np.uint16)}, "as uint16, expected 8-bit pixels"),
    "a matrix": ({"ValidationGtBlocksSrgb": np.zeros((8, 8), np.uint8)}, "of 8 x 8, expected images x height"),
    "fewer": ({"ValidationGtBlocksSrgb": np.zeros((1, 8, 8, 3), np.uint8)}, "fewer than the other file of the pair"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_MATS)
@pytest.mark.parametrize("version", ["5", "7.3"])
def test_a_mat_file_that_is_not_the_sets_is_named(fault: str, version: str, tmp_path: Path) -> None:
    folder, (contents, message) = tmp_path / "SIDD_Validation_sRGB", BAD_MATS[fault]
    inputs = np.zeros((2, 8, 8, 3) if fault == "fewer" else (1, 1, 8, 8, 3), np.uint8)
    mat_file(folder / "ValidationNoisyBlocksSrgb.mat", "ValidationNoisyBlocksSrgb", inputs, version)
    for name, array in contents.items():
        mat_file(folder / "ValidationGtBlocksSrgb.mat", name, array, version)
    with pytest.raises(InputError, match=message):
        read_set(small("SIDD-validation", len(inputs)), tmp_path, "colour")
    mat_file(folder / "ValidationNoisyBlocksSrgb.mat", "ValidationNoisyBlocksSrgb", np.zeros((8, 8), np.uint8), version)
    with pytest.raises(InputError, match=r"NoisyBlocksSrgb of 8 x 8, expected images x height"):
        read_set(small("SIDD-validation", 1), tmp_path, "colour")
    mat_file(folder / "ValidationNoisyBlocksSrgb.mat", "ValidationNoisyBlocksSrgb", inputs, version)
    (folder / "ValidationGtBlocksSrgb.mat").write_bytes(b"no mat file at all")
    with pytest.raises(InputError, match=r"ValidationGtBlocksSrgb\.mat is not a readable \.mat file"):
        read_set(small("SIDD-validation", len(inputs)), tmp_path, "colour")


def test_half_a_pair_is_named(tmp_path: Path) -> None:
    own_pairs(tmp_path, 3)
    (tmp_path / "own" / "target" / "1.png").unlink()
    with pytest.raises(InputError, match=r"input/1\.png has no target"):
        read_set(own_card(3), tmp_path, "colour")
    own_pairs(tmp_path, 3)
    (tmp_path / "own" / "input" / "2.png").unlink()
    with pytest.raises(InputError, match=r"target/2\.png has no input"):
        read_set(own_card(3), tmp_path, "colour")


def test_what_is_wrong_with_the_images_of_a_pair_is_named(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            read_set(own_card(2), tmp_path, "colour")
        own_pairs(tmp_path, 2)

    own_pairs(tmp_path, 2)
    write(tmp_path / "own" / "input" / "1.png", image(0, 25))
    refused(r"input/1\.png is 25 x 16 px and its target .*1\.png is 24 x 16 px")
    write(tmp_path / "own" / "input" / "1.png", image(0, colour=False))
    refused(r"input/1\.png is gray, expected colour")
    write(tmp_path / "own" / "target" / "0.png", np.zeros((16, 24), np.uint16))
    refused(r"target/0\.png has pixel format I;16, expected 8-bit RGB or gray")
    write(tmp_path / "own" / "input" / "extra.png", image(0))
    write(tmp_path / "own" / "target" / "extra.png", image(1))
    refused("3 pairs in .*own, expected 2")


def test_checksums_cover_both_halves_of_a_pair(tmp_path: Path) -> None:
    own_pairs(tmp_path, 1)
    sums = {name: pixel_sha256(image(seed)) for name, seed in (("input/0", 100), ("target/0", 0))}
    checked = own_card(1, checksum="pixels", sha256=sums)
    [photo] = read_set(checked, tmp_path, "colour")
    write(tmp_path / "own" / "input" / "0.png", image(7))
    with pytest.raises(InputError, match=rf"input/0\.png has pixels checksum \w+, expected {sums['input/0'][:12]}"):
        read_set(checked, tmp_path, "colour")
    [other] = read_set(own_card(1), tmp_path, "colour")
    assert photo.sha256 != other.sha256


@pytest.mark.parametrize(
    ("name", "found", "size"), [("Kodak24", "Kodak24-full", (768, 512)), ("Kodak24-full", "Kodak24", (500, 500))]
)
def test_another_size_of_kodak_is_told_by_content(name: str, found: str, size: tuple[int, int], tmp_path: Path) -> None:
    for number in range(24):
        write(tmp_path / "Kodak24" / f"kodim{number + 1:02d}.png", np.full((size[1], size[0], 3), number, np.uint8))
    with pytest.raises(InputError, match=rf"is {size[0]} x {size[1]} px, .* the folder contains {found} "):
        read_set(card(name), tmp_path, "colour")
    assert len(read_set(card(found), tmp_path, "colour")) == 24


def test_another_version_of_rain100h_is_told_by_its_count(tmp_path: Path) -> None:
    for number in range(200):
        for half in ("input", "target"):
            write(tmp_path / "Rain100H" / half / f"{number}.png", np.full((8, 8, 3), number, np.uint8))
    with pytest.raises(InputError, match="200 pairs in .*expected 100; the folder contains Rain100H-new "):
        read_set(card("Rain100H"), tmp_path, "colour")
    assert len(read_set(card("Rain100H-new"), tmp_path, "colour")) == 200


@pytest.mark.parametrize(("gamma", "name", "found"), [(1.0, "GoPro-gamma", "GoPro"), (2.2, "GoPro", "GoPro-gamma")])
def test_what_a_blur_is_an_average_of_is_told_by_content(gamma: float, name: str, found: str, tmp_path: Path) -> None:
    """In a repacked tree nothing but the pixels tells blur from blur_gamma."""
    for number, photo in enumerate(read_set(card("skimage-train"), None, "colour")):
        frames = np.stack([photo.pixels[20:220, 20 + shift : 320 + shift] for shift in range(-10, 11)]) / 255
        blurred = np.rint((frames**gamma).mean(0) ** (1 / gamma) * 255).astype(np.uint8)
        write(tmp_path / "GoPro" / "test" / "input" / f"{number}.png", blurred)
        write(tmp_path / "GoPro" / "test" / "target" / f"{number}.png", np.rint(frames[10] * 255).astype(np.uint8))
    assert len(read_set(small(found, 4, averaged=card(found).averaged), tmp_path, "colour")) == 4
    with pytest.raises(InputError, match=f"averages of the frames' {card(found).averaged}, expected"):
        read_set(small(name, 4, averaged=card(name).averaged), tmp_path, "colour")


def test_a_set_whose_server_keeps_the_targets_is_not_read(tmp_path: Path) -> None:
    mat_file(tmp_path / "SIDD" / "BenchmarkNoisyBlocksSrgb.mat", "x", np.zeros(3), "5")
    with pytest.raises(InputError, match="its server scores submissions"):
        read_set(card("SIDD-benchmark"), tmp_path, "colour")


def test_a_folder_that_holds_another_split_is_not_the_set(tmp_path: Path) -> None:
    write(tmp_path / "SIDD" / "Data" / "1" / "NOISY_SRGB_010.PNG", image(0))
    assert locate(card("SIDD-medium"), tmp_path) == tmp_path / "SIDD"
    assert locate(card("SIDD-validation"), tmp_path) is None
    with pytest.raises(InputError, match=r"SIDD-validation is not in .* as ValidationNoisyBlocksSrgb\.mat \+ "):
        read_set(card("SIDD-validation"), tmp_path, "colour")


def test_images_that_do_not_fit_in_memory_are_decoded_at_each_use(tmp_path: Path, monkeypatch) -> None:
    own_pairs(tmp_path, 6)
    kept = read_set(own_card(6), tmp_path, "colour")
    monkeypatch.setattr(photograph, "free_host_bytes", lambda: 0)  # what the control group of a Slurm job may leave
    on_disk = read_set(own_card(6), tmp_path, "colour")
    assert all(photo._images is None for photo in on_disk)
    for a, b in zip(kept, on_disk, strict=True):
        assert (a.name, a.sha256, a.shape) == (b.name, b.sha256, b.shape)
        assert np.array_equal(a.pixels, b.pixels)
        assert np.array_equal(a.degraded, b.degraded)
    smoke = loading.load_suite("denoise", "smoke")
    recipe = smoke.recipe.model_copy(update={"crop": 16, "batch": 4})
    for a, b in zip(*(Batches(photos, smoke.task, recipe, 0)[5] for photos in (kept, on_disk)), strict=True):
        assert torch.equal(a, b)


def test_gray_mode_makes_both_halves_gray(tmp_path: Path) -> None:
    own_pairs(tmp_path, 1)
    [photo] = read_set(own_card(1), tmp_path, "gray")
    assert photo.degraded.shape == photo.pixels.shape == (16, 24, 1)


def test_every_card_states_what_people_need() -> None:
    for found in cards.cards().values():
        assert found.home.startswith("http"), found.name
        assert found.licence, found.name
        assert (
            found.urls
            or found.ask
            or found.package
            or found.generated
            or found.name in {"CBSD68", "McMaster", "Urban100"}
        ), found.name
        assert sorted(found.sha256) == sorted(set(found.sha256)), found.name
        assert not found.sha256 or len(found.sha256) >= found.count, found.name


def names(found: Iterable[Card]) -> set[str]:
    return {chosen.name for chosen in found}


def test_the_sets_of_the_field_have_cards() -> None:
    wanted = "GoPro HIDE RealBlur-J RealBlur-R Levin09 Rain13K Rain100L Rain100H Test100 Test1200 Test2800 SPA-Data "
    wanted += (
        "SIDD-small SIDD-medium SIDD-validation SIDD-benchmark DND PolyU CC15 BSD500 DIV2K Flickr2K WED BSDS500-test"
    )
    assert set(wanted.split()) <= names(cards.cards().values())


def test_the_kernels_of_levin09_blur_its_images(data_root: Path) -> None:
    """In correlation convention: turned by 180 degrees, the four least symmetric miss by more than 5 dB."""
    path = data_root / "Levin09" / "kernels.mat"
    if not path.is_file():
        pytest.skip(f"Levin09 is not in {data_root}")
    found = kernels(path)
    assert [len(kernel) for kernel in found] == [19, 17, 15, 27, 13, 21, 23, 23]
    assert all(kernel.sum() == pytest.approx(1) for kernel in found)
    photos = read_set(card("Levin09"), data_root, "gray")
    for number in (4, 7, 8):
        [photo] = [p for p in photos if p.name == f"im1_kernel{number}_img"]
        errors = [
            shifted_error(photo, np.ascontiguousarray(k)) for k in (found[number - 1], found[number - 1][::-1, ::-1])
        ]
        assert errors[0] < errors[1] / 10**0.5


def shifted_error(photo: Photograph, kernel: np.ndarray) -> float:
    """Least mean square over shifts up to 4 px."""
    sharp, blurred = photo.pixels[..., 0].astype(float), photo.degraded[..., 0]
    ours = cv2.filter2D(sharp, -1, kernel)
    shifts = [np.roll(ours, (dy, dx), (0, 1)) for dy in range(-4, 5) for dx in range(-4, 5)]
    return min(float(np.mean((moved - blurred)[30:-30, 30:-30] ** 2)) for moved in shifts)


def test_another_file_than_levins_kernels_is_refused(tmp_path: Path) -> None:
    mat_file(tmp_path / "kernels.mat", "other", np.zeros(3), "7.3")
    with pytest.raises(InputError, match="does not hold the cell array 'kernels'"):
        kernels(tmp_path / "kernels.mat")
