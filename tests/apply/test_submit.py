"""Submissions to the servers of SIDD and DND: what the servers read is what the network made of every region."""

from __future__ import annotations

import base64
import csv
import io
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat

from kitbench.apply.submit import denoiser, submission
from kitbench.data.cards import Card, card
from kitbench.errors import InputError, RunError
from tests.conftest import run_kitbench

BOXES: list[list[tuple[int, ...]]] = [[(1, 3, 12, 18), (9, 5, 20, 24)], [(4, 1, 15, 20), (2, 2, 9, 9)]]
"""As MATLAB has them: top, left, bottom, right from 1, the ends included."""


def brighter(image: np.ndarray) -> np.ndarray:
    assert image.dtype == np.float32
    assert 0 <= image.min() <= image.max() <= 1
    return image + np.float32(0.25)


def send(chosen: Card, folder: Path, out: Path) -> None:
    submission(chosen, folder, out)(brighter, lambda done, total: None)


def sidd(folder: Path, shape: tuple[int, ...] = (2, 3, 16, 16, 3)) -> np.ndarray:
    folder.mkdir(parents=True)
    noisy = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    savemat(folder / "BenchmarkNoisyBlocksSrgb.mat", {"BenchmarkNoisyBlocksSrgb": noisy})
    return noisy


def dnd(folder: Path, boxes_of: list[list[tuple[int, ...]]] = BOXES) -> list[np.ndarray]:
    (folder / "images_srgb").mkdir(parents=True)
    photos = [np.random.default_rng(n).random((20, 24, 3), dtype=np.float32) for n in range(len(boxes_of))]
    for number, photo in enumerate(photos):
        with h5py.File(folder / "images_srgb" / f"{number + 1:04d}.mat", "w", userblock_size=512) as file:
            file["InoisySRGB"] = photo.T
    with h5py.File(folder / "info.mat", "w", userblock_size=512) as file:
        cells = file.create_dataset("info/boundingboxes", (1, len(boxes_of)), dtype=h5py.ref_dtype)
        for number, boxes in enumerate(boxes_of):
            cell = file.create_dataset(f"#refs#/{number}", data=np.array(boxes, float).T)
            cells[0, number] = cell.ref
    return photos


def test_sidd_gets_every_block_in_order(tmp_path: Path) -> None:
    noisy = sidd(tmp_path / "SIDD")
    small = card("SIDD-benchmark").model_copy(update={"blocks": noisy.shape})
    send(small, tmp_path / "SIDD", tmp_path / "SubmitSrgb.csv")
    csv.field_size_limit(1 << 20)
    with (tmp_path / "SubmitSrgb.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ID"] for row in rows] == [str(n) for n in range(6)]
    for row, block in zip(rows, noisy.reshape(6, 16, 16, 3), strict=True):
        sent = np.frombuffer(base64.b64decode(row["BLOCK"]), np.uint8).reshape(16, 16, 3)
        assert np.array_equal(sent, np.rint(np.clip(block.astype(np.float32) / 255 + np.float32(0.25), 0, 1) * 255))


def test_dnd_gets_every_region_of_every_photograph(tmp_path: Path) -> None:
    photos = dnd(tmp_path / "DND")
    small = card("DND").model_copy(update={"count": 2})
    send(small, tmp_path / "DND", tmp_path / "dnd.zip")
    with zipfile.ZipFile(tmp_path / "dnd.zip") as archive:
        assert archive.namelist() == ["0001.mat", "0002.mat"]
        for name, photo, boxes in zip(archive.namelist(), photos, BOXES, strict=True):
            found = loadmat(io.BytesIO(archive.read(name)))
            assert (found["israw"].item(), found["eval_version"].item()) == (0, "1.0")
            regions = found["Idenoised"].ravel()
            for region, (top, left, bottom, right) in zip(regions, boxes, strict=True):
                assert region.dtype == np.float32
                assert np.array_equal(
                    region, np.clip(photo[top - 1 : bottom, left - 1 : right] + np.float32(0.25), 0, 1)
                )
    first = (tmp_path / "dnd.zip").read_bytes()
    send(small, tmp_path / "DND", tmp_path / "again.zip")
    assert len((tmp_path / "again.zip").read_bytes()) == len(first)


def test_what_cannot_be_submitted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Rain100L has no server.*sets with one: SIDD-benchmark, DND"):
        send(card("Rain100L"), tmp_path, tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"takes a \.csv file; give --out FILE\.csv"):
        send(card("SIDD-benchmark"), tmp_path, tmp_path / "out.mat")
    dnd(tmp_path / "DND")
    small = card("DND").model_copy(update={"count": 2})
    outside = small.model_copy(update={"count": 1})
    dnd(tmp_path / "outside", [[(1, 1, 12, 12), (10, 1, 21, 24)]])
    with pytest.raises(InputError, match=r"0001.mat lacks region 2 that info.mat states; restore the set"):
        send(outside, tmp_path / "outside", tmp_path / "out.zip")
    (tmp_path / "DND" / "info.mat").write_bytes(b"nothing")
    with pytest.raises(InputError, match="does not hold the regions of DND"):
        send(small, tmp_path / "DND", tmp_path / "out.zip")
    assert not (tmp_path / "out.zip").exists()


def test_blocks_of_another_shape_are_not_the_set(tmp_path: Path) -> None:
    sidd(tmp_path / "SIDD", (40, 32, 3, 2, 3))
    with pytest.raises(InputError, match=r"an array of 40 x 32 x 3 x 2 x 3, expected 40 x 32 x 256 x 256 x 3; restore"):
        send(card("SIDD-benchmark"), tmp_path / "SIDD", tmp_path / "SubmitSrgb.csv")
    assert not (tmp_path / "SubmitSrgb.csv").exists()
    done = run_kitbench(tmp_path, "data", "check", "SIDD-benchmark", "--data", str(tmp_path), code=1)
    assert "SIDD-benchmark: 1 fault in" in done.stdout
    assert "an array of 40 x 32 x 3 x 2 x 3, expected" in done.stdout


def test_a_trained_run_is_submitted_from_the_command_line(tmp_path: Path, tiny_runs: Path) -> None:
    dnd(tmp_path / "DND", [[(1, 1, 18, 20)]] * 50)
    run = next(tiny_runs.glob("*colour*-kit-s0-*"), None) or next(tiny_runs.glob("*-kit-s0-*"))
    arguments = ["submit", "DND", "--run", str(run), "--data", str(tmp_path), "--device", "cpu"]
    done = run_kitbench(tmp_path, *arguments, "--out", "dnd.zip")
    assert "wrote dnd.zip" in done.stdout
    with zipfile.ZipFile(tmp_path / "dnd.zip") as archive:
        regions = loadmat(io.BytesIO(archive.read("0050.mat")))["Idenoised"].ravel()
    assert [region.shape for region in regions] == [(18, 20, 3)]
    refused = run_kitbench(tmp_path, *arguments, "--out", "other.csv", code=2)
    assert refused.stderr.startswith("kitbench: The server of DND takes a .zip file")  # before a bar is drawn
    arguments[1] = "SIDD-benchmark"
    assert "is not in" in run_kitbench(tmp_path, *arguments, "--out", "sidd.csv", code=2).stderr


def test_values_that_are_not_finite_are_not_submitted() -> None:
    class Empty(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 0

    with pytest.raises(RunError, match="12 of 12 values that are NaN or infinite"):
        denoiser(Empty(), torch.device("cpu"))(np.ones((2, 2, 3), np.float32))  # type: ignore[arg-type]
