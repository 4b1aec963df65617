"""Pictures of one's own: every depth, channel count and size; tiles without seams."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from kitbench.apply import restore, trained
from kitbench.apply.folders import Restoration, pictures_named, restore_all, targets_of
from kitbench.apply.picture import Picture
from kitbench.cli.main import cli
from kitbench.errors import InputError, Interrupted, RunError
from kitbench.scoring.tiles import starts
from kitbench.store.folder import RunFolder
from tests.conftest import run_kitbench

CPU = torch.device("cpu")


def run_of(tiny_runs: Path, method: str) -> RunFolder:
    return RunFolder(next(tiny_runs.glob(f"*-{method}-s0-*")))


def invoke(folder: Path, code: int, *arguments: str) -> str:
    """What a command with this exit code says, in this process: a process of its own takes a second to start."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == code, done.output
    return done.output


def refused(folder: Path, *arguments: str) -> str:
    return invoke(folder, 2, *arguments)


def photograph(height: int, width: int, channels: int, dtype: type = np.uint8) -> np.ndarray:
    """A smooth picture with an edge and some noise."""
    y, x = np.mgrid[:height, :width] / 40
    image = 0.5 + 0.3 * np.sin(x[..., None] + np.arange(channels)) * np.cos(y[..., None]) + 0.1 * (x > y)[..., None]
    image += 0.05 * np.random.default_rng(0).standard_normal(image.shape)
    return np.rint(np.clip(image, 0, 1) * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize(
    ("suffix", "channels", "dtype", "size"),
    [
        (".png", 3, np.uint8, (65, 47)),
        (".png", 1, np.uint8, (33, 90)),
        (".png", 4, np.uint8, (40, 40)),
        (".png", 3, np.uint16, (41, 64)),
        (".png", 4, np.uint16, (30, 31)),
        (".tiff", 1, np.uint16, (50, 20)),
        (".tif", 3, np.uint8, (20, 50)),
        (".jpg", 3, np.uint8, (64, 64)),
        (".jpeg", 1, np.uint8, (48, 35)),
        (".webp", 3, np.uint8, (40, 44)),
        (".bmp", 3, np.uint8, (1, 1)),
        (".png", 3, np.uint8, (1, 200)),
    ],
)
def test_every_format_keeps_its_size_depth_channels_and_alpha(
    tiny_runs, tmp_path, suffix, channels, dtype, size
) -> None:
    path = tmp_path / f"mine{suffix}"
    image = photograph(*size, channels, dtype)
    cv2.imwrite(str(path), image)
    model, _ = trained.load_trained(run_of(tiny_runs, "kit"), None, CPU)
    [written] = targets_of([path], None, overwrite=False)
    restore_all(Restoration(model, CPU, None, False), [path], [written], Console(quiet=True))
    assert written == tmp_path / f"mine-restored{suffix}"
    got = cv2.imread(str(written), cv2.IMREAD_UNCHANGED)
    got = got[..., None] if got.ndim == 2 else got
    assert (got.shape, got.dtype) == (image.shape, image.dtype)
    scale = np.iinfo(dtype).max
    assert np.abs(got[..., :3] / scale - image[..., :3] / scale).mean() < 0.1  # the same picture, channels in order
    if channels == 4:
        np.testing.assert_array_equal(got[..., 3], image[..., 3])


def test_sixteen_bits_are_not_cut_to_eight(tiny_runs, tmp_path) -> None:
    model, _ = trained.load_trained(run_of(tiny_runs, "conv"), None, CPU)
    deep = restore.restore_picture(model, Picture(photograph(40, 40, 3, np.uint16), None), CPU, None)
    assert len(np.unique(deep.pixels % 257)) > 100


def test_tiles_of_a_local_network_equal_the_whole_picture(tiny_runs) -> None:
    model, _ = trained.load_trained(run_of(tiny_runs, "conv"), None, CPU)
    picture = Picture(photograph(210, 170, 3), None)
    whole, tiled = (restore.restore_picture(model, picture, CPU, tile).pixels.astype(int) for tile in (0, 96))
    assert np.abs(whole - tiled).max() <= 1  # of 255 levels


@pytest.mark.parametrize("method", ["kit", "conv"])
def test_no_seam_is_seen_where_tiles_meet(tiny_runs, method) -> None:
    """The jump from row to row, beyond that of the input, is no larger where tiles begin or end than elsewhere."""
    model, _ = trained.load_trained(run_of(tiny_runs, method), None, CPU)
    picture = Picture(photograph(300, 100, 3), None)
    change = restore.restore_picture(model, picture, CPU, 96).pixels.astype(float) - picture.pixels
    jumps = np.abs(np.diff(change, axis=0)).mean((1, 2))
    seams = [row + offset for row in starts(300, 96, 24)[1:] for offset in (-1, 23)]
    others = np.delete(jumps, seams)
    assert jumps[seams].mean() < others.mean() + 2 * others.std() / np.sqrt(len(seams))


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_and_colour_pass_through_a_network_of_the_other_kind(tiny_runs, channels) -> None:
    class Brighter(torch.nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(count, 1, 1)

        def forward(self, x):
            assert x.shape[1] == self.head.in_channels
            return x + 10 / 255

    picture = Picture(photograph(20, 30, channels) // 2, None)
    for count in (1, 3):
        got = restore.restore_picture(Brighter(count), picture, CPU, None)
        np.testing.assert_array_equal(got.pixels, picture.pixels + 10)


def test_the_command_restores_beside_the_input_and_refuses_to_overwrite(tiny_runs, tmp_path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), photograph(40, 40, 3))
    for folder in ("empty", "other", "phone"):
        (tmp_path / folder).mkdir()
    (tmp_path / "phone" / "b.heic").touch()
    cv2.imwrite(str(tmp_path / "other" / "a.png"), photograph(40, 40, 3))
    os.mkfifo(tmp_path / "pipe")
    run = str(run_of(tiny_runs, "kit").path)
    assert "wrote a-restored.png" in run_kitbench(tmp_path, "restore", "a.png", "--run", run).stdout
    for arguments, sentence in (
        (["a.png", "--run", run], "a-restored.png exists"),
        (["missing.png", "--run", run], "missing.png does not exist; give pictures, folders or wildcards"),
        (["*.jpg", "--run", run], "No picture matches *.jpg"),
        (["empty", "--run", run], "Folder empty has no pictures; put some there"),
        (
            ["phone", "--run", run],
            "Folder phone has no pictures of a format that is read (found b.heic); put some there",
        ),
        (["pipe", "--run", run], "pipe is neither a file nor a folder; give pictures"),
        (["a.png", "--run", str(tiny_runs)], "give one"),
        (["a.png", "--overwrite", "--run", str(next(tiny_runs.glob("*input*")))], "training-free"),
        (["a.png", "a.png", "--run", run], "a-restored.png exists"),  # named twice, it is one
        (["a.png", "other/a.png", "--run", run, "--out", "o"], "Two pictures would be written to o/a-restored.png"),
    ):
        assert sentence in refused(tmp_path, "restore", *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-restored.png", "a.png", "empty", "other", "phone", "pipe"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_broken_picture_is_named_at_the_end_and_all_others_are_written(tiny_runs, tmp_path) -> None:
    for name in ("a.png", "c.jpg", "d.PNG"):
        cv2.imwrite(str(tmp_path / name), photograph(40, 40, 3))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:100])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    run = str(run_of(tiny_runs, "conv").path)
    said = invoke(tmp_path, 3, "restore", ".", "--run", run, "--out", "out")
    assert names(tmp_path / "out") == {"a-restored.png", "c-restored.jpg", "d-restored.PNG"}
    last = said.splitlines()[-1]
    assert "left out: notes.txt, not PNG, JPEG, TIFF, WebP or BMP" in said
    assert last.startswith("kitbench: 2 of 5 pictures could not be restored: b.png is not a readable picture")
    assert "; text.png is not a readable picture" in last
    assert not (tmp_path / "a-restored.png").exists()


def test_a_network_that_fails_on_one_picture_does_not_stop_the_others(tmp_path) -> None:
    class Fails(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(3, 1, 1)

        def forward(self, x):
            if x.shape[-1] == 50:
                raise MemoryError("no room for 50 columns")
            return x

    paths = [tmp_path / f"{width}.png" for width in (40, 50, 60)]
    for path in paths:
        cv2.imwrite(str(path), photograph(20, int(path.stem), 3))
    targets = targets_of(paths, None, overwrite=False)
    with pytest.raises(RunError, match=r"1 of 3 pictures .*50.png: MemoryError: no room for 50 columns"):
        restore_all(Restoration(Fails(), CPU, None, False), paths, targets, Console(quiet=True))
    assert [target.exists() for target in targets] == [True, False, True]


def test_what_no_pixel_can_be_is_not_written(tmp_path) -> None:
    """Values that are not finite; 16 bits in a file that bears the suffix of a format of 8."""

    class Empty(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return x / 0 if x.shape[-1] == 50 else x

    paths = [tmp_path / f"{width}.png" for width in (40, 50)] + [tmp_path / "deep.jpg"]
    for path in paths[:2]:
        cv2.imwrite(str(path), photograph(20, int(path.stem), 3))
    cv2.imwrite(str(tmp_path / "deep.png"), photograph(20, 20, 3, np.uint16))
    (tmp_path / "deep.png").rename(paths[2])
    targets = targets_of(paths, None, overwrite=False)
    with pytest.raises(RunError) as failed:
        restore_all(Restoration(Empty(), CPU, None, False), paths, targets, Console(quiet=True))
    assert "50.png: the network returned 3000 of 3000 values that are NaN or infinite" in str(failed.value)
    assert "deep-restored.jpg cannot hold the 16 bits of the picture" in str(failed.value)
    assert [target.exists() for target in targets] == [True, False, False]


def test_ctrl_c_keeps_what_is_restored_and_says_how_much_that_is(tmp_path) -> None:
    class Stops(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(3, 1, 1)

        def forward(self, x):
            if x.shape[-1] == 50:
                raise KeyboardInterrupt
            return x

    paths = [tmp_path / f"{width}.png" for width in (40, 50, 60)]
    for path in paths:
        cv2.imwrite(str(path), photograph(20, int(path.stem), 3))
    targets = targets_of(paths, None, overwrite=False)
    with pytest.raises(Interrupted, match="stopped; 1 of 3 pictures are restored and written"):
        restore_all(Restoration(Stops(), CPU, None, False), paths, targets, Console(quiet=True))
    assert [target.exists() for target in targets] == [True, False, False]


def test_folders_and_wildcards_name_the_pictures_in_them_but_not_earlier_results(tmp_path) -> None:
    for name in ("b.png", "a.JPG", "a-restored.JPG", "b-side-by-side.png", "deeper/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), photograph(20, 20, 3))
    (tmp_path / "notes.txt").touch()
    for argument, found, left_out in (
        ("", ["a.JPG", "b.png"], 2),
        ("*", ["a.JPG", "b.png"], 2),
        ("?.png", ["b.png"], 0),
        ("**/*.png", ["b.png", "deeper/c.png"], 1),
        ("a-restored.JPG", ["a-restored.JPG"], 0),  # named itself, it is a picture like any other
    ):
        others = [tmp_path / "notes.txt"] if argument in ("", "*") else []
        assert pictures_named([tmp_path / argument]) == ([tmp_path / name for name in found], left_out, others)
    (tmp_path / "moving.gif").touch()  # read neither alone nor in a folder
    with pytest.raises(InputError, match=r"moving\.gif is not of a format that is read; give one that ends in \.bmp"):
        pictures_named([tmp_path / "moving.gif"])
    assert tmp_path / "moving.gif" in pictures_named([tmp_path])[2]


def test_side_by_side_shows_the_input_left_and_the_result_right(tiny_runs, tmp_path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), photograph(30, 40, 4))
    run = str(run_of(tiny_runs, "conv").path)
    said = invoke(tmp_path, 0, "restore", "*.png", "--run", run, "--side-by-side")
    assert "wrote a-restored.png" in said
    assert "wrote a-side-by-side.png" in said
    both, one, result = (
        cv2.imread(str(tmp_path / f"a{end}.png"), cv2.IMREAD_UNCHANGED) for end in ("-side-by-side", "", "-restored")
    )
    assert both.shape == (30, 40 + restore.GAP + 40, 4)
    np.testing.assert_array_equal(both[:, :40], one)
    np.testing.assert_array_equal(both[:, -40:], result)
    assert (both[:, 40:-40] == 255).all()
    (tmp_path / "a-restored.png").unlink()
    assert "a-side-by-side.png exists" in refused(tmp_path, "restore", "a.png", "--run", run, "--side-by-side")


@pytest.mark.parametrize("tile", [0, 32, 96, None])
@pytest.mark.parametrize(("model_channels", "channels"), [(1, 3), (3, 1), (3, 3), (1, 1)])
def test_progress_counts_every_call_of_the_network(monkeypatch, tile, model_channels, channels) -> None:
    monkeypatch.setattr(restore, "WHOLE", 100 * 100)

    class Same(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(model_channels, 1, 1)
            self.called = 0

        def forward(self, x):
            self.called += 1
            return x

    model, ticks = Same(), []
    for height, width in ((130, 90), (20, 30), (600, 520)):
        model.called = 0
        ticks.clear()
        restore.restore_picture(
            model, Picture(photograph(height, width, channels), None), CPU, tile, lambda: ticks.append(1)
        )
        assert len(ticks) == model.called == restore.calls(model, (height, width, channels), tile)


def test_a_large_picture_shows_at_once_how_far_it_is_and_then_how_long_it_takes(tmp_path, monkeypatch) -> None:
    """Two pictures of nine tiles each, of ten seconds each by the clock that the progress reads, and of a size that
    Pillow would refuse.
    """
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    now = [0.0]

    class Slow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(3, 1, 1)

        def forward(self, x):
            now[0] += 10
            return x

    monkeypatch.setattr("kitbench.system.progress.time.monotonic", lambda: now[0])
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        cv2.imwrite(str(path), photograph(80, 80, 3))
    console = Console(record=True, width=140, file=io.StringIO())
    restore_all(Restoration(Slow(), CPU, 32, False), paths, targets_of(paths, None, False), console)
    lines = [line for line in console.export_text().splitlines() if line.startswith("restore")]
    assert lines[0] == "restore  0/18  a.png"
    assert lines[1] == "restore  2/18  a.png  2 min 40 s left"
    assert lines[-1] == "restore  18/18  b.png"


def test_weights_that_are_not_those_of_the_run_are_refused(tiny_runs, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_of(tiny_runs, "kit").path, copy)
    whole = (copy / "weights.safetensors").read_bytes()
    (copy / "weights.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="damaged: it does not match the checksum"):
        trained.load_trained(RunFolder(copy), None, CPU)
    (copy / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read"):
        trained.load_trained(RunFolder(copy), None, CPU)
    (copy / "weights.safetensors").unlink()
    with pytest.raises(InputError, match="is stored without its weights"):
        trained.load_trained(RunFolder(copy), None, CPU)
