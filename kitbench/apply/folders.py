"""Pictures restored one after another: from files, folders and wildcards, with progress; a broken one stops none."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from kitbench.apply.picture import read_picture, write_picture
from kitbench.apply.restore import calls, restore_picture, side_by_side
from kitbench.data.headers import UNREADABLE, picture_header
from kitbench.data.own import SUFFIXES, no_pictures, other_files, pictures_in
from kitbench.errors import METHOD_ERRORS, InputError, Interrupted, RunError, describe_error
from kitbench.model.backbone import UNet
from kitbench.system.progress import progress

RESTORED, BESIDE = "-restored", "-side-by-side"
"""Ends of the names of what is written."""


@dataclass(frozen=True)
class Restoration:
    """How pictures are restored, by one network."""

    model: UNet
    device: torch.device
    tile: int | None
    """Side of the tiles in pixels, 0: none, None: chosen by the picture's size."""
    beside: bool
    """Whether a picture of input and result side by side is written too."""


def pictures_named(arguments: Sequence[Path]) -> tuple[list[Path], int, list[Path]]:
    """The pictures that the arguments name: files, folders (not their subfolders), and wildcards like `photos/*.jpg`.

    Of folders and wildcards two kinds of files are left out: pictures that an earlier call wrote, whose number is
    returned second, and files that are no pictures, which are returned third. A picture that is named twice counts
    once. Raises InputError for an argument that names no picture, or a file of a format that is not read.
    """
    found: list[Path] = []
    others: list[Path] = []
    left_out = 0
    for argument in arguments:
        if argument.is_file():
            if argument.suffix.lower() not in SUFFIXES:
                known = ", ".join(SUFFIXES)
                raise InputError(f"{argument} is not of a format that is read; give one that ends in {known}.")
            found.append(argument)
            continue
        if argument.exists() and not argument.is_dir():
            raise InputError(f"{argument} is neither a file nor a folder; give pictures, folders or wildcards.")
        if argument.is_dir():
            there = pictures_in(argument)
            nothing = "" if there else no_pictures(argument)
            others += other_files(argument)
        elif glob.has_magic(str(argument)):
            named = [Path(name) for name in sorted(glob.glob(str(argument), recursive=True))]  # noqa: PTH207 - absolute ones too
            there = [path for path in named if path.suffix.lower() in SUFFIXES and path.is_file()]
            others += [path for path in named if not path.is_dir() and path not in there]
            nothing = f"No picture matches {argument}; give files, folders or wildcards like photos/*.jpg."
        else:
            raise InputError(f"{argument} does not exist; give pictures, folders or wildcards like photos/*.jpg.")
        if not there:
            raise InputError(nothing)
        inputs = [path for path in there if not path.stem.endswith((RESTORED, BESIDE))]
        left_out += len(there) - len(inputs)
        found += inputs
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1], left_out, others


def targets_of(images: Sequence[Path], out: Path | None, overwrite: bool, beside: bool = False) -> list[Path]:
    """Where the restored pictures go: NAME-restored.SUFFIX, in the folder of the input or in `out`.

    Raises InputError where two would be written to one file, or a file exists that may not be overwritten.
    """
    targets = [(out or path.parent) / f"{path.stem}{RESTORED}{path.suffix}" for path in images]
    twice = next((target for target, count in Counter(targets).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"Two pictures would be written to {twice}; restore them into different folders.")
    for target in (*targets, *map(_beside, targets if beside else ())):
        if target.exists() and not overwrite:
            raise InputError(f"{target} exists; move it away, or allow its replacement with --overwrite.")
    return targets


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.stem.removesuffix(RESTORED)}{BESIDE}{target.suffix}")


def restore_all(how: Restoration, images: Sequence[Path], targets: Sequence[Path], console: Console) -> None:
    """Restore every picture and write it to its target, showing progress with the time left.

    Raises RunError at the end, naming the pictures that could not be restored and why, Interrupted on Ctrl-C, and
    BrokenPipeError where nobody reads the output; in all cases whatever is restored is written.
    """
    parts = [_parts(how, path) for path in images]
    failed: list[str] = []
    written = done = 0
    with progress(console, "restore", sum(parts)) as update:
        try:
            for path, target, share in zip(images, targets, parts, strict=True):
                update(done, path.name)
                try:
                    for file in _restore(how, path, target, _counter(done, share, path.name, update)):
                        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)
                    written += 1
                except (InputError, RunError) as error:
                    failed.append(str(error).rstrip("."))
                except BrokenPipeError:  # of the output, which says nothing of the picture
                    raise
                except METHOD_ERRORS as error:  # or memory, or the disk
                    failed.append(f"{path}: {describe_error(error)}")
                done += share
                update(done, path.name)
        except KeyboardInterrupt as error:
            raise Interrupted(f"stopped; {written} of {len(images)} pictures are restored and written") from error
    if failed:
        raise RunError(f"{len(failed)} of {len(images)} pictures could not be restored: {'; '.join(failed)}")


def _restore(how: Restoration, path: Path, target: Path, tick: Callable[[], None]) -> list[Path]:
    """Restore a picture and write it. Returns the files that were written."""
    picture = read_picture(path)
    try:
        restored = restore_picture(how.model, picture, how.device, how.tile, tick)
    except RunError as error:
        raise RunError(f"{path}: {error}") from error
    write_picture(target, restored)
    if not how.beside:
        return [target]
    write_picture(_beside(target), side_by_side(picture, restored))
    return [target, _beside(target)]


def _counter(done: int, share: int, name: str, update: Callable[[int, str], None]) -> Callable[[], None]:
    """What is called after each part of a picture; the last one is counted when the picture is written."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks < share:
            update(done + ticks, name)

    return tick


def _parts(how: Restoration, path: Path) -> int:
    """How many times the network is called for a picture, by the file's header; 1 where that cannot be read."""
    try:
        with picture_header(path) as image:
            width, height = image.size
            return calls(how.model, (height, width, len(image.getbands())), how.tile)
    except UNREADABLE:
        return 1  # what is wrong with it is said when its turn comes
