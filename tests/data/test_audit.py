"""`data check` names every missing, extra and altered file of a set, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kitbench.cli.main import cli
from kitbench.data.audit import audit
from kitbench.data.cards import Card, card, cards
from kitbench.data.layout import unnumbered
from kitbench.data.locate import locate
from kitbench.data.photograph import read_set
from kitbench.data.pixels import pixel_sha256
from kitbench.errors import InputError
from tests.data.test_cards import image, mat_file, own_card, own_pairs, write

SUMS = {
    f"{half}/{n}": pixel_sha256(image(100 * (half == "input") + n)) for n in range(3) for half in ("input", "target")
}


def checked() -> Card:
    return own_card(3, checksum="pixels", sha256=SUMS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own_pairs(tmp_path, 3)
    return tmp_path / "own"


def test_a_set_as_its_card_says_has_no_faults(folder: Path) -> None:
    assert audit(checked(), folder) == audit(own_card(3), folder) == []


def test_every_kind_of_fault_is_named(folder: Path) -> None:
    (folder / "input" / "0.png").unlink()
    write(folder / "target" / "1.png", image(55))
    (folder / "target" / "2.png").write_bytes(b"no image")
    write(folder / "input" / "9.png", image(9))
    lines = audit(checked(), folder)
    assert [line.split(":")[0] for line in lines] == ["altered", "altered", "extra", "missing"]
    text = "\n".join(lines)
    assert f"target/1, pixels checksum {pixel_sha256(image(55))}, expected {SUMS['target/1']}" in text
    assert "2.png is not a readable image" in text
    assert "extra: input/9" in text
    assert "missing: input/0" in text


def test_half_a_pair_is_named_where_the_card_names_no_files(folder: Path) -> None:
    (folder / "input" / "0.png").unlink()
    write(folder / "input" / "9.png", image(9))
    assert audit(own_card(3), folder) == [
        "missing: the input of target/0.png, as input/*.png",
        "missing: the target of input/9.png, as target/*.png",
    ]


def test_a_cause_that_concerns_every_file_takes_one_line(folder: Path) -> None:
    """Another set in the folder: under the card's names, under others, in gray, and of another size."""
    for place in ("input", "target"):
        for number in range(3):
            write(folder / place / f"{number}.png", image(50 + number))
    [line] = audit(checked(), folder)
    assert line.startswith("another set: no file has a checksum of the card; restore the set as its authors publish it")
    for place in ("input", "target"):
        for number in range(3):
            (folder / place / f"{number}.png").rename(folder / place / f"other{number}.png")
    assert audit(checked(), folder) == [line]
    [line] = audit(own_card(3, size=[25, 16]), folder)
    assert "is 24 x 16 px, expected 25 x 16" in line
    assert line.endswith("(and so on for all 3)")
    [line] = audit(own_card(3, colour=False), folder)
    assert line.endswith("is colour, expected gray; replace the file (and so on for all 6)")


def test_two_causes_are_named_where_they_are_all_files(tmp_path: Path) -> None:
    write(tmp_path / "a.png", image(0))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    write(tmp_path / "b.png", image(1, colour=False))
    lines = audit(own_card(2, pairs=[], layouts=[["*.png"]]), tmp_path)
    assert [line.partition("/b.png ")[2] for line in lines] == ["", "is gray, expected colour; replace the file."]
    assert "a.png is not a readable image" in lines[0]


def test_whole_kodak_pictures_in_place_of_the_crops_take_one_line(tmp_path: Path) -> None:
    """The set of the issue: 24 pictures of 768 x 512, named otherwise than the crops."""
    for number in range(24):
        shape = (768, 512, 3) if number == 23 else (512, 768, 3)
        write(tmp_path / "Kodak24" / f"picture{number}.png", np.zeros(shape, np.uint8))
    [line] = audit(card("Kodak24"), tmp_path / "Kodak24")
    assert "is 768 x 512 px, expected 500 x 500; the folder contains Kodak24-full" in line
    done = CliRunner().invoke(cli, ["data", "check", "Kodak24", "--data", str(tmp_path)])
    assert done.exit_code == 1
    assert len(done.output.splitlines()) == 2


def test_many_missing_files_take_one_line(tmp_path: Path) -> None:
    write(tmp_path / "DIV2K_train_HR" / "0002.png", image(2))
    [line] = audit(card("DIV2K"), tmp_path / "DIV2K_train_HR")
    assert line == (
        "missing: 799 files: 0001, 0003, 0004, 0005, 0006, 0007, 0008, 0009, 0010, 0011 and 789 more"
    )  # fmt: skip


def test_a_truncated_file_takes_one_line(folder: Path) -> None:
    path = folder / "target" / "2.png"
    path.write_bytes(path.read_bytes()[:-200])
    [line] = audit(checked(), folder)
    assert "2.png is not a readable image" in line


def test_a_renamed_pair_is_still_the_set(folder: Path) -> None:
    for half in ("input", "target"):
        (folder / half / "1.png").rename(folder / half / "one.png")
    assert audit(checked(), folder) == []


def test_without_checksums_number_size_and_format_are_what_can_be_told(folder: Path) -> None:
    [line] = audit(own_card(4), folder)
    assert line.startswith("altered: 3 pairs in")
    write(folder / "input" / "1.png", image(0, 25))
    [line] = audit(own_card(3), folder)
    assert "is 25 x 16 px and its target" in line
    [line] = audit(own_card(3, size=[24, 16]), folder)
    assert "is 25 x 16 px and its target" in line
    [line] = audit(own_card(3, pairs=[{"inputs": ["other/*.png"], "targets": ["no/*.png"]}]), folder)
    assert line == "missing: all of it; expected 3 files as other/*.png + no/*.png"


def test_what_is_missing_from_a_numbered_set_is_named(tmp_path: Path) -> None:
    for number in (1, 3, 4):
        write(tmp_path / "DIV2K_train_HR" / f"{number:04d}.png", image(number))
    five = card("DIV2K").model_copy(update={"count": 5, "numbered": ("0001", "0005")})
    assert audit(five, tmp_path / "DIV2K_train_HR") == ["missing: 0002", "missing: 0005"]
    with pytest.raises(InputError, match=r"3 images in .*expected 5 \(0002, 0005 missing\)"):
        read_set(five, tmp_path, "colour")
    for found in cards().values():
        if found.numbered:
            assert len(unnumbered(found, [])) == found.count


def test_the_blocks_of_a_mat_file_are_checked_too(tmp_path: Path) -> None:
    noisy = np.zeros((2, 3, 8, 8, 3), np.uint8)
    for name in ("ValidationNoisyBlocksSrgb", "ValidationGtBlocksSrgb"):
        mat_file(tmp_path / f"{name}.mat", name, noisy, "5")
    assert audit(card("SIDD-validation").model_copy(update={"size": None, "count": 6}), tmp_path) == []
    lines = audit(card("SIDD-validation").model_copy(update={"count": 6}), tmp_path)
    assert len(lines) == 1
    assert "is 8 x 8 px, expected 256 x 256" in lines[0]
    assert lines[0].endswith("(and so on for all 6)")


@pytest.mark.parametrize("name", ["Rain100L", "CC15", "Levin09", "Set12"])
def test_a_real_set_has_no_faults(name: str, data_root: Path) -> None:
    folder = locate(card(name), data_root)
    if folder is None:
        pytest.skip(f"{name} is not in {data_root}")
    assert audit(card(name), folder) == []


@pytest.mark.parametrize("command", ["check", "list"])
def test_a_data_folder_that_does_not_exist_is_refused(tmp_path: Path, command: str) -> None:
    done = CliRunner().invoke(cli, ["data", command, "--data", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert "none does not exist; give a folder" in done.output
