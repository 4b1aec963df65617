"""Archives that are damaged, would do harm or would grow beyond bounds."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from kitbench.data import fetch as fetching
from kitbench.data.fetch import unpack
from kitbench.errors import InputError
from tests.data.server import PAIRS, left, zipped


def link(name: str, target: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, target)
    return buffer.getvalue()


def tarred(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member, io.BytesIO())
    return buffer.getvalue()


def claiming(size: int) -> bytes:
    """A tar archive whose one member says that it is so long."""
    member = tarfile.TarInfo("big")
    member.size = size
    return member.tobuf() + bytes(1024)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped({"../outside.png": b"x"}), "lies outside its folder"),
        (zipped({"/etc/outside.png": b"x"}), "lies outside its folder"),
        (zipped({"a\\..\\..\\outside.png": b"x"}), "lies outside its folder"),
        (link("link", "/etc"), "contains a link"),
        (tarred("../outside.png"), "outside"),
        (tarred("link", tarfile.SYMTYPE, "/etc"), "cannot be unpacked"),
        (tarred("link", tarfile.SYMTYPE, "../.."), "cannot be unpacked"),
        (tarred("hard", tarfile.LNKTYPE, "../../outside"), "cannot be unpacked"),
        (tarred("device", tarfile.CHRTYPE), "cannot be unpacked"),
        (claiming(1 << 40), "are allowed"),
    ],
)
def test_an_archive_that_would_do_harm_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "archive").write_bytes(data)
    with pytest.raises(InputError, match=message):
        unpack(tmp_path / "archive", tmp_path / "in")
    assert left(tmp_path) == ["archive"]


def test_a_zip_that_grows_beyond_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(4 << 20))
    (tmp_path / "in").mkdir()
    (tmp_path / "bomb.zip").write_bytes(buffer.getvalue())
    usage = fetching.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(InputError, match="would unpack to 4194304 bytes or more, but at most 1048576 are allowed"):
        unpack(tmp_path / "bomb.zip", tmp_path / "in")
    assert left(tmp_path / "in") == []


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_is_told_from_a_disk_that_cannot_be_written(method: int, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("0.png", PAIRS["input/0.png"])
    data = bytearray(buffer.getvalue())
    data[60:90] = bytes(30)
    (tmp_path / "own.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"^own\.zip cannot be unpacked \(.*\), and was deleted; fetch the set again"):
        unpack(tmp_path / "own.zip", tmp_path)
