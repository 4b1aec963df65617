"""`kitbench submit`: restore a set whose targets are not public, and write the file to submit to its server.

SIDD-benchmark   CSV, one line for each block: ID from 0, BLOCK the base64 of its bytes, uint8 [256, 256, 3] (the sample
                 program of kaggle.com/competitions/sidd-benchmark-srgb-psnr)
DND              ZIP of NNNN.mat, one for each photograph: Idenoised, a cell of the 20 regions, float32 [H, W, 3] in
                 [0, 1]; israw; eval_version (bundle_submissions_srgb of the authors' kit)
"""

from __future__ import annotations

import base64
import csv
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kitbench.apply.restore import require_finite
from kitbench.data.cards import Card
from kitbench.data.images import blocks_of_mat
from kitbench.data.locate import files_of_set
from kitbench.errors import InputError
from kitbench.model.backbone import UNet
from kitbench.store.files import replace_with

Denoise = Callable[[np.ndarray], np.ndarray]
"""One picture: float32 [H, W, 3] in [0, 1] to the same, not clipped."""
Report = Callable[[int, int], None]
"""Called with the number of pictures done, and of all pictures."""


def denoiser(model: UNet, device: torch.device) -> Denoise:
    """A trained network as a function of one picture, which raises RunError where a value is not finite."""

    def denoise(image: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(device)
        with torch.inference_mode():
            restored: torch.Tensor = model(x)[0]
            require_finite(restored)
            return restored.float().permute(1, 2, 0).cpu().numpy()

    return denoise


def submission(card: Card, folder: Path, out: Path) -> Callable[[Denoise, Report], None]:
    """What restores a set and writes the file `out` for its server.

    Raises InputError for a set without a server, another file name suffix, and a folder that is not the set.
    """
    if card.name not in WRITERS:
        raise InputError(
            f"Data set {card.name} has no server, kitbench run scores it; sets with one: {', '.join(WRITERS)}."
        )
    suffix, writer = WRITERS[card.name]
    if out.suffix != suffix:
        raise InputError(
            f"The server of {card.name} takes a {suffix} file; give --out FILE{suffix}, found {out.name!r}."
        )
    paths = [entry.input for entry in files_of_set(card, folder) if entry.input is not None]
    return lambda denoise, report: replace_with(out, lambda aside: writer(paths, denoise, aside, report))


def _sidd(paths: list[Path], denoise: Denoise, out: Path, report: Report) -> None:
    [path] = paths
    noisy = blocks_of_mat(path)
    noisy = noisy.reshape(-1, *noisy.shape[-3:])
    with out.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["ID", "BLOCK"])
        for number, block in enumerate(noisy):
            restored = np.clip(denoise(block.astype(np.float32) / 255), 0, 1)
            pixels = np.rint(restored * 255).astype(np.uint8)
            lines.writerow([number, base64.b64encode(pixels.tobytes()).decode()])
            report(number + 1, len(noisy))


def _dnd(paths: list[Path], denoise: Denoise, out: Path, report: Report) -> None:
    from scipy.io import savemat

    places = _regions(paths[0].parent.parent / "info.mat", len(paths))
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for number, path in enumerate(paths):
            noisy = _photograph(path)
            regions = np.empty(len(places[number]), object)
            for k, (top, left, bottom, right) in enumerate(places[number]):
                if not (0 <= top < bottom <= noisy.shape[0] and 0 <= left < right <= noisy.shape[1]):
                    raise InputError(f"{path} lacks region {k + 1} that info.mat states; restore the set.")
                regions[k] = np.clip(denoise(noisy[top:bottom, left:right]), 0, 1).astype(np.float32)
            buffer = io.BytesIO()
            contents = {"Idenoised": regions, "israw": False, "eval_version": "1.0"}
            savemat(buffer, contents, do_compression=True)  # type: ignore[arg-type]  # files will do, says scipy
            archive.writestr(zipfile.ZipInfo(path.name), buffer.getvalue())
            report(number + 1, len(paths))


def _photograph(path: Path) -> np.ndarray:
    """InoisySRGB of an image of DND, float32 [H, W, 3]. MATLAB 7.3 stores the axes reversed."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return np.ascontiguousarray(np.asarray(file["InoisySRGB"], np.float32).T)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} is no photograph of DND ({error}); restore the set.") from error


def _regions(info: Path, count: int) -> list[list[tuple[int, int, int, int]]]:
    """(top, left, bottom, right) of the regions of every photograph, from 0, the ends not included."""
    import h5py

    try:
        with h5py.File(info, "r") as file:
            cells = np.asarray(file["info"]["boundingboxes"]).ravel()
            boxes = [np.asarray(file[cell]).T.astype(int).tolist() for cell in cells]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{info} does not hold the regions of DND ({error}); restore the set.") from error
    if len(boxes) != count:
        raise InputError(f"{info} holds the regions of {len(boxes)} photographs, expected {count}; restore the set.")
    return [[(top - 1, left - 1, bottom, right) for top, left, bottom, right in of_photo] for of_photo in boxes]


WRITERS: dict[str, tuple[str, Callable[[list[Path], Denoise, Path, Report], None]]] = {
    "SIDD-benchmark": (".csv", _sidd),
    "DND": (".zip", _dnd),
}
