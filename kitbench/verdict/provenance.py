"""What made the numbers of a table: rows made by other code, release of torch, threads or flags than the rest.

Such numbers may stand in one table, but never without a mark that names what differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kitbench.store.records import Evaluation, Run
from kitbench.verdict.entries import Entry

FLAGS = ("deterministic", "cudnn_benchmark", "tf32", "float32_matmul_precision")
NOT_RECORDED = "not recorded"
SOURCE = "source of the "


@dataclass(frozen=True)
class Deviation:
    """Something that a run has unlike most of the runs that it stands beside."""

    method: str
    run: str
    """Its key."""
    what: str
    """`torch`, `threads`, `commit`, `source of the training`, ..."""
    found: str
    usual: str

    def __str__(self) -> str:
        return f"{self.what} {self.found} instead of {self.usual}"


def deviations(entries: Sequence[Entry], names: Mapping[str, str]) -> list[Deviation]:
    """What differs among these entries from the value that most of the runs have; by run, in order.

    names: of the runs' rows, by the key of the run. The attention's own source is compared within a method alone.
    """
    facts = [(entry.run, _facts(entry.run, entry.evaluation, names[entry.run.key])) for entry in entries]
    counted: dict[str, Counter[str]] = {}
    for _, own in facts:
        for what, value in own.items():
            counted.setdefault(what, Counter())[value] += 1
    usual = {what: min(values, key=lambda value: (-values[value], value)) for what, values in counted.items()}
    found = {
        (run.key, what): Deviation(names[run.key], run.key, what.partition("|")[0], value, usual[what])
        for run, own in facts
        for what, value in own.items()
        if value != usual[what]
    }
    return [found[key] for key in sorted(found)]


def deviation_text(found: Sequence[Deviation]) -> str | None:
    """`torch 2.1.0 instead of 2.13.0; threads 64 instead of 1`; None where nothing differs.

    Other commits, where the digests of the source are recorded and equal, are said to decide no number.
    """
    texts = list(dict.fromkeys(map(str, found)))
    if not texts:
        return None
    only_commits = all(one.what == "commit" for one in found)
    return "; ".join(texts) + (" (the source that decides numbers is the same)" if only_commits else "")


def _facts(run: Run, evaluation: Evaluation, name: str) -> dict[str, str]:
    """What decides the last bits of a run's scores, by name. A name behind `|` is one of a method's own."""
    environment, scored = run.environment, evaluation.numerics
    flags = ", ".join(f"{flag} {environment.flags[flag]}" for flag in FLAGS if flag in environment.flags)
    facts = {
        "commit": (environment.commit or NOT_RECORDED)[:10] + "+dirty" * (environment.commit or "").endswith("+dirty"),
        "torch": environment.versions.get("torch", NOT_RECORDED),
    }
    if run.seed is not None:
        facts |= {"threads": str(environment.threads), "flags": flags or NOT_RECORDED}
    source = run.source or {}
    parts = ("network", "data", "training") if run.seed is not None else ()
    facts |= {f"{SOURCE}{part}": source.get(part, NOT_RECORDED)[:10] for part in parts}
    facts[f"{SOURCE}attention|{name}"] = source.get("attention", NOT_RECORDED)[:10]
    facts[f"{SOURCE}scoring"] = (scored.source.get("scoring", NOT_RECORDED) if scored else NOT_RECORDED)[:10]
    facts["torch that scored"] = scored.torch if scored else NOT_RECORDED
    facts["threads that scored"] = str(scored.threads) if scored else NOT_RECORDED
    return facts
