"""Files that are written completely or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from kitbench.errors import InputError


def writable(folder: Path) -> None:
    """Raises InputError where files cannot be created in `folder`, which need not exist yet; creates nothing."""
    if error := _refusal(folder):
        raise InputError(
            f"Results folder {folder} cannot be written ({error.strerror}); choose another with --out."
        ) from error


def _refusal(folder: Path) -> OSError | None:
    """What the operating system says to a file in a folder, which need not exist yet; None where it takes one."""
    try:
        existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error


def writable_file(path: Path) -> None:
    """Raises InputError where a file of this path cannot be written; creates nothing."""
    if error := _refusal(path.parent):
        raise InputError(f"{path} cannot be written ({error.strerror}); give a file in another folder.") from error
    if path.parent.is_dir() and len(os.fsencode(path.name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
        raise InputError(f"The file name {path.name[:40]}... is too long; give a shorter one.")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the path of a file.")
    if path.absolute().parent == Path("/dev") or (path.exists() and not path.is_file()):
        raise InputError(f"{path} is a device or a pipe, which the new file would replace; give the path of a file.")


def write_atomic(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write a file completely or not at all, even if power fails: to a temporary file, synced, renamed, folder synced.

    previous: where the file that was there is moved; by default it is replaced.
    """
    replace_with(path, lambda temporary: temporary.write_bytes(data), previous)


def replace_with(path: Path, write: Callable[[Path], object], previous: Path | None = None) -> None:
    """Let `write(temporary)` write a file in the folder of `path`, then rename it to `path`. Like `write_atomic`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]  # no longer than the file's own may be
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
