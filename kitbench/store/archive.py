"""Stored runs in one file, to give to others: a ZIP archive of their records, with the checksum of every file.

    manifest.json                       who made each run; SHA-256 of every other file
    FOLDER/run.json, training.json, log.csv, eval/*.json       as in a folder of runs

Weights and pictures are left out. An archive is not trusted when it is read: names that are not those of records, files
that the manifest does not list, other checksums and sizes beyond all use are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

import kitbench
from kitbench.errors import InputError
from kitbench.spec.fields import Frozen
from kitbench.spec.messages import said_of
from kitbench.store.files import replace_with
from kitbench.store.folder import RunFolder
from kitbench.store.records import LARGEST, By, now

MANIFEST = "manifest.json"
LONGEST = 200
"""Characters of a folder's or a file's name: while it is written, a file system must take some more."""
FOLDER = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._+-]{{0,{LONGEST - 1}}}")
MEMBER = re.compile(
    rf"{FOLDER.pattern}/(run\.json|training\.json|log\.csv|eval/[A-Za-z0-9._+-]{{1,{LONGEST - 5}}}\.json)"
)
MEMBERS, BYTES = 100_000, 1 << 30
"""Most files of an archive, and most bytes of all of them together."""
ASK = "ask its author for another export"


class Manifest(Frozen):
    """manifest.json of an archive of runs."""

    schema_version: Literal[1] = 1
    kitbench: str
    """Version that wrote the archive."""
    made: str
    """UTC, ISO 8601."""
    runs: dict[str, By]
    """By folder: who made the run."""
    files: dict[str, str]
    """SHA-256 of every file, by its path in the archive."""


def write_archive(path: Path, runs: Mapping[RunFolder, str]) -> Manifest:
    """Write runs, each with who made it, completely or not at all. Raises InputError for a name that is refused."""
    contents: dict[str, bytes] = {}
    for folder in runs:
        records = [folder.path / "run.json", folder.path / "training.json", folder.log]
        for file in [*records, *sorted((folder.path / "eval").glob("*.json"))]:
            if file.is_file():
                contents[f"{folder.path.name}/{file.relative_to(folder.path).as_posix()}"] = file.read_bytes()
    for name in contents:
        if not MEMBER.fullmatch(name):
            raise InputError(
                f"{name} cannot be exported: each part of its path must consist of at most {LONGEST} letters, digits "
                f"and . _ + -; rename the method."
            )
    manifest = Manifest(
        kitbench=kitbench.__version__, made=now(), runs={folder.path.name: by for folder, by in runs.items()},
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    )  # fmt: skip

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in {MANIFEST: manifest.model_dump_json(indent=1).encode(), **contents}.items():
                archive.writestr(name, data)

    replace_with(path, write)
    return manifest


def read_archive(path: Path) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of an archive, and its other files by path. Raises InputError where it is not such an archive."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; give an archive that `kitbench export` wrote.")
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {info.filename: _member(archive, info) for info in _members(archive)}
    except InputError as error:
        raise InputError(f"{path} {error}; {ASK}.") from error
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as an archive of runs ({error}); {ASK}.") from error
    if MANIFEST not in contents:
        raise InputError(f"{path} contains no {MANIFEST}, so it is not an archive of runs; {ASK}.")
    manifest = _manifest(path, contents.pop(MANIFEST))
    for name in sorted(contents.keys() ^ manifest.files.keys()):
        what = "contains" if name in contents else "lacks"
        raise InputError(f"{path} {what} {name}, unlike what its manifest lists; {ASK}.")
    for name, data in contents.items():
        if hashlib.sha256(data).hexdigest() != manifest.files[name]:
            raise InputError(f"{path} is damaged: {name} does not have the checksum that the manifest states; {ASK}.")
    if {name.partition("/")[0] for name in contents} != manifest.runs.keys():
        raise InputError(f"{path} does not state for each of its runs who made it; {ASK}.")
    return manifest, contents


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The archive's files, their names and sizes checked before anything is unpacked."""
    found = archive.infolist()
    names = {info.filename for info in found}
    if len(found) > MEMBERS or sum(info.file_size for info in found) > BYTES:
        raise InputError(f"is too large: at most {MEMBERS} files and {BYTES >> 20} MiB are read")
    if len(names) != len(found):
        raise InputError("contains two files of one name")
    for name in names:
        if name != MANIFEST and not MEMBER.fullmatch(name):
            raise InputError(
                f"contains {name[:LONGEST]!r}, which is not the name of a record (in each part at most {LONGEST} "
                "letters, digits and . _ + -)"
            )
    for info in found:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"contains {info.filename}, which is compressed otherwise than `kitbench export` does")
    return found


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InputError(f"contains {info.filename}, which is larger than {LARGEST >> 20} MiB, too large for a record")
    return data


def _manifest(path: Path, data: bytes) -> Manifest:
    try:
        raw = json.loads(data)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != 1:
            raise InputError(
                f"{path} has schema version {str(version)[:20]!r}, this kitbench reads 1; update kitbench, or {ASK}."
            )
        return Manifest.model_validate(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{path} has no valid {MANIFEST}: {place}: {said_of(fault)}; {ASK}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has no valid {MANIFEST} ({error}); {ASK}.") from error
