"""What the header of a picture file says before its pixels are decoded: depth, number of pictures, EXIF orientation."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from PIL.ExifTags import Base

from kitbench.errors import InputError

TIFF = (".tif", ".tiff")
ANIMATED = (".png", ".webp")
"""Of the files whose further frames are pictures; in a JPEG of a telephone they are previews and depth maps."""
UNREADABLE = (OSError, struct.error, ValueError, SyntaxError)
"""What Pillow and tifffile raise at a damaged file."""
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}
"""What shows [H, W, C] upright, by its EXIF orientation."""
TRANSPOSED = (5, 6, 7, 8)
"""Orientations that exchange height and width."""


_limit_lifted = threading.RLock()
"""Held while Pillow's limit, which all threads share, is lifted."""


@contextmanager
def picture_header(file: Path | io.BytesIO) -> Iterator[Image.Image]:
    """A picture whose pixels are not decoded. Its size is no reason to refuse it."""
    with _limit_lifted:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata
                with Image.open(file) as header:
                    yield header
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def orientation(path: Path) -> int:
    """The EXIF orientation that the decoded pixels of a picture still have, a key of `TURNS`.

    1 where it has none or cannot be read, and for a TIFF, which Pillow and OpenCV turn upright as they decode it.
    """
    with suppress(*UNREADABLE), picture_header(path) as header:
        # Without EXIF in a PNG's header, Pillow would decode all pixels to look for it behind them.
        found = header.getexif().get(Base.Orientation, 1) if "exif" in header.info else 1
        return found if header.format != "TIFF" and found in TURNS else 1
    return 1


def require_one_picture(path: Path) -> None:
    """Raises InputError for a file of several pictures, of which the first would be taken without a word."""
    frames, suffix = 1, path.suffix.lower()
    with suppress(*UNREADABLE):  # what is wrong with it is said where it is read
        if suffix in TIFF:
            with tifffile.TiffFile(path) as file:
                frames = sum(not page.aspage().is_reduced for page in file.pages)
        elif suffix in ANIMATED:
            with picture_header(path) as header:
                frames = getattr(header, "n_frames", 1)
    if frames > 1:
        raise InputError(f"{path} holds {frames} pictures (pages or frames); give each as a file of its own.")


def require_plain(path: Path) -> None:
    """Raises InputError for a file of several pictures, and for one of 16 bits, of whose colours Pillow reads the
    upper 8 without a word.
    """
    require_one_picture(path)
    deep = False
    with suppress(*UNREADABLE), picture_header(path) as header:
        deep = ";16" in f"{header.mode} {getattr(header, 'tile', '')}"
    if deep:
        raise InputError(f"{path} has 16 bits a channel, expected 8-bit RGB or gray; convert the file.")
