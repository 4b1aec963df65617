"""Files of pictures: what else than pixels they hold, and what is refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps

from kitbench.apply.picture import Picture, read_picture, write_picture
from kitbench.data.headers import TURNS
from kitbench.errors import InputError
from tests.apply.test_restore import photograph


@pytest.mark.parametrize(
    ("suffix", "channels", "dtype"),
    [
        (".png", 3, np.uint8), (".png", 3, np.uint16), (".png", 4, np.uint8), (".jpg", 3, np.uint8), (".webp", 3, np.uint8),
        (".tif", 1, np.uint8), (".tif", 3, np.uint8), (".tif", 3, np.uint16), (".tif", 4, np.uint16),
    ],
)  # fmt: skip
def test_a_colour_profile_is_kept(suffix, channels, dtype, tmp_path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if channels == 1:
        profile = profile[:16] + b"GRAY" + profile[20:]
    pixels = photograph(40, 60, min(channels, 3), dtype)
    alpha = photograph(40, 60, 1, dtype) if channels == 4 else None
    file, again = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    write_picture(file, Picture(pixels, alpha, profile))
    read = read_picture(file)
    assert read.profile == profile
    if suffix in (".png", ".tif"):
        np.testing.assert_array_equal(read.pixels, pixels)
        assert alpha is None or np.array_equal(read.alpha, alpha)
    write_picture(again, read)
    assert read_picture(again).profile == profile
    write_picture(again, Picture(pixels, alpha))
    assert read_picture(again).profile is None


@pytest.mark.parametrize(("channels", "alpha"), [(2, "unassalpha"), (4, "unassalpha"), (4, "assocalpha")])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("turn", sorted(TURNS))
def test_colours_of_a_tiff_are_read_as_stored_and_its_alpha_is_kept(
    channels, alpha, compression, turn, tmp_path
) -> None:
    """OpenCV multiplies colours by an alpha that is kept apart from them, and drops the alpha of gray."""
    pixels = photograph(16, 24, channels)
    tifffile.imwrite(
        tmp_path / "one.tif", pixels, photometric="rgb" if channels == 4 else "minisblack", planarconfig="contig",
        extrasamples=[alpha], compression=compression, extratags=[(274, "H", 1, turn, True)],
    )  # fmt: skip
    read = read_picture(tmp_path / "one.tif")
    np.testing.assert_array_equal(np.concatenate([read.pixels, read.alpha], 2), TURNS[turn](pixels))


@pytest.mark.parametrize(("dtype", "alpha"), [(np.uint16, "unassalpha"), (np.uint8, "assocalpha")])
def test_a_tiff_of_gray_with_an_alpha_that_would_be_lost_is_refused(dtype, alpha, tmp_path) -> None:
    pixels = photograph(16, 24, 2, dtype)
    tifffile.imwrite(
        tmp_path / "one.tif", pixels, photometric="minisblack", planarconfig="contig", extrasamples=[alpha]
    )
    with pytest.raises(InputError, match="gray with alpha that is not read; give a PNG"):
        read_picture(tmp_path / "one.tif")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_of_gray_with_alpha_has_one_channel_and_alpha(dtype, tmp_path) -> None:
    """OpenCV decodes it as colour, and a network of colours would give it some."""
    gray, alpha = photograph(20, 30, 1, dtype), photograph(20, 30, 1, dtype)[::-1]
    both = np.concatenate([gray, alpha], 2)
    header = struct.pack(">IIBBBBB", 30, 20, 8 * gray.itemsize, 4, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(f">u{gray.itemsize}").tobytes() for row in both))
    chunks = (b"IHDR" + header, b"IDAT" + rows, b"IEND")
    data = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    (tmp_path / "one.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(data))
    read = read_picture(tmp_path / "one.png")
    np.testing.assert_array_equal(read.pixels, gray)
    np.testing.assert_array_equal(read.alpha, alpha)
    write_picture(tmp_path / "again.png", read)
    again = read_picture(tmp_path / "again.png")  # in three equal channels
    np.testing.assert_array_equal(again.pixels, np.repeat(gray, 3, 2))
    np.testing.assert_array_equal(again.alpha, alpha)


def test_the_size_that_pillow_warns_of_does_not_hide_the_profile_and_alpha(tmp_path, monkeypatch) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(photograph(16, 24, 4), "RGBA").save(tmp_path / "one.tif", icc_profile=profile)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    read = read_picture(tmp_path / "one.tif")
    np.testing.assert_array_equal(read.pixels, photograph(16, 24, 4)[..., :3])
    assert read.profile == profile


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_profile_of_other_colours_than_those_written_is_left_out(suffix, tmp_path) -> None:
    """OpenCV reads CMYK as RGB: with the old profile the result would be shown in wrong colours."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    file, again = tmp_path / f"print.{suffix}", tmp_path / f"again.{suffix}"
    cmyk = profile[:16] + b"CMYK" + profile[20:]
    write_picture(file, Picture(photograph(20, 30, 3), None, cmyk))
    assert read_picture(file).profile is None
    Image.fromarray(photograph(20, 30, 3)).convert("CMYK").save(file, icc_profile=cmyk)
    write_picture(again, read_picture(file))
    assert read_picture(again).profile is None


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_a_file_of_several_pictures_is_refused(suffix, tmp_path) -> None:
    first, second = (Image.fromarray(photograph(20, 30, 3) // part) for part in (1, 2))
    first.save(tmp_path / f"both.{suffix}", save_all=True, append_images=[second])
    with pytest.raises(InputError, match="holds 2 pictures"):
        read_picture(tmp_path / f"both.{suffix}")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_as_its_exif_says(suffix, orientation, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(photograph(40, 60, 3))
    stored.save(tmp_path / f"turned.{suffix}", exif=exif, **({} if suffix == "tif" else {"quality": 95}))
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"turned.{suffix}"))).astype(int)
    read = read_picture(tmp_path / f"turned.{suffix}").pixels
    assert read.shape == shown.shape
    assert np.abs(read - shown).max() <= 6  # two decoders of JPEG


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_in_cielab_is_refused(dtype, tmp_path) -> None:
    """OpenCV would show its gray as yellowish: (142, 131, 115)."""
    lab = np.full((16, 24, 3), (137, 128, 128), dtype) * (257 if dtype is np.uint16 else 1)
    tifffile.imwrite(tmp_path / "one.tif", lab.astype(dtype), photometric="cielab")
    with pytest.raises(
        InputError, match=r"one\.tif is a TIFF in CIELAB, whose colours are not read; convert it to RGB"
    ):
        read_picture(tmp_path / "one.tif")
