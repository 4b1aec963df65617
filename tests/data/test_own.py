"""Plain folders of pictures as sets: clean ones, pairs, and every way in which a folder is not one."""

from __future__ import annotations

import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from kitbench.apply.folders import pictures_named
from kitbench.data.audit import audit
from kitbench.data.cards import cards
from kitbench.data.headers import picture_header
from kitbench.data.images import decode, to_gray
from kitbench.data.own import card_of_set, no_pictures, pictures_in
from kitbench.data.photograph import read_set
from kitbench.data.repetition import images_of
from kitbench.errors import InputError
from kitbench.runs.sets import choose_sets, set_sha256
from kitbench.spec import loading
from kitbench.spec.fields import Mode
from kitbench.spec.suite import SetNames
from kitbench.store.folder import RunFolder
from tests.conftest import TINY, run_kitbench
from tests.data.test_cards import image, own_pairs, write


def read(folder: Path, mode: Mode = "colour"):
    return read_set(card_of_set(f"{folder}/"), None, mode)


def test_pictures_of_any_format_are_read_by_name_in_order(tmp_path: Path) -> None:
    for number, name in enumerate(("b.PNG", "a.bmp", "c.tif")):
        write(tmp_path / name, image(number))
    (tmp_path / "notes.txt").write_text("no picture")
    write(tmp_path / "deeper" / "d.png", image(9))
    photos = read(tmp_path)
    assert [photo.name for photo in photos] == ["a", "b", "c"]
    for photo, number in zip(photos, (1, 0, 2), strict=True):
        np.testing.assert_array_equal(photo.pixels, image(number))
    np.testing.assert_array_equal(read(tmp_path, "gray")[0].pixels, to_gray(image(1)))


def test_hidden_files_are_no_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")  # macOS writes these beside files that it copies
    assert pictures_in(tmp_path) == [tmp_path / "a.png"]
    own_pairs(tmp_path, 2)
    for half in ("input", "target"):
        (tmp_path / "own" / half / "._0.png").write_bytes(b"\0\5\x16\7")
    for folder, count in ((tmp_path, 1), (tmp_path / "own", 2)):
        assert len(read(folder)) == count
        assert audit(card_of_set(f"{folder}/"), folder) == []


def test_a_subfolder_that_cannot_be_read_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    listing = Path.iterdir

    def refused(folder: Path):
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert no_pictures(tmp_path).startswith(f"Folder {tmp_path} has no pictures; put some there")
    write(tmp_path / "a.png", image(0))
    assert pictures_named([tmp_path])[0] == [tmp_path / "a.png"]


def test_pairs_are_matched_by_name_whatever_their_format(tmp_path: Path) -> None:
    own_pairs(tmp_path, 3)
    folder = tmp_path / "own"
    (folder / "input" / "1.png").unlink()
    write(folder / "input" / "1.bmp", image(55))
    photos = read(folder)
    assert [photo.name for photo in photos] == ["input/0", "input/1", "input/2"]
    for number, photo in enumerate(photos):
        np.testing.assert_array_equal(photo.pixels, image(number))
        np.testing.assert_array_equal(photo.degraded, image(55 if number == 1 else 100 + number))
    assert set(card_of_set(f"{folder}/").tasks) == {"deblur", "derain", "denoise-real"}


def test_the_digest_of_a_folder_is_that_of_its_content_and_not_of_its_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        write(tmp_path / place / "a.png", image(1))
    one, two = (set_sha256(read(tmp_path / place)) for place in ("one", "two"))
    assert one == two
    write(tmp_path / "two" / "a.png", image(2))
    assert set_sha256(read(tmp_path / "two")) != one


def test_what_is_no_folder_of_pictures_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "photos" / "deeper" / "a.png", image(0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "input").mkdir(parents=True)
    for suffix in ("png", "bmp"):
        write(tmp_path / "twice" / f"a.{suffix}", image(0))
    own_pairs(tmp_path, 2)
    (tmp_path / "own" / "input" / "0.png").unlink()
    write(tmp_path / "mixed" / "a.png", image(0))
    write(tmp_path / "mixed" / "b.png", image(0, colour=False))
    write(tmp_path / "broken" / "a.png", image(0))
    (tmp_path / "broken" / "b.png").write_bytes((tmp_path / "broken" / "a.png").read_bytes()[:300])
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "empty.png")
    for name, sentence in (
        ("photos", "named by a path with a slash: ./photos"),
        ("photo", "Unknown data set 'photo'"),
        ("./photos", "has no pictures; its subfolder photos/deeper has some: name that"),
        ("./empty", "put some there (.bmp, .jpeg,"),
        ("./none", "./none is not a folder"),
        ("./empty.png", "is not a folder"),
        ("./half", "has input/ without target/"),
        ("./twice", "has a.bmp and a.png, two pictures of one name"),
        ("./own", "own/target/0.png has no input; expected one of that name as input/*.png: add it, or remove"),
        ("./mixed", "b.png is gray, expected colour"),
        ("./broken", "b.png is not a readable image"),
    ):
        with pytest.raises(InputError) as refusal:
            read_set(card_of_set(name), None, "colour")
        assert sentence in str(refusal.value)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_refused_and_not_cut_to_eight(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a.png", image(0))
    cv2.imwrite(str(tmp_path / "deep" / f"b.{suffix}"), image(1).astype(np.uint16) * 257)
    found = card_of_set(f"{tmp_path}/deep")
    with pytest.raises(InputError, match=f"b.{suffix} has 16 bits a channel"):
        images_of(found, None, "colour")
    with pytest.raises(InputError, match=f"b.{suffix} has 16 bits a channel"):  # as an image of a shipped set is read
        decode(tmp_path / "deep" / f"b.{suffix}")
    [line] = audit(found, tmp_path / "deep")
    assert f"b.{suffix} has 16 bits a channel" in line


def test_a_gray_picture_that_comes_first_does_not_make_a_folder_gray(tmp_path: Path) -> None:
    write(tmp_path / "own" / "b.png", image(0))
    cv2.imwrite(str(tmp_path / "own" / "a.png"), np.zeros((16, 24), np.uint16))
    found = card_of_set(f"{tmp_path}/own")
    assert found.colour
    with pytest.raises(InputError, match=r"a.png has 16 bits a channel"):
        images_of(found, None, "colour")
    write(tmp_path / "own" / "a.png", image(0, colour=False))
    with pytest.raises(InputError, match=r"a.png is gray, expected colour"):
        images_of(found, None, "colour")


def test_pairs_that_a_viewer_turns_differently_are_refused(tmp_path: Path) -> None:
    own_pairs(tmp_path, 2)
    folder, exif = tmp_path / "own", Image.Exif()
    exif[0x0112] = 3  # by half a turn, so that the size says nothing
    for half in ("input", "target"):
        Image.fromarray(image(0)).save(folder / half / "0.png", exif=exif)
    found = card_of_set(f"{folder}/")
    assert len(images_of(found, None, "colour")) == 2  # turned alike
    assert audit(found, folder) == []
    Image.fromarray(image(0)).save(folder / "input" / "0.png")
    sentence = r"orientations \(.*input/0.png has 1 and .*target/0.png has 3\), and pixels are read as they are stored"
    with pytest.raises(InputError, match=sentence):
        images_of(found, None, "colour")
    [line] = audit(found, folder)
    assert "save both upright, without an EXIF orientation" in line


@pytest.mark.parametrize("suffix", ["tif", "webp", "png"])
def test_files_of_several_pictures_are_refused(tmp_path: Path, suffix: str) -> None:
    first, second = (Image.fromarray(image(number)) for number in range(2))
    (tmp_path / "own").mkdir()
    first.save(tmp_path / "own" / f"a.{suffix}", save_all=True, append_images=[second])
    found = card_of_set(f"{tmp_path}/own")
    with pytest.raises(InputError, match=f"a.{suffix} holds 2 pictures"):
        images_of(found, None, "colour")
    [line] = audit(found, tmp_path / "own")
    assert "give each as a file of its own" in line


def test_the_limit_of_pillow_stays_when_two_threads_read_headers(tmp_path: Path) -> None:
    write(tmp_path / "a.png", image(0))
    limit, inside, left = Image.MAX_IMAGE_PIXELS, threading.Event(), threading.Event()

    def second() -> None:
        with picture_header(tmp_path / "a.png"):
            inside.set()
            left.wait(10)

    other = threading.Thread(target=second)
    with picture_header(tmp_path / "a.png"):
        other.start()
        inside.wait(0.3)  # it has to wait
    left.set()
    other.join()
    assert limit is not None
    assert limit == Image.MAX_IMAGE_PIXELS


def test_files_of_other_formats_are_named(tmp_path: Path) -> None:
    write(tmp_path / "own" / "a.png", image(0))
    for name in ("IMG_2.HEIC", "IMG_1.heic", ".DS_Store"):
        (tmp_path / "own" / name).write_bytes(b"no picture")
    done = run_kitbench(tmp_path, "data", "check", "./own")
    assert (
        done.stdout
        == "./own: 1 image, all readable\n  left out: IMG_1.heic, IMG_2.HEIC, not PNG, JPEG, TIFF, WebP or BMP\n"
    )


def test_a_shipped_name_is_still_that_of_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "Set12" / "a.png", image(0))
    assert card_of_set("Set12") is cards()["Set12"]
    assert card_of_set("./Set12").count == 1
    assert not any(card.own for card in cards().values())


def test_pairs_are_no_set_for_gaussian_noise(tmp_path: Path) -> None:
    own_pairs(tmp_path, 2)
    chosen = [f'data.embedded.colour.test=["{tmp_path}/own"]']
    names, _ = choose_sets(loading.load_suite("derain", overrides=chosen), None)
    assert names["colour"].test == (f"{tmp_path}/own",)
    with pytest.raises(InputError, match="is made for deblur and derain and denoise-real, the suite's task is denoise"):
        choose_sets(loading.load_suite("denoise", overrides=chosen), None)


def test_a_path_has_one_spelling_and_lies_beside_the_suite_that_names_it(tmp_path: Path) -> None:
    names = SetNames(train=("./photos/", "photos/", "BSDS500"), test=("a/../b//c",))
    assert names.train == ("./photos", "./photos", "BSDS500")
    assert names.test == ("b/c",)
    text = TINY.replace('colour = { train = ["skimage-train"]', 'colour = { train = ["./photos"]')
    (tmp_path / "tiny.toml").write_text(text)
    found = loading.load_suite(str(tmp_path / "tiny.toml")).data.embedded.colour
    assert found is not None
    assert found.train == (f"{tmp_path}/photos",)
    assert found.test == ("skimage-test",)


def test_scores_of_two_folders_of_one_name_are_kept_apart() -> None:
    run = RunFolder(Path("run"))
    files = {run.evaluation_path(name, 25, "awgn8.v1").name for name in ("./a/b", "./a_b", "./c/b", "b")}
    assert len(files) == 4
    assert all(file.lstrip("a_").startswith("b") and "/" not in file for file in files)
    assert "b-25-awgn8.v1.json" in files
