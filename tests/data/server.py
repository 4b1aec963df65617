"""A data set of three pairs, packed, on a server of this process that a test may make misbehave."""

from __future__ import annotations

import io
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kitbench.data.cards import Card


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


PAIRS = {f"{half}/{n}.png": png(10 * n + (half == "input")) for n in range(3) for half in ("input", "target")}
ARCHIVE = zipped({"Own-main/README": b"text", **{f"Own-main/data/test/{name}": data for name, data in PAIRS.items()}})


class Server:
    """One file under every path; `behave` may answer a request instead of the well-behaved default."""

    def __init__(self) -> None:
        self.body, self.etag, self.requests = ARCHIVE, '"v1"', list[dict[str, str]]()
        self.behave: Callable[[BaseHTTPRequestHandler, int], bool] = lambda handler, number: False
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append({"path": self.path, **self.headers})
                if not server.behave(self, len(server.requests)):
                    server.send(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def url(self, name: str = "own.zip") -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/{name}"

    def send(self, handler: BaseHTTPRequestHandler, stop_after: int | None = None, ranges: bool = True) -> None:
        """The file, or the range of it that was asked for; breaking off after so many bytes."""
        start = 0
        asked = handler.headers.get("Range")
        if ranges and asked and handler.headers.get("If-Range") == self.etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        body = self.body[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("ETag", self.etag)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        handler.end_headers()
        handler.wfile.write(body if stop_after is None else body[:stop_after])
        if stop_after is not None:
            handler.wfile.flush()
            handler.close_connection = True


def own(server: Server, name: str = "own.zip", archive: str = "", **fields: Any) -> Card:
    required = {"name": "Own", "title": "t", "tasks": ["derain"], "colour": True, "home": "h", "licence": "l"}
    pairs = [{"inputs": ["input/*.png"], "targets": ["target/*.png"]}]
    given = {"citation": "c", "pairs": pairs, "count": 3, "folders": ["Own/test"]}
    return Card.model_validate(required | given | {"urls": [{"url": server.url(name), "sha256": archive}]} | fields)


def left(root: Path) -> list[str]:
    """All files below a folder."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
