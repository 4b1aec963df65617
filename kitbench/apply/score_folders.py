"""`kitbench score`: a folder of restored pictures scored against a folder of clean ones, by a protocol."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tabulate import tabulate

from kitbench.apply.folders import BESIDE, RESTORED
from kitbench.data.headers import TRANSPOSED, TURNS, UNREADABLE, orientation, require_plain
from kitbench.data.images import decode
from kitbench.data.own import no_pictures, one_picture_a_name, pictures_in
from kitbench.data.photograph import Photograph
from kitbench.errors import InputError
from kitbench.scoring import evaluate
from kitbench.scoring.lpips import LPIPS
from kitbench.scoring.perceptual import lpips_missing
from kitbench.spec.suite import Protocol
from kitbench.store.records import Score

NAMED = 3
"""Pictures without a partner that a message names."""
Format = Literal["terminal", "markdown", "csv"]


@dataclass(frozen=True)
class Partners:
    """A restored picture and the clean one of the same name."""

    name: str
    restored: Path
    clean: Path


def partners(restored: Path, clean: Path) -> list[Partners]:
    """The pictures of two folders, paired by their names without suffix, sorted.

    A restored picture may be called NAME-restored, as `kitbench restore` writes it; its NAME-side-by-side is left out.
    Raises InputError for a folder without pictures, a picture without a partner, one that is not 8-bit RGB or gray, and
    a pair of two sizes, or of gray and colour.
    """
    own, targets = _by_name(restored), _by_name(clean)
    own = {name: path for name, path in own.items() if not name.endswith(BESIDE)}
    found = {name if name in targets else name.removesuffix(RESTORED): path for name, path in own.items()}
    lonely = [sorted(found.keys() - targets.keys()), sorted(targets.keys() - found.keys())]
    if any(lonely) or len(found) < len(own):
        without = [
            f"{_named(names)} of {folder} {'have' if len(names) > 1 else 'has'} no partner in {other}"
            for names, folder, other in zip(lonely, (restored, clean), (clean, restored), strict=True)
            if names
        ] or [f"{restored} has two pictures for one of {clean}"]
        raise InputError(f"{'; '.join(without)}; give two folders with pictures of the same names.")
    pairs = [Partners(name, found[name], targets[name]) for name in sorted(targets)]
    for pair in pairs:
        kinds = [_kind(path) for path in (pair.restored, pair.clean)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{pair.restored} is {kinds[0]} and {pair.clean} is {kinds[1]}; the two pictures of a pair must have "
                f"one size, and both be gray or both in colour."
            )
    return pairs


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures.")
    files = pictures_in(folder)
    if not files:
        raise InputError(no_pictures(folder))
    one_picture_a_name(files)
    return {path.stem: path for path in files}


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _kind(path: Path) -> str:
    """`640 x 480 px, RGB`, from the file's header: the size as a viewer shows it. Raises InputError for a picture that
    cannot be scored.
    """
    try:
        with Image.open(path) as image:
            mode, size = image.mode, (image.width, image.height)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable image ({error}); replace the file.") from error
    if mode not in ("L", "RGB"):
        raise InputError(f"{path} has pixel format {mode}, expected 8-bit RGB or gray; convert the file.")
    require_plain(path)
    width, height = size[::-1] if orientation(path) in TRANSPOSED else size
    return f"{width} x {height} px, {'gray' if mode == 'L' else mode}"


def _upright(path: Path) -> np.ndarray:
    """The pixels of a picture as a viewer shows them, and `kitbench restore` writes them: uint8 [H, W, C]."""
    return np.ascontiguousarray(TURNS[orientation(path)](decode(path)))


def network_of(protocol: Protocol, weights: str | None) -> tuple[LPIPS | None, str | None]:
    """The protocol's LPIPS network, if it names one and its weights are here; and why not, where they are missing.

    Raises InputError where `weights` names a file that cannot be used.
    """
    if protocol.lpips == "none":
        return None, None
    why = lpips_missing(protocol.lpips, weights)
    return (LPIPS(protocol.lpips, weights), None) if why is None else (None, why)


def scores_of(
    pairs: Sequence[Partners], protocol: Protocol, lpips: LPIPS | None, each: Callable[[int, str], object]
) -> Iterator[Score]:
    """Score every pair, one by one; `each` is told how many are done, and the name.

    Raises InputError for a file that is not an 8-bit gray or RGB image, or that a metric cannot take.
    """
    for number, pair in enumerate(pairs, 1):
        photo = Photograph(pair.name, _upright(pair.clean), "")
        try:
            # In float64, so that an 8-bit value comes back as exactly that value.
            found = evaluate.score(_upright(pair.restored).astype(np.float64) / 255, photo, protocol, lpips, 0.0)
        except InputError as error:
            raise InputError(f"{pair.name}: {error}") from error
        each(number, pair.name)
        yield found


def scores_table(scores: Sequence[Score], form: Format) -> str:
    """A line for each picture and one for the mean; csv with all digits, the others rounded."""
    header = ["picture", "PSNR dB", "SSIM"]
    lines = [[s.image, float("inf") if s.psnr is None else s.psnr, s.ssim] for s in scores]
    if all(s.lpips is not None for s in scores):
        header.append("LPIPS")
        for line, found in zip(lines, scores, strict=True):
            line.append(float(found.lpips or 0.0))
    columns = list(zip(*(line[1:] for line in lines), strict=True))
    lines.append(["mean", *(statistics.fmean(column) for column in columns)])
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *lines])
        return text.getvalue()
    digits = (None, ".2f", ".4f", ".4f")
    cells = [[c if d is None else f"{c:{d}}" for c, d in zip(line, digits, strict=False)] for line in lines]
    style = {"terminal": "simple", "markdown": "pipe"}[form]
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(cells, header, style, disable_numparse=True, colalign=align) + "\n"
