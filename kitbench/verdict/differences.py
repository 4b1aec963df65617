"""`kitbench diff`: the differences between two stored runs: inputs, environment and results.

They are sorted by how much they explain: data and code come before versions of libraries, and those before the
processor. `reproduce` names the first one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kitbench.store.folder import RunFolder
from kitbench.store.records import Environment, Evaluation, Run, Score

Kind = Literal["data", "code", "setting", "device", "version", "flag", "threads", "host", "numbers"]
KINDS: tuple[Kind, ...] = ("data", "code", "setting", "device", "version", "flag", "threads", "host", "numbers")


@dataclass(frozen=True)
class Scored:
    """PSNR (dB), SSIM and LPIPS, of an image or a mean over images."""

    psnr: float
    ssim: float
    lpips: float | None = None
    """None where an image has none."""


@dataclass(frozen=True)
class RunDifference:
    """One difference between two runs; a and b are the two values."""

    kind: Kind
    what: str
    a: object
    b: object

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}: {_pair(self.a, self.b)}"


def _pair(a: object, b: object) -> str:
    """Two values as text, with their difference where they are results."""
    if a is None or b is None:
        there, absent = ("second", "first") if a is None else ("first", "second")
        return f"{_short(b if a is None else a)} in the {there} run, not stated in the {absent}"
    if isinstance(a, Scored) and isinstance(b, Scored):
        text = f"{_moved(a.psnr, b.psnr, 2)} dB, SSIM {_moved(a.ssim, b.ssim, 4)}"
        return text if a.lpips is None or b.lpips is None else f"{text}, LPIPS {_moved(a.lpips, b.lpips, 4)}"
    return _both(a, b)


def _both(a: object, b: object) -> str:
    """Two unequal values as short as they may be without looking equal."""
    short = _short(a), _short(b)
    return " and ".join(short if short[0] != short[1] else (repr(a), repr(b)))


def _moved(a: float, b: float, digits: int) -> str:
    """`29.48 and 29.55 (+0.07)`; a difference below these digits is still shown."""
    return f"{a:.{digits}f} and {b:.{digits}f} ({'equal' if a == b else f'{b - a:+.2g}'})"


def _short(value: object) -> str:
    """A value as text; of a checksum, the first digits."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    digits, _, dirty = text.partition("+")
    is_hash = len(digits) in (40, 64) and all(c in "0123456789abcdef" for c in digits)
    return f"{digits[:10]}{'+dirty' if dirty else ''}" if is_hash else text


def differences(a: RunFolder, b: RunFolder) -> list[RunDifference]:
    """All differences except in times, sorted by how much they explain."""
    one, two = a.run, b.run
    found = [*_identity(one, two), *_test_sets(a, b), *_environment(one.environment, two.environment), *numbers(a, b)]
    return sorted(found, key=lambda difference: KINDS.index(difference.kind))


def _identity(a: Run, b: Run) -> Iterator[RunDifference]:
    kinds: dict[str, Kind] = {"numerics": "code", "device": "device", "train_sha256": "data"}
    for name, first, second in _unequal(_flat(a.identity), _flat(b.identity)):
        if name != "train_sha256":
            # The attention of a user's file is identified by the checksum of the file.
            own = name == "attention" and a.method == b.method
            yield RunDifference("code" if own else kinds.get(name, "setting"), name, first, second)
    for name, first, second in _unequal(a.train_sets, b.train_sets):
        yield RunDifference("data", f"training set {name}", first, second)


def _environment(a: Environment, b: Environment) -> Iterator[RunDifference]:
    kinds: dict[str, Kind] = {
        "kitbench": "code", "commit": "code", "device": "device", "driver": "device", "python": "version",
        "threads": "threads", "host": "host",
    }  # fmt: skip
    for name, kind in kinds.items():
        if getattr(a, name) != getattr(b, name):
            yield RunDifference(kind, name, getattr(a, name), getattr(b, name))
    for name, first, second in _unequal(a.versions, b.versions):
        yield RunDifference("version", name, first, second)
    for name, first, second in _unequal(a.flags, b.flags):
        yield RunDifference("flag", name, first, second)


def _test_sets(a: RunFolder, b: RunFolder) -> Iterator[RunDifference]:
    sums = [{e.data_set: e.data_sha256 for e in folder.evaluations()} for folder in (a, b)]
    for name in sorted(sums[0].keys() & sums[1].keys()):
        if sums[0][name] != sums[1][name]:
            yield RunDifference("data", f"test set {name}", sums[0][name], sums[1][name])


def numbers(a: RunFolder, b: RunFolder) -> list[RunDifference]:
    """The first logged step with another loss, the weights, and the scores in evaluations that both runs have."""
    found = []
    one, two = a.training, b.training
    if one is not None and two is not None:
        for first, second in zip(a.logged(), b.logged(), strict=False):
            if first.loss != second.loss:
                found.append(RunDifference("numbers", f"loss at step {first.step}", first.loss, second.loss))
                break
        if one.weights_sha256 != two.weights_sha256:
            found.append(RunDifference("numbers", "weights", one.weights_sha256, two.weights_sha256))
    for own, other in shared(a, b):
        found += _scores(own, other)
    return found


def _scores(a: Evaluation, b: Evaluation) -> list[RunDifference]:
    """Means over the images of both and the image that differs most, where any differs; images that one lacks."""
    name = f"{a.data_set} {a.condition} {a.stamp}".replace("  ", " ")
    ours, theirs = ({score.image: score for score in one.scores} for one in (a, b))
    pairs = [(ours[image], theirs[image]) for image in ours if image in theirs]
    unequal = [pair for pair in pairs if scores_differ(*pair)]
    found = []
    if unequal:
        what = f"{name}, mean over {len(pairs)} images, of which {len(unequal)} differ"
        found.append(RunDifference("numbers", what, _mean([one for one, _ in pairs]), _mean([two for _, two in pairs])))
        most = max(unequal, key=lambda pair: _distance(*pair))
        found.append(RunDifference("numbers", f"{name}, most of all {most[0].image}", *(_mean([one]) for one in most)))
    if lacking := ours.keys() ^ theirs.keys():
        what = f"{name}, images that only one run scored, {min(lacking)} among them"
        found.append(RunDifference("numbers", what, len(ours.keys() - theirs.keys()), len(theirs.keys() - ours.keys())))
    return found


def _mean(scores: Sequence[Score]) -> Scored:
    """Means of scores; an image that was restored exactly has infinite PSNR."""
    psnr = math.fsum(math.inf if score.psnr is None else score.psnr for score in scores) / len(scores)
    lpips = [score.lpips for score in scores if score.lpips is not None]
    return Scored(
        psnr, math.fsum(score.ssim for score in scores) / len(scores),
        math.fsum(lpips) / len(lpips) if len(lpips) == len(scores) else None,
    )  # fmt: skip


def _distance(a: Score, b: Score) -> tuple[float, float, float]:
    """Of two scores in PSNR, dB (infinite where one alone is), then in SSIM, then in LPIPS where both have it."""
    known = None not in (a.psnr, b.psnr)
    psnr = abs((a.psnr or 0) - (b.psnr or 0)) if known else 0.0 if a.psnr == b.psnr else math.inf
    lpips = 0.0 if a.lpips is None or b.lpips is None else abs(a.lpips - b.lpips)
    return psnr, abs(a.ssim - b.ssim), lpips


def scores_differ(a: Score, b: Score) -> bool:
    """Whether two scores of one image differ; LPIPS is compared where both have it."""
    return (a.psnr, a.ssim) != (b.psnr, b.ssim) or (None not in (a.lpips, b.lpips) and a.lpips != b.lpips)


def shared(a: RunFolder, b: RunFolder) -> list[tuple[Evaluation, Evaluation]]:
    """Evaluations of the same set, condition and protocol."""
    theirs = {(e.data_set, e.sigma, e.stamp): e for e in b.evaluations()}
    return [
        (e, theirs[e.data_set, e.sigma, e.stamp])
        for e in a.evaluations()
        if (e.data_set, e.sigma, e.stamp) in theirs
    ]  # fmt: skip


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return flat


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def unequal_fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields in which two identities differ, each with both values: `recipe.steps (700 and 20)`."""
    return [f"{name} ({_both(one, two)})" for name, one, two in _unequal(_flat(a), _flat(b))]
