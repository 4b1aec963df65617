"""Decoding an image file, or the images inside a MATLAB .mat file, to uint8 [H, W, 3] or [H, W, 1].

Independent of data sets. Raises InputError for anything but 8-bit RGB or gray images.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from kitbench.errors import InputError

GRAY_WEIGHTS = np.array([0.298936021293775, 0.587043074451121, 0.114020904255103])
"""MATLAB's rgb2gray (the inverse of the NTSC matrix), by which BSD68 was made from CBSD68: every pixel is equal."""


def decode(path: Path) -> np.ndarray:
    """One image file as uint8 [H, W, 3] (RGB) or [H, W, 1] (gray). Raises InputError for anything else."""
    try:
        with Image.open(path) as image:
            mode, deep = image.mode, ";16" in str(image.tile)
            pixels = np.asarray(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not a readable image ({error}); replace the file.") from error
    if mode not in ("RGB", "L"):
        raise InputError(f"{path} has pixel format {mode}, expected 8-bit RGB or gray; replace the file.")
    if deep:  # Pillow reads the upper 8 bits of 16-bit RGB without a word
        raise InputError(f"{path} has 16 bits a channel, expected 8-bit RGB or gray; convert the file.")
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[..., None])


def blocks_of_mat(path: Path) -> np.ndarray:
    """The images of a .mat file whose variable has the file's name: uint8 [..., H, W, C], as MATLAB indexes them.

    Both formats are read: up to MATLAB 7.2 (scipy) and 7.3, which is HDF5 with reversed axes (h5py). Raises
    InputError for an unreadable file, a missing variable, and pixels that are not 8-bit or not [..., H, W, 1 or 3].
    """
    return _blocks(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _blocks(path: Path, _changed: int) -> np.ndarray:
    array = variable(path, path.stem)
    if array.dtype != np.uint8:
        raise InputError(f"{path} holds {path.stem} as {array.dtype}, expected 8-bit pixels (uint8); replace the file.")
    if array.ndim < 4 or array.shape[-1] not in (1, 3):
        shape = " x ".join(map(str, array.shape))
        raise InputError(f"{path} holds {path.stem} of {shape}, expected images x height x width x 1 or 3 channels.")
    return np.ascontiguousarray(array)  # in MATLAB's order the rows of a crop are not contiguous


def shape_of_blocks(path: Path) -> tuple[int, ...]:
    """The shape of `blocks_of_mat(path)`, from the file's header alone. Raises InputError as that does."""
    import h5py
    from scipy.io import whosmat

    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                shape = file[path.stem].shape[::-1]
        else:
            shape = next(shape for name, shape, _ in whosmat(path) if name == path.stem)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration, NotImplementedError):
        shape = ()
    return tuple(shape) if len(shape) >= 4 else blocks_of_mat(path).shape  # raises, saying what is wrong


def variable(path: Path, name: str) -> np.ndarray:
    """One array of a .mat file, axes in MATLAB's order. Raises InputError for an unreadable file or a missing name."""
    import h5py
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                found = {key: np.asarray(value).T for key, value in file.items() if key == name}
                names = list(file)
        else:
            found = loadmat(path)
            names = [key for key in found if not key.startswith("__")]
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise InputError(f"{path} is not a readable .mat file ({error}); replace the file.") from error
    if name not in found:
        raise InputError(
            f"{path} has no variable {name!r}, it contains {', '.join(names) or 'none'}; replace the file."
        )
    return np.asarray(found[name])


def kernels(path: Path) -> list[np.ndarray]:
    """The blur kernels of Levin09's kernels.mat: float64 [K, K], K odd, of sum 1, for correlation (cv2.filter2D).

    MATLAB 7.3 stores a cell array as references to transposed matrices. Raises InputError for another file.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return [np.asarray(file[cell]).T for cell in np.asarray(file["kernels"]).ravel()]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not hold the cell array 'kernels' in MATLAB's 7.3 format ({error}); replace the file."
        ) from error


def to_gray(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [H, W, 1] by MATLAB's rgb2gray."""
    rounded: np.ndarray = np.floor(pixels @ GRAY_WEIGHTS + 0.5).astype(np.uint8)
    return rounded[..., None]
