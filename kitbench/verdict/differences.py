"""`kitbench diff`: the differences between two stored runs: inputs, environment and results.

They are sorted by how much they explain: data and code come before versions of libraries, and those before the
processor. `reproduce` names the first one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kitbench.store.folder import RunFolder
from kitbench.store.records import Environment, Evaluation, Run, Score

Kind = Literal["data", "code", "setting", "device", "version", "flag", "threads", "host", "numbers"]
KINDS: tuple[Kind, ...] = ("data", "code", "setting", "device", "version", "flag", "threads", "host", "numbers")


@dataclass(frozen=True)
class RunDifference:
    """One difference between two runs; a and b are the two values."""

    kind: Kind
    what: str
    a: object
    b: object

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}: {_short(self.a)} and {_short(self.b)}"


def _short(value: object) -> str:
    """A value as text; of a checksum, the first digits."""
    text = "nothing" if value is None else str(value)
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
    for own, other_own in shared(a, b):
        name = f"{own.data_set} {own.condition} {own.stamp}".replace("  ", " ")
        theirs = {score.image: score for score in other_own.scores}
        for score in own.scores:
            other = theirs.get(score.image)
            if other is None:
                found.append(RunDifference("numbers", f"{name}, {score.image}", f"{score.psnr} dB", "not scored"))
            elif scores_differ(score, other):
                found.append(RunDifference("numbers", f"{name}, {score.image}", _dB(score), _dB(other)))
    return found


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


def _dB(score: Score) -> str:
    return f"{math.inf if score.psnr is None else score.psnr} dB, SSIM {score.ssim}"


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
    return [f"{name} ({_short(one)} and {_short(two)})" for name, one, two in _unequal(_flat(a), _flat(b))]
