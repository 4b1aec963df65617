"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from kitbench.errors import InputError


def writable(folder: Path) -> None:
    """Raises InputError where files cannot be made in `folder`, which need not exist yet; leaves nothing behind."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"Results folder {folder} cannot be written ({error.strerror}); choose another with --out."
        ) from error


def write_atomic(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write a file whole or not at all, surviving a power cut: written aside, synced, renamed, the folder synced.

    `previous`: what the file that stood there is kept as.
    """
    replace_with(path, lambda aside: aside.write_bytes(data), previous)


def replace_with(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Let `write(aside)` make a file beside `path`, then put it in its place at once. Otherwise as `write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
