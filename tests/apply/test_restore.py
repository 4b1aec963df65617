"""Pictures of one's own: every depth, channel count and size; tiles without seams; and what explain draws."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from kitbench.apply import restore, trained
from kitbench.apply.explain import Pixel, choices
from kitbench.apply.restore import Picture
from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.scoring.tiles import starts
from kitbench.store.folder import RunFolder
from tests.conftest import run_kitbench

CPU = torch.device("cpu")


def run_of(tiny_runs: Path, method: str) -> RunFolder:
    return RunFolder(next(tiny_runs.glob(f"*-{method}-s0-*")))


def refused(folder: Path, *arguments: str) -> str:
    """What the command says that gives exit code 2, in this process: a process of its own takes a second to start."""
    with contextlib.chdir(folder):
        done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2, done.output
    return done.output


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
    [written] = restore.targets_of([path], None, overwrite=False)
    restore.restore_file(model, path, written, CPU, None)
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


def test_a_jpeg_is_turned_upright_as_its_exif_says(tmp_path) -> None:
    upright = photograph(40, 60, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(np.rot90(upright)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert restore.read_picture(tmp_path / "turned.jpg").pixels.shape == (40, 60, 3)


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
    (tmp_path / "text.png").write_text("no picture")
    run = str(run_of(tiny_runs, "kit").path)
    assert "wrote a-restored.png" in run_kitbench(tmp_path, "restore", "a.png", "--run", run).stdout
    for arguments, sentence in (
        (["a.png", "--run", run], "a-restored.png exists"),
        (["text.png", "--run", run], "is not a readable picture"),
        (["missing.png", "--run", run], "cannot be read"),
        (["a.png", "--run", str(tiny_runs)], "give one"),
        (["a.png", "--overwrite", "--run", str(next(tiny_runs.glob("*input*")))], "training-free"),
        (["a.png", "a.png", "--run", run], "Two pictures"),
    ):
        assert sentence in refused(tmp_path, "restore", *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-restored.png", "a.png", "text.png"]


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
    with pytest.raises(InputError, match="contains no weights"):
        trained.load_trained(RunFolder(copy), None, CPU)


def test_explain_finds_the_twin_of_a_patch(tiny_runs) -> None:
    """A picture of flat patches, all different but for one pair: each names the other first."""
    model, _ = trained.load_trained(run_of(tiny_runs, "kit"), None, CPU)
    random = np.random.default_rng(1)
    cells = random.integers(30, 220, (8, 8, 3), dtype=np.uint8)
    cells[6, 5] = cells[1, 2]
    picture = Picture(cells.repeat(32, 0).repeat(32, 1), None)
    [one] = [c for c in choices(model, picture, Pixel(2 * 32 + 16, 32 + 16), CPU) if c.name.startswith("bottom")]
    own, *others = one.squares
    assert own == (80, 48, 8)  # the patch of 4 x 4 at half resolution that holds the pixel
    assert len(set(one.squares)) == 4
    twins = {(2, 1), (5, 6)}
    assert all((left // 32, top // 32) in twins for left, top, _ in others)


def test_explain_draws_and_prints_what_was_chosen(tiny_runs, tmp_path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), photograph(60, 80, 3))
    kit, conv = (str(run_of(tiny_runs, method).path) for method in ("kit", "conv"))
    text = run_kitbench(tmp_path, "explain", "a.png", "--run", kit, "--at", "30,20").stdout
    assert re.search(r"^bottom\.0\.attention: 40 x 30 map, 4 x 4 patches: 24,16, ", text, re.MULTILINE)
    with Image.open(tmp_path / "explain.png") as drawn:
        assert drawn.size[0] > 300
    for arguments, sentence in (
        (["--run", conv, "--at", "1,1"], "does not select patches"),
        (["--run", kit, "--at", "80,1"], "outside the picture of 80 x 60"),
        (["--run", kit, "--at", "x"], "--at takes X,Y"),
        (["--run", kit, "--at", "1,1", "--out", "a.gif"], "is not a format to draw in"),
    ):
        assert sentence in refused(tmp_path, "explain", "a.png", *arguments)
