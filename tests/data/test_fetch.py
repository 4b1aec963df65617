"""Fetching a set from a server that fails, stalls, truncates or lies; a full disk."""

from __future__ import annotations

import errno
import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from kitbench.cli.main import cli
from kitbench.data import cards as catalogue
from kitbench.data import fetch as fetching
from kitbench.data.cards import Card, card
from kitbench.data.fetch import Patience, fetch
from kitbench.data.photograph import read_set
from kitbench.data.pixels import pixel_sha256
from kitbench.errors import InputError, RunError
from tests.data.server import ARCHIVE, PAIRS, Server, left, own, png, zipped

QUICK = Patience(tries=3, first_wait=0.0, connect=5.0, stall=0.3)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetching, "CHUNK", 1000)  # the files are small, too
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()
    running.thread.join()


def get(chosen: Card, root: Path) -> Path:
    return fetch(chosen, root, lambda name, done, total: None, QUICK)[0]


def test_a_set_is_fetched_unpacked_and_put_in_its_place(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    chosen = own(server, archive=hashlib.sha256(ARCHIVE).hexdigest())
    folder, fetched = fetch(chosen, tmp_path / "data", lambda *report: seen.append(report), QUICK)
    assert (folder, fetched) == (tmp_path / "data" / "Own" / "test", True)
    assert len(read_set(chosen, tmp_path / "data", "colour")) == 3
    assert left(tmp_path / "data") == sorted(f"Own/test/{name}" for name in PAIRS)
    assert seen[-1] == ("own.zip", len(ARCHIVE), len(ARCHIVE))
    assert fetch(chosen, tmp_path / "data", lambda *seen: None, QUICK) == (folder, False)
    assert len(server.requests) == 1


def test_a_tar_archive_and_loose_files_will_do(server: Server, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in PAIRS.items():
            member = tarfile.TarInfo(f"test/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    server.body = buffer.getvalue()
    assert get(own(server, "own.tgz"), tmp_path / "a") == tmp_path / "a" / "Own" / "test"
    server.body = PAIRS["input/0.png"]
    plain = own(server, pairs=(), layouts=[["*.png"]], count=1, urls=[{"url": server.url("0.png")}], folders=["Plain"])
    assert left(get(plain, tmp_path / "b")) == ["0.png"]


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.behave = lambda handler, number: number <= 5 and server.send(handler, stop_after=3000) is None
    get(own(server, archive=hashlib.sha256(ARCHIVE).hexdigest()), tmp_path)
    asked = [request.get("Range") for request in server.requests]
    assert asked == [None, *(f"bytes={3000 * n}-" for n in range(1, 6))]


def test_a_download_that_stalls_is_tried_again(server: Server, tmp_path: Path) -> None:
    released = threading.Event()

    def stall(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if number > 1:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(ARCHIVE)))
        handler.send_header("ETag", server.etag)
        handler.end_headers()
        handler.wfile.write(ARCHIVE[:5000])
        handler.wfile.flush()
        released.wait(10)
        handler.close_connection = True
        return True

    server.behave = stall
    get(own(server), tmp_path)
    released.set()
    assert len(server.requests) == 2


def test_a_second_call_goes_on_from_what_the_first_one_left(server: Server, tmp_path: Path) -> None:
    def half_and_then_nothing(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if number == 1:
            server.send(handler, stop_after=len(ARCHIVE) // 2)
        else:
            handler.send_error(503)
        return True

    server.behave = half_and_then_nothing
    kept = len(ARCHIVE) // 2 // fetching.CHUNK * fetching.CHUNK
    with pytest.raises(RunError, match=rf"answered 503.*{kept} bytes are kept.*continues from there"):
        get(own(server), tmp_path)
    server.behave = lambda handler, number: False
    get(own(server, archive=hashlib.sha256(ARCHIVE).hexdigest()), tmp_path)
    assert server.requests[-1]["Range"] == f"bytes={kept}-"


def test_a_file_that_changed_meanwhile_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    def change(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if number == 1:
            server.send(handler, stop_after=2000)
            server.etag = '"v2"'
            return True
        return False

    server.body = zipped({"other": b"another version" * 1000})
    server.behave = change
    old, server.body = server.body, ARCHIVE
    assert old != ARCHIVE
    get(own(server, archive=hashlib.sha256(ARCHIVE).hexdigest()), tmp_path)


def test_a_file_of_unknown_version_does_not_go_on_as_the_one_before_it(server: Server, tmp_path: Path) -> None:
    """A mirror that states no version sends another file, and breaks off; then the first server answers again."""

    def mirrors(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if number == 1:
            server.send(handler, stop_after=3000)
        elif number == 2:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(ARCHIVE)))
            handler.end_headers()
            handler.wfile.write(bytes(range(256)) * 20)
            handler.wfile.flush()
            handler.close_connection = True
        return number < 3

    server.behave = mirrors
    get(own(server), tmp_path)
    assert "Range" not in server.requests[-1]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.behave = lambda handler, number: server.send(handler, 4000 if number == 1 else None, ranges=False) is None
    get(own(server, archive=hashlib.sha256(ARCHIVE).hexdigest()), tmp_path)
    assert len(server.requests) == 2


@pytest.mark.parametrize("extra", [0, 10])
def test_a_part_that_is_whole_is_taken_and_one_that_is_too_long_is_dropped(
    extra: int, server: Server, tmp_path: Path
) -> None:
    work = tmp_path / ".fetch-Own"
    work.mkdir()
    (work / "own.zip.part").write_bytes(ARCHIVE + bytes(extra))
    (work / "own.zip.part.tag").write_text(server.etag)

    def refuse(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if number == 1:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(ARCHIVE)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        return number == 1

    server.behave = refuse
    get(own(server, archive=hashlib.sha256(ARCHIVE).hexdigest()), tmp_path)
    assert len(server.requests) == (2 if extra else 1)


REFUSED = {
    "404": (lambda handler: handler.send_error(404), "answered 404 Not Found"),
    "page": (None, "answered with a web page"),
    "named page": (None, "answered with a web page"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_address_that_is_no_file_is_refused_at_once(fault: str, server: Server, tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if REFUSED[fault][0]:
            REFUSED[fault][0](handler)
            return True
        body = b"\n<!DOCTYPE html><p>sign in" if fault == "page" else b"sign in"
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        if fault == "named page":
            handler.send_header("Content-Type", "text/html; charset=utf-8")
        handler.end_headers()
        handler.wfile.write(body)
        return True

    server.behave = answer
    with pytest.raises(InputError, match=REFUSED[fault][1]):
        get(own(server), tmp_path)
    assert len(server.requests) == 1
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.part"))


def test_a_wrong_checksum_is_named_with_the_right_one_and_nothing_is_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"SHA-256 {hashlib.sha256(ARCHIVE).hexdigest()}, expected {'0' * 64}"):
        get(own(server, archive="0" * 64), tmp_path)
    assert not [name for name in left(tmp_path) if not name.endswith(".tag")]


def test_a_server_that_cannot_be_reached_is_a_failed_run(server: Server, tmp_path: Path) -> None:
    chosen = own(server)
    server.http.server_close()
    with pytest.raises(RunError, match="could not be fetched: ConnectionError"):
        get(chosen, tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"something/else.txt": b"text"}, r"it contains no file like input/\*\.png"),
        ({name: data for name, data in PAIRS.items() if name != "target/1.png"}, "missing: the target of input/1.png"),
        (PAIRS | {"target/1.png": b"no image"}, "altered: .*1.png is not a readable image"),
    ],
)
def test_an_archive_that_is_not_the_set_leaves_nothing(
    members: dict[str, bytes], message: str, server: Server, tmp_path: Path
) -> None:
    server.body = zipped(members)
    with pytest.raises(InputError, match=rf"is not Own: {message}"):
        get(own(server), tmp_path)
    assert left(tmp_path) == []


def test_a_damaged_archive_is_named(server: Server, tmp_path: Path) -> None:
    server.body = ARCHIVE[:2000] + bytes(100) + ARCHIVE[2100:]
    with pytest.raises(InputError, match=r"own\.zip cannot be unpacked"):
        get(own(server), tmp_path)
    assert not (tmp_path / "Own").exists()
    assert not (tmp_path / ".fetch-Own" / "unpacked").exists()
    server.body = ARCHIVE
    get(own(server), tmp_path)  # the damaged one is not met again
    assert len(server.requests) == 2


def test_a_full_disk_while_unpacking_leaves_nothing_half_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = zipfile.ZipFile.extract

    def full(self: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> str:
        if member.filename.endswith("target/2.png"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return extract(self, member, path)

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(InputError, match=r"Cannot write into .*the disk is full"):
        get(own(server), tmp_path)
    assert left(tmp_path) == [".fetch-Own/own.zip"]
    monkeypatch.undo()
    get(own(server), tmp_path)
    assert len(server.requests) == 1  # the archive was kept


def test_a_file_larger_than_the_disk_is_not_begun(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = fetching.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="more than are free on the disk of"):
        get(own(server), tmp_path)


def test_what_lies_in_the_way_is_not_touched(server: Server, tmp_path: Path) -> None:
    (tmp_path / "Own" / "test" / "input").mkdir(parents=True)
    (tmp_path / "Own" / "test" / "input" / "mine.png").write_bytes(png(0))
    with pytest.raises(InputError, match=r"Own/test exists, but is not Own"):
        get(own(server), tmp_path)
    (tmp_path / "Own" / "test" / "input" / "mine.png").rename(tmp_path / "Own" / "mine.png")
    (tmp_path / "Own" / "test" / "input").rmdir()
    (tmp_path / "Own" / "test" / "note").write_text("mine")
    with pytest.raises(InputError, match=r"exists and contains other files"):
        get(own(server), tmp_path)
    assert (tmp_path / "Own" / "mine.png").exists()


def test_the_lock_of_a_fetch_is_removed_while_it_is_held(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One removed after its release may be another process's by then, and a third would fetch beside it."""
    there: list[bool] = []
    release = fetching.FileLock.release
    monkeypatch.setattr(
        fetching.FileLock, "release",
        lambda self, *more, **others: (there.append(Path(self.lock_file).exists()), release(self, *more, **others)),
    )  # fmt: skip
    get(own(server), tmp_path)
    assert there
    assert not any(there)


def test_a_set_that_came_with_another_meanwhile_is_taken_as_it_is(server: Server, tmp_path: Path) -> None:
    """BSDS500 and BSDS500-test share an archive and a folder, and `data fetch` gets several sets at a time."""
    others: list[tuple[Path, bool]] = []

    def get_the_other(name: str, done: int, total: int | None) -> None:
        if not others:
            others.append(fetch(own(server), tmp_path, lambda *seen: None, QUICK))

    twin = own(server).model_copy(update={"name": "Twin"})
    assert fetch(twin, tmp_path, get_the_other, QUICK) == (tmp_path / "Own" / "test", True)
    assert others == [(tmp_path / "Own" / "test", True)]
    assert left(tmp_path) == sorted(f"Own/test/{name}" for name in PAIRS)


def test_a_set_that_may_not_be_fetched_says_where_to_ask(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"DND is not fetched by kitbench; Accept the terms .*Home: https://noise\."):
        get(card("DND"), tmp_path)
    with pytest.raises(InputError, match="ships with the package"):
        get(card("skimage-test"), tmp_path)
    assert left(tmp_path) == []


def printed(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["data", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_fetch_where_and_check_from_the_command_line(server: Server, tmp_path: Path, monkeypatch) -> None:
    root = ["--data", str(tmp_path)]
    monkeypatch.setattr(catalogue, "cards", lambda: {"Own": own(server)})
    assert f"Own: now in {tmp_path}/Own/test" in printed("fetch", "Own", *root).replace("\n", "")
    assert f"Own: already in {tmp_path}/Own/test" in printed("fetch", "Own", *root).replace("\n", "")
    assert f"Own: {tmp_path}/Own/test" in printed("where", *root)
    assert "3 pairs in" in printed("check", *root)
    (tmp_path / "Own" / "test" / "target" / "1.png").unlink()
    assert "missing: the target of input/1.png, as target/*.png" in printed("check", "Own", *root, code=1)
    assert "Own" in printed("list", *root)


def test_what_the_command_line_refuses(tmp_path: Path) -> None:
    root = ["--data", str(tmp_path)]
    assert "Accept the terms" in printed("fetch", "DND", *root, code=2)
    assert "did you mean 'Rain100L'" in printed("check", "Rain100l", *root, code=2)
    assert "Rain100L: not in" in printed("check", "Rain100L", *root, code=1)
    assert "GOPRO_Large/test" in printed("where", "GoPro", *root)


def test_checksums_of_pixels_survive_the_journey(server: Server, tmp_path: Path) -> None:
    sums = {Path(name).with_suffix("").as_posix(): pixel_sha256(np.asarray(Image.open(io.BytesIO(data))))
            for name, data in PAIRS.items()}  # fmt: skip
    get(own(server, checksum="pixels", sha256=sums), tmp_path)
