"""Files of pictures of the user: PNG, JPEG, TIFF, WebP and BMP of 8 or 16 bits, gray or colour.

An alpha channel and a colour profile are kept; other metadata are not, and a picture is turned upright.
"""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL.TiffImagePlugin import TiffImageFile

from kitbench.data.headers import TIFF, TURNS, UNREADABLE, orientation, picture_header, require_one_picture
from kitbench.errors import InputError
from kitbench.store.files import replace_with

DEEP = (".png", *TIFF)
"""Of the files that can hold 16 bits."""
JPEG_QUALITY = 95
SPACE = slice(16, 20)
"""Where an ICC profile names its colour space (ICC.1:2022, 7.2.8)."""
EXTRA_SAMPLES, UNASSOCIATED = 338, 2
"""The tag of a TIFF that says what its alpha is, and its value for one that no colour was multiplied by."""
CIELAB = (8, 9, 10)
"""Colour spaces of a TIFF that OpenCV turns into another RGB than they mean: its grays come out yellowish."""
PNG, COLOUR_TYPE, GRAY_WITH_ALPHA = b"\x89PNG\r\n\x1a\n", 25, 4
"""How a PNG begins, the byte that says what its channels are (ISO/IEC 15948, 11.2.2), and its value for two of them."""


@dataclass(frozen=True)
class Picture:
    """A decoded file: uint8 or uint16 [H, W, 1 or 3] in RGB, and what else it has of an alpha channel and a profile."""

    pixels: np.ndarray
    alpha: np.ndarray | None
    profile: bytes | None = None
    """ICC: what the values of the pixels mean. The network sees the values alone."""


def read_picture(path: Path) -> Picture:
    """Decode a picture, rotated as its EXIF says. Raises InputError."""
    if path.exists() and not path.is_file():  # a pipe would be waited on forever
        raise InputError(f"{path} is not a file; give the path of a picture.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give the path of a picture.") from error
    # OpenCV turns JPEG only in modes that drop an alpha channel, which JPEG does not have; TIFF always, others never.
    upright = path.suffix.lower() in (".jpg", ".jpeg")
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH if upright else cv2.IMREAD_UNCHANGED
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path} is not a readable picture; give PNG, JPEG, TIFF, WebP or BMP.")
    image = image[..., None] if image.ndim == 2 else image
    image = image if upright else TURNS[orientation(path)](image)
    image = _with_alpha(path, data, image)
    if image.dtype not in (np.uint8, np.uint16) or image.shape[2] not in (1, 2, 3, 4):
        raise InputError(f"{path} has {image.shape[2]} channels of {image.dtype}; give 8 or 16 bits, gray or colour.")
    alpha = image[..., -1:] if image.shape[2] in (2, 4) else None
    pixels = image[..., :1] if image.shape[2] < 3 else image[..., 2::-1]
    require_one_picture(path)
    return Picture(np.ascontiguousarray(pixels), alpha, _profile(path))


def _with_alpha(path: Path, data: bytes, image: np.ndarray) -> np.ndarray:
    """A decoded picture with the alpha of a PNG of gray, or of a TIFF of 8 bits. Raises InputError for a TIFF of gray
    with another alpha, and for one in CIELAB.

    OpenCV makes three colours of the gray of a PNG that has alpha; of a TIFF it drops the alpha of gray, and multiplies
    colours by an alpha that the file keeps apart from them.
    """
    if data.startswith(PNG) and data[COLOUR_TYPE] == GRAY_WITH_ALPHA:
        return image[..., [0, 3]]
    if path.suffix.lower() not in TIFF:
        return image
    with suppress(*UNREADABLE), picture_header(io.BytesIO(data)) as picture:  # OpenCV has read it
        apart = isinstance(picture, TiffImageFile) and picture.tag_v2.get(EXTRA_SAMPLES) == (UNASSOCIATED,)
        if picture.mode == "LA" or (picture.mode == "RGBA" and image.dtype == np.uint8 and apart):
            picture.load()  # turns it upright; given a path, Pillow 13 would mix up the pixels of an uncompressed file
            return np.asarray(picture)[..., [2, 1, 0, 3] if picture.mode == "RGBA" else [0, 1]]
    with suppress(*UNREADABLE), tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0].aspage()
        if page.photometric in CIELAB:
            raise InputError(f"{path} is a TIFF in CIELAB, whose colours are not read; convert it to RGB.")
        if page.samplesperpixel == 2:
            raise InputError(f"{path} is a TIFF of gray with alpha that is not read; give a PNG, or leave out alpha.")
    return image


def _profile(path: Path) -> bytes | None:
    """The ICC profile of a picture."""
    profile: bytes | None = None
    with suppress(*UNREADABLE):  # OpenCV has read it
        if path.suffix.lower() in TIFF:
            with tifffile.TiffFile(path) as file:
                profile = file.pages[0].aspage().iccprofile
        else:
            with picture_header(path) as header:
                profile = header.info.get("icc_profile")
    return profile or None


def write_picture(path: Path, picture: Picture) -> None:
    """Encode in the format of the suffix, at the depth of the pixels. Raises InputError where the format cannot."""
    if picture.pixels.dtype == np.uint16 and path.suffix.lower() not in DEEP:  # OpenCV would write white
        raise InputError(f"{path} cannot hold the 16 bits of the picture; give the picture the suffix of its format.")
    image = picture.pixels[..., ::-1]
    if picture.alpha is not None:
        image = np.concatenate([np.repeat(image, 3, 2) if image.shape[2] == 1 else image, picture.alpha], 2)
    data = _encoded(path.suffix.lower(), np.ascontiguousarray(image), picture.profile)
    if data is None:
        raise InputError(f"{path} cannot be written in this format; convert the picture to PNG or TIFF first.")
    replace_with(path, lambda aside: aside.write_bytes(data))


def _encoded(suffix: str, image: np.ndarray, profile: bytes | None) -> bytes | None:
    """A file of pixels [H, W, 1, 3 or 4] in OpenCV's order; None where they are too wide or too high for its format."""
    if profile is not None and profile[SPACE] != (b"GRAY" if image.shape[2] == 1 else b"RGB "):
        profile = None  # of CMYK, which OpenCV has turned into RGB, or of gray with alpha, which is written as RGB
    if profile is not None and suffix in TIFF:  # OpenCV writes no profile into these
        colours = image.shape[2] > 1
        file, pixels = io.BytesIO(), image[..., [2, 1, 0, 3][: image.shape[2]]] if colours else image[..., 0]
        tifffile.imwrite(
            file, pixels, photometric="rgb" if colours else "minisblack", compression="zlib", iccprofile=profile,
            extrasamples=["unspecified"] if image.shape[2] == 4 else None,
        )  # fmt: skip
        return file.getvalue()
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix in (".jpg", ".jpeg") else []
    try:
        if profile is None:
            done, data = cv2.imencode(suffix, image, options)
        else:
            kinds, kept = [cv2.IMAGE_METADATA_ICCP], [np.frombuffer(profile, np.uint8)]
            done, data = cv2.imencodeWithMetadata(suffix, image, kinds, kept, options)
    except cv2.error:
        return None
    return data.tobytes() if done else None
