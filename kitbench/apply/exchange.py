"""`kitbench import`: runs that others made, into a folder of runs, where tables show them marked with who made them.

Refused, and then nothing is written: runs whose records contradict one another, and runs made by another protocol,
recipe or source than this kitbench's, because their numbers would not be comparable. Runs that are already here stay as
they are.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from kitbench.apply.admission import Known, admit
from kitbench.errors import InputError
from kitbench.store.archive import ASK, read_archive, write_archive
from kitbench.store.files import writable, writable_file, write_atomic
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Evaluation, Origin, now
from kitbench.verdict.differences import scores_differ

STAGING, LOCK, LOCK_SECONDS = ".import-", ".import.lock", 60
"""In the folder of runs while an import is under way: the folder that it fills first, and its lock."""


@dataclass(frozen=True)
class Exchanged:
    """What an export or an import did, by names of the runs' folders."""

    done: tuple[str, ...]
    left_out: dict[str, str]
    """With the reason."""
    note: str = ""
    """What else is to be known; empty where there is nothing."""


def export_runs(runs: Sequence[RunFolder], path: Path, by: str) -> Exchanged:
    """Write complete runs into an archive; imported ones keep who made them. Raises InputError where there is none."""
    chosen: dict[RunFolder, str] = {}
    left_out = {}
    for folder in runs:
        untrained = folder.run.seed is not None and not folder.trained
        at_work = any((folder.path / name).is_file() for name in ("progress.json", "failed.json"))
        if untrained or at_work or not folder.evaluations():
            left_out[folder.path.name] = "not complete"
        else:
            chosen[folder] = folder.origin.by if folder.origin else by
    if not chosen:
        raise InputError(f"None of the {len(runs)} runs is complete; let `kitbench run` finish first.")
    if len({folder.path.name for folder in chosen}) < len(chosen):
        raise InputError("Two of these folders contain a run of the same name; export them one folder at a time.")
    for folder in chosen:
        folder.logged()  # refuses a damaged one, which nobody could import
    writable_file(path)
    write_archive(path, chosen)
    return Exchanged(tuple(folder.path.name for folder in chosen), left_out)


def import_runs(path: Path, out: Path) -> Exchanged:
    """Add an archive's runs to a folder of runs: all that are not here yet, or none. Raises InputError."""
    manifest, contents = read_archive(path)
    writable(out)
    if (out / "run.json").is_file():
        raise InputError(f"{out} is the folder of a run; give the folder of runs that it lies in.")
    with _staging(out) as staging:
        known = Known.of(find([out]) if any(out.glob("*/run.json")) else [])
        for name, data in contents.items():
            write_atomic(staging / name, data)
        staged = [RunFolder(staging / name, ASK) for name in manifest.runs]
        for folder in staged:
            try:
                admit(folder, known)
            except InputError as error:
                text = str(error).replace(f"{staging}/", "")
                raise InputError(f"{path}: {text} Nothing was imported.") from error
        keys = [folder.run.key for folder in staged]
        if len(set(keys)) < len(keys):
            raise InputError(f"{path} contains one run twice, under two names; {ASK}. Nothing was imported.")
        kept = {folder.path.name: why for folder in staged if (why := _why_not(folder, out, known))}
        new = [folder for folder in staged if folder.path.name not in kept]
        before = _stamps(known.runs.values())
        added = _stamps(new) - before
        archive_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in new:
            by = manifest.runs[folder.path.name]
            origin = Origin(key=folder.run.key, by=by, archive_sha256=archive_sha256, imported=now())
            folder.write("origin.json", origin)
        _move(new, out)
    several = added and len(before | added) > 1
    note = f"{out} now has scores under {' and '.join(sorted(before | added))}: choose one of them with --protocol"
    return Exchanged(tuple(folder.path.name for folder in new), kept, note if several else "")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A new folder in `out` for the block, which one import at a time has; what killed ones have left is removed.

    Where the block fails, `out` is as it was before. Raises InputError where it cannot be written.
    """
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(out / LOCK, timeout=LOCK_SECONDS):
                try:
                    for left in out.glob(f"{STAGING}*"):
                        shutil.rmtree(left)
                    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=out))
                    try:
                        yield staging
                    finally:
                        shutil.rmtree(staging)
                finally:
                    (out / LOCK).unlink(missing_ok=True)
        except BaseException:
            with suppress(OSError):  # something else may have been put there meanwhile
                for folder in created:
                    folder.rmdir()
            raise
    except Timeout as error:
        raise InputError(f"Another import into {out} is under way; wait for it, then import again.") from error
    except OSError as error:
        raise InputError(f"Runs cannot be written to {out} ({error.strerror}); nothing was imported.") from error


def _move(new: Sequence[RunFolder], out: Path) -> None:
    """Move whole folders into `out`; none, where one of them fails or Ctrl-C comes."""
    moved = []
    try:
        for folder in new:
            target = out / folder.path.name
            folder.path.rename(target)  # fails where the folder is there by now: it is not replaced
            moved.append(target)
    except BaseException:
        for target in moved:
            shutil.rmtree(target)
        raise


def _stamps(runs: Iterable[RunFolder]) -> set[str]:
    """Of the protocols that runs were scored by."""
    return {evaluation.stamp for folder in runs for evaluation in folder.evaluations()}


def _why_not(folder: RunFolder, out: Path, known: Known) -> str | None:
    """Why a run is left out: it, or a folder of its name, is here. None where it is not."""
    here = known.runs.get(folder.run.key)
    if here is None:
        return "a folder of that name is here" if (out / folder.path.name).exists() else None
    ours = {(e.data_set, e.sigma, e.stamp): e for e in here.evaluations()}
    pairs = [(e, ours.get((e.data_set, e.sigma, e.stamp))) for e in folder.evaluations()]
    apart = [_apart(theirs, own) for theirs, own in pairs if own is not None]
    lacking = [f"{theirs.data_set} {theirs.condition}".strip() for theirs, own in pairs if own is None]
    parts = ["already here"]
    if differ := [moved for moved in apart if moved is not None]:
        psnr, ssim = (max(moved[which] for moved in differ) for which in (0, 1))
        parts.append(
            f"with other scores: of an image, up to {psnr:.2g} dB and SSIM {ssim:.2g}; to see which, import it into "
            f"another --out, and give both to `kitbench diff`"
        )
    if lacking:
        parts.append(f"without the archive's scores on {' and '.join(lacking)}, which are not added")
    return ", ".join(parts)


def _apart(one: Evaluation, other: Evaluation) -> tuple[float, float] | None:
    """By how much the scores of an image differ at most, in PSNR (dB) and SSIM; None where all are equal."""
    theirs = {score.image: score for score in other.scores}
    pairs = [(a, theirs[a.image]) for a in one.scores if a.image in theirs]
    differing = [(a, b) for a, b in pairs if scores_differ(a, b)]
    if not differing:
        return None
    infinite = [(math.inf if a.psnr is None else a.psnr, math.inf if b.psnr is None else b.psnr) for a, b in differing]
    return max(0.0 if a == b else abs(a - b) for a, b in infinite), max(abs(a.ssim - b.ssim) for a, b in differing)
