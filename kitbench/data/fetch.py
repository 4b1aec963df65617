"""Download a set from the addresses on its card, unpack and check it, and only then move it to its place.

Downloads continue where they stopped (HTTP ranges, while the server reports the same version of the file), are compared
with the card's checksum, and are unpacked in a temporary folder, so that a failure leaves no partial set. Archives may
not write outside their folder or grow without bound. A set without addresses is not downloaded: its card says how to
get it.
"""

from __future__ import annotations

import errno
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlparse

import requests
from filelock import FileLock, Timeout

from kitbench.data.audit import audit
from kitbench.data.cards import Address, Card
from kitbench.data.layout import glob
from kitbench.data.locate import described, fits, locate
from kitbench.data.pixels import file_sha256
from kitbench.errors import InputError, RunError

Report = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes received so far, and its total size, or None where the server does not say."""

CHUNK = 1 << 16
"""Bytes written at a time: at most this many are lost with a connection."""
GROWTH = 50
"""An archive may unpack to this many times its own size plus 1 GiB."""


@dataclass(frozen=True)
class Patience:
    """When to give up on a server: consecutive attempts without data, and seconds without data."""

    tries: int = 6
    first_wait: float = 1.0
    """Seconds before the second try; doubled before each further one."""
    connect: float = 15.0
    stall: float = 60.0


def fetch(card: Card, root: Path, report: Report, patience: Patience | None = None) -> tuple[Path, bool]:
    """The folder of the set below `root`, and whether it was downloaded now.

    Raises InputError where the set may not be downloaded, is there but altered, or the download is not the set;
    RunError where the server could not be reached or did not send everything: the same call then continues.
    """
    if card.package:
        raise InputError(f"Data set {card.name} ships with the package {card.package}; it needs no download.")
    folder = locate(card, root)
    if folder is not None and next(folder.iterdir(), None) is not None:
        if fits(card, folder):
            return folder, False
        other = described(card, folder)
        is_what = f"it is {other.name}" if other.name != card.name else "`kitbench data check` lists the differences"
        raise InputError(f"{folder} exists, but is not {card.name}: {is_what}; move it away to fetch the set.")
    if not card.urls:
        raise InputError(
            f"Data set {card.name} is not fetched by kitbench; {card.ask or 'get it by hand.'} Home: {card.home}."
        )
    with _writing(root):
        root.mkdir(parents=True, exist_ok=True)
        work = root / f".fetch-{card.name}"
        lock = FileLock(root / f".fetch-{card.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"Data set {card.name} is already being fetched into {root}; wait until that is done."
            ) from error
        try:
            work.mkdir(exist_ok=True)
            files = [download(address, work, report, patience or Patience()) for address in card.urls]
            placed = _install(card, files, work / "unpacked", root)
            shutil.rmtree(work)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
    return placed, True


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turns a full disk or a folder that cannot be written into an InputError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
        raise InputError(f"Cannot write into {place}: {reason}; free some space or give another folder.") from error


def download(address: Address, into: Path, report: Report, patience: Patience) -> Path:
    """Download a file completely and compare its checksum; bytes that are there already are not requested again."""
    name = PurePosixPath(unquote(urlparse(address.url).path)).name
    path, part = into / name, into / f"{name}.part"
    if not path.exists():
        failures = 0
        while True:
            before = _size(part)
            try:
                _receive(address.url, part, report, patience)
                break
            except _Again as error:
                failures = 0 if _size(part) > before else failures + 1
                if failures >= patience.tries:
                    raise RunError(
                        f"{address.url} could not be fetched: {error}, {failures} times in a row; {_size(part)} bytes "
                        f"are kept, and the same command continues from there"
                    ) from error
                time.sleep(patience.first_wait * 2 ** max(0, failures - 1))
        found = file_sha256(part)
        if address.sha256 and found != address.sha256:
            part.unlink()
            raise InputError(
                f"{address.url} has SHA-256 {found}, expected {address.sha256}: it was damaged in transfer, or has "
                f"changed on the server; the download was deleted, try again."
            )
        part.replace(path)
        _tag(part).unlink(missing_ok=True)
    return path


class _Again(Exception):
    """A failure that another attempt may get over."""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tag(part: Path) -> Path:
    """The file that stores which version of the file (ETag or date) a partial download belongs to."""
    return part.with_name(f"{part.name}.tag")


def _receive(url: str, part: Path, report: Report, patience: Patience) -> None:
    """One request for the missing bytes of a file, appended to those that are there."""
    start, tag = _size(part), _tag(part)
    headers = {"Accept-Encoding": "identity"}
    if start and tag.exists():
        headers |= {"Range": f"bytes={start}-", "If-Range": tag.read_text("utf-8")}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(patience.connect, patience.stall)) as response:
            _write(response, part, start, report)
    except requests.RequestException as error:
        raise _Again(f"{type(error).__name__}: {error}") from error


def _write(response: requests.Response, part: Path, start: int, report: Report) -> None:
    """Append the body of a response to a partial file, or overwrite it where the response is the whole file."""
    url, status = response.url, response.status_code
    if status == requests.codes.range_not_satisfiable:
        if response.headers.get("Content-Range") == f"bytes */{start}":
            return  # it is complete
        part.unlink()
        raise _Again("the partial download does not belong to the file")
    if status >= 500 or status in (requests.codes.request_timeout, requests.codes.too_many_requests):
        raise _Again(f"the server answered {status} {response.reason}")
    if status not in (requests.codes.ok, requests.codes.partial_content):
        raise InputError(f"{url} answered {status} {response.reason}; get the file by hand.")
    if status == requests.codes.ok:
        start = 0
    elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        part.unlink()
        raise _Again("the server sent another range than requested")
    mark = response.headers.get("ETag", "")
    mark = response.headers.get("Last-Modified", "") if mark.startswith("W/") or not mark else mark
    if mark:
        _tag(part).write_text(mark, "utf-8")
    length = response.headers.get("Content-Length")
    total = start + int(length) if length else None
    if total is not None and total - start > shutil.disk_usage(part.parent).free:
        raise InputError(f"{url} has {total} bytes, more than are free on the disk of {part.parent}; free some space.")
    done, name = start, part.name.removesuffix(".part")
    with part.open("ab" if start else "wb") as file:
        for chunk in response.iter_content(CHUNK):
            if not done and _is_page(response, chunk):
                raise InputError(
                    f"{url} answered with a web page (HTML), not with the file {name}; "
                    f"open it in a browser, or get the file by hand."
                )
            file.write(chunk)
            done += len(chunk)
            report(name, done, total)
    if total is not None and done < total:
        raise _Again(f"the connection ended after {done} of {total} bytes")


def _is_page(response: requests.Response, head: bytes) -> bool:
    kind = response.headers.get("Content-Type", "")
    return kind.startswith("text/html") or head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))


def _install(card: Card, files: list[Path], unpacked: Path, root: Path) -> Path:
    """Unpack, find the set inside, check it, and move it to its place. Leaves nothing behind where that fails."""
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    try:
        for file in files:
            unpack(file, unpacked)
        found, problems = _find(card, unpacked)
        if found is None or problems:
            for file in files:
                file.unlink()
            raise InputError(
                f"The download of {card.urls[0].url} is not {card.name}: {problems[0]}"
                f"{f' (and {len(problems) - 1} more)' if len(problems) > 1 else ''}; nothing was kept."
            )
        target = root / card.folders[0]
        source = found
        while target.name == source.name and unpacked in source.parents and root in target.parent.parents:
            target, source = target.parent, source.parent
        if target.is_dir() and next(target.iterdir(), None) is None:
            target.rmdir()
        if target.exists():
            raise InputError(f"{target} exists and contains other files; move it away to fetch {card.name}.")
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return root / card.folders[0]


def _find(card: Card, unpacked: Path) -> tuple[Path | None, list[str]]:
    """The topmost folder that is the set; where none is, the best candidate and its differences from the card."""
    folders = (unpacked, *(path for path in unpacked.rglob("*") if path.is_dir()))
    holding = [folder for folder in folders if any(glob(folder, patterns) for patterns in card.trees)]
    # Folders with the right number of images come first.
    best: tuple[Path | None, list[str]] = None, [f"it contains no file like {card.tree}"]
    for folder in sorted(holding, key=lambda path: (not fits(card, path), len(path.parts), path)):
        problems = audit(card, folder)
        if not problems:
            return folder, []
        best = (folder, problems) if best[0] is None else best
    return best


def unpack(archive: Path, into: Path) -> None:
    """Unpack a .zip or .tar archive, or put a file that is neither in the folder. Raises InputError.

    No member may be outside the folder, be a link, or lead through one out of it; together they may not take more than
    is free on the disk, nor more than GROWTH times the size of the archive plus 1 GiB.
    """
    room = min(shutil.disk_usage(into).free, GROWTH * archive.stat().st_size + (1 << 30))
    try:
        if zipfile.is_zipfile(archive):
            _unzip(archive, into, room)
        elif tarfile.is_tarfile(archive):
            _untar(archive, into, room)
        else:
            shutil.copy2(archive, into / archive.name)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"{archive.name} cannot be unpacked ({error}); delete it and fetch it again.") from error


def _unzip(archive: Path, into: Path, room: int) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        _check_room(archive, sum(member.file_size for member in members), room)
        for member in members:
            name = PurePosixPath(member.filename)
            if name.is_absolute() or ".." in name.parts or "\\" in member.filename:
                raise InputError(
                    f"{archive.name} contains {member.filename!r}, which lies outside its folder; refused."
                )
            if stat.S_ISLNK(member.external_attr >> 16):
                raise InputError(f"{archive.name} contains a link, {member.filename!r}; refused.")
            if member.flag_bits & 1:
                raise InputError(f"{archive.name} is encrypted; unpack it by hand.")
            opened.extract(member, into)


def _untar(archive: Path, into: Path, room: int) -> None:
    taken = 0
    with tarfile.open(archive) as opened:
        for member in opened:
            taken += member.size
            _check_room(archive, taken, room)
            opened.extract(member, into, filter="data")


def _check_room(archive: Path, needed: int, room: int) -> None:
    if needed > room:
        raise InputError(
            f"{archive.name} would unpack to {needed} bytes or more, but at most {room} are allowed; free some space."
        )
