"""What made the numbers of a table: rows made by other code, release of torch, threads or flags than the rest.

Such numbers may stand in one table, but never without a mark that names what differs. Imported runs are always marked,
with who made them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kitbench.text import capitalised
from kitbench.verdict.entries import Entry

FLAGS = ("deterministic", "cudnn_benchmark", "tf32", "float32_matmul_precision")
NOT_RECORDED = "not recorded"
SOURCE = "source of the "
IMPORTED = "imported"


@dataclass(frozen=True)
class Deviation:
    """Something in which a run differs from most of the runs that it stands beside."""

    method: str
    run: str
    """Its key."""
    trained: bool
    what: str
    """`torch`, `threads`, `device`, `commit`, `source of the training`, ...; IMPORTED."""
    found: str
    usual: str

    def __str__(self) -> str:
        if self.what == IMPORTED:
            return f"imported, run by {self.found}"
        return f"{self.what} {self.found} instead of {self.usual}"


def deviations(entries: Sequence[Entry], names: Mapping[tuple[str, str], str]) -> list[Deviation]:
    """What differs among these entries from the value that most of their runs have, and who made imported runs; by
    run, in order. A run counts once, on however many sets it was scored.

    names: of the runs' rows, by the key and the method of the run. An attention's own source is compared with that of
    the same method alone. Another commit is no deviation where the digests of all source that decides numbers are
    recorded and are those that most runs have.
    """
    facts = [(entry, _facts(entry, names[entry.run.key, entry.run.method])) for entry in entries]
    counted: dict[str, Counter[str]] = {}
    for what, value, _ in {(what, value, entry.run.key): None for entry, own in facts for what, value in own.items()}:
        counted.setdefault(what, Counter())[value] += 1
    usual = {what: min(values, key=lambda value: (-values[value], value)) for what, values in counted.items()}
    found = {}
    for entry, own in facts:
        run = entry.run
        source = {what: value for what, value in own.items() if what.startswith(SOURCE)}
        same_source = all(value == usual[what] != NOT_RECORDED for what, value in source.items())
        if entry.by is not None:
            name = names[run.key, run.method]
            found[run.key, ""] = Deviation(name, run.key, run.seed is not None, IMPORTED, entry.by, "")
        for what, value in own.items():
            if value != usual[what] and not (what == "commit" and same_source):
                name, said = names[run.key, run.method], what.partition("|")[0]
                found[run.key, what] = Deviation(name, run.key, run.seed is not None, said, value, usual[what])
    return [found[key] for key in sorted(found)]


def unlike_notes(found: Sequence[Entry], names: Mapping[tuple[str, str], str]) -> tuple[str, ...]:
    """A note for each method of a table whose runs were made differently from most, or by somebody else."""
    return tuple(f"¶ {capitalised(sentence)}." for sentence in unlike_sentences(deviations(found, names)))


def unlike_sentences(found: Iterable[Deviation]) -> tuple[str, ...]:
    """`runs of kit, conv were made differently from most: torch 2.1.0 instead of 2.13.0`, one for all methods alike."""
    by_method: dict[str, list[Deviation]] = {}
    for one in found:
        by_method.setdefault(one.method, []).append(one)
    alike: dict[str | None, list[str]] = {}
    for method, own in by_method.items():
        alike.setdefault(deviation_text(own), []).append(method)
    return tuple(f"runs of {', '.join(methods)} were {text}" for text, methods in alike.items())


def deviation_text(found: Sequence[Deviation]) -> str | None:
    """`made differently from most: torch 2.1.0 instead of 2.13.0; threads 64 instead of 1`; None where nothing differs.

    Of runs that are imported, and else like the others: `imported, run by NAME`.
    """
    texts = list(dict.fromkeys(map(str, found)))
    if not texts:
        return None
    return ("made differently from most: " if any(one.what != IMPORTED for one in found) else "") + "; ".join(texts)


def _facts(entry: Entry, name: str) -> dict[str, str]:
    """What decides the last bits of a run's scores, by name. A name behind `|` is one of a method's own."""
    run = entry.run
    environment, scored = run.environment, entry.evaluation.numerics
    flags = ", ".join(f"{flag} {environment.flags[flag]}" for flag in FLAGS if flag in environment.flags)
    commit, _, dirty = (environment.commit or NOT_RECORDED).partition("+")
    facts = {
        "commit": _short(commit) + (f"+{dirty}" if dirty else ""),
        "torch": environment.versions.get("torch", NOT_RECORDED),
    }
    if run.seed is not None:
        facts |= {"threads": str(environment.threads), "flags": flags or NOT_RECORDED, "device": environment.device}
        # How a batch was split; by some attentions (`centres`) more than rounding.
        facts |= {"processes": str(environment.flags.get("processes", 1))}
        facts |= {"micro-batch": str(environment.flags.get("micro_batch") or "none")}
    source = run.source or {}
    parts = ("network", "data", "training") if run.seed is not None else ()
    facts |= {f"{SOURCE}{part}": _short(source.get(part, NOT_RECORDED)) for part in parts}
    facts[f"{SOURCE}attention|{name}"] = _short(source.get("attention", NOT_RECORDED))
    facts[f"{SOURCE}scoring"] = _short(scored.source.get("scoring", NOT_RECORDED) if scored else NOT_RECORDED)
    facts["torch that scored"] = scored.torch if scored else NOT_RECORDED
    facts["threads that scored"] = str(scored.threads) if scored else NOT_RECORDED
    return facts


def _short(digest: str) -> str:
    return digest if digest == NOT_RECORDED else digest[:10]
