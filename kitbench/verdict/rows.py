"""Rows: the long form of a table, from stored runs alone.

A row per method, data set, noise level and protocol: the mean over seeds of the mean over images. Trained rows of a
comparison that have the same seeds are ranked; rows with other seeds, and references without training, are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from kitbench.store.folder import RunFolder
from kitbench.store.records import Run
from kitbench.verdict.compare import Column, Columns, Compared, against_best, equal_seeds
from kitbench.verdict.entries import Entry, entries, labels, mean_psnr, mean_ssim, suites_by_comparison
from kitbench.verdict.provenance import Deviation, deviation_text, deviations
from kitbench.verdict.retrieval import noted
from kitbench.verdict.statistics import mean_interval

_Key = tuple[str, ...]
"""Comparison, mode, method as it is called, data set, condition."""


def rows(runs: Sequence[RunFolder], protocol: str | None = None) -> pd.DataFrame:
    """The long form, sorted. PSNR in dB, memory in bytes, times in seconds, GMACs at `resolution` px."""
    found = entries(runs, protocol)
    names = labels(found)
    groups: dict[_Key, list[Entry]] = {}
    for entry in found:
        key = (
            entry.run.comparison, entry.run.mode, names[entry.run.key, entry.run.method],
            entry.evaluation.data_set, entry.evaluation.condition,
        )  # fmt: skip
        groups.setdefault(key, []).append(entry)
    to_best, ranked = _to_best(groups)
    unlike = _deviations(found, names)
    table = pd.DataFrame(
        [
            _row(key, group, to_best.get(key))
            | {"ranked": key in ranked, "deviation": deviation_text(unlike.get((key[0], key[1], key[2]), []))}
            for key, group in groups.items()
        ]
    )
    # Where a table decides anything, a row that cannot be compared (too few images in its column) is marked as well.
    decides = table.groupby(["mode", "comparison"])["p_holm"].transform(lambda p: p.notna().any())
    table.loc[decides & table["best"].notna() & table["p_holm"].isna(), "within_noise"] = True
    order = table["comparison"].map(_comparison_order(found))
    trained = table["seeds"] != "-"
    # References come first, the weakest (the input) on top; then trained methods by name.
    weakest = table.groupby("method")["psnr_db"].transform("mean").where(~trained, 0)
    return (
        table.assign(_order=order, _trained=trained, _weakest=weakest)
        .sort_values(["mode", "_order", "_trained", "_weakest", "method", "data_set", "sigma"], kind="stable")
        .drop(columns=["_order", "_trained", "_weakest"])
        .reset_index(drop=True)
    )


def split(table: pd.DataFrame, found: Sequence[Entry]) -> Iterator[tuple[pd.DataFrame, Run]]:
    """The rows that may be compared, block by block, each with a run that shares what the block shares.

    References stand in every block, in the columns that its trained rows have; those of other columns in a block of
    their own.
    """
    described = {(entry.run.mode, entry.run.comparison[:10]): entry.run for entry in found}
    for mode in dict.fromkeys(table["mode"]):
        here = table[table["mode"] == mode]
        places = pd.Series(list(zip(here["data_set"], here["condition"], strict=True)), here.index)
        free = here["comparison"] == ""
        shown: set[Column] = set()
        for comparison in dict.fromkeys(here["comparison"][~free]):
            trained = here["comparison"] == comparison
            columns = set(places[trained])
            shown |= columns
            block, references = here[trained], here[free & places.isin(columns)]
            marks = _marks_beside(found, (mode, comparison), columns)
            marked = references.assign(deviation=[marks.get(method) for method in references["method"]])
            yield pd.concat([marked.astype(block.dtypes), block]), described[mode, comparison]
        left = here[free & ~places.isin(shown)]
        if len(left):
            yield left, described[mode, ""]


def _marks_beside(found: Sequence[Entry], block: tuple[str, str], columns: set[Column]) -> dict[str, str | None]:
    """By reference, what made it unlike the rows of a block (mode and comparison) that has these columns."""
    mode, comparison = block
    beside = [
        entry
        for entry in found
        if (entry.run.mode == mode and entry.run.comparison[:10] in (comparison, ""))
        and (entry.evaluation.data_set, entry.evaluation.condition) in columns
    ]
    unlike: dict[str, list[Deviation]] = {}
    for deviation in deviations(beside, labels(found)):
        if not deviation.trained:
            unlike.setdefault(deviation.method, []).append(deviation)
    return {method: deviation_text(own) for method, own in unlike.items()}


def _deviations(
    found: Sequence[Entry], names: Mapping[tuple[str, str], str]
) -> dict[tuple[str, str, str], list[Deviation]]:
    """What made a row unlike the rows that it is printed with, by comparison, mode and name of the row."""
    blocks: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        blocks.setdefault((entry.run.comparison, entry.run.mode), []).append(entry)
    unlike: dict[tuple[str, str, str], list[Deviation]] = {}
    for (comparison, mode), own in blocks.items():
        references = blocks.get(("", mode), []) if comparison else []
        for deviation in deviations([*own, *references], names):
            where = comparison if deviation.trained else ""
            unlike.setdefault((where, mode, deviation.method), []).append(deviation)
    return unlike


def _to_best(groups: dict[_Key, list[Entry]]) -> tuple[dict[_Key, Compared], set[_Key]]:
    """Every ranked row against the best of its column, corrected over the comparison's table; and the ranked rows."""
    tables: dict[str, dict[tuple[str, str, str], dict[str, Columns]]] = {}
    for (comparison, mode, method, data_set, condition), group in groups.items():
        if comparison:
            columns = tables.setdefault(comparison, {}).setdefault((mode, data_set, condition), {})
            columns[method] = {(data_set, condition): group}
    found: dict[_Key, Compared] = {}
    ranked: set[_Key] = set()
    for comparison, table in sorted(tables.items()):
        chosen = {
            where: {method: methods[method] for method in sorted(equal_seeds(methods))}
            for where, methods in sorted(table.items())
        }
        ranked |= {(comparison, mode, method, *column) for (mode, *column), of in chosen.items() for method in of}
        for (mode, *column), compared in against_best(chosen).items():
            found |= {(comparison, mode, one.a, *column): one for one in compared}
    return found, ranked


def _row(key: _Key, group: list[Entry], to_best: Compared | None) -> dict[str, Any]:
    comparison, mode, method, data_set, condition = key
    group = sorted(group, key=lambda entry: entry.run.seed or 0)
    first = group[0]
    cost = first.training.cost if first.training else first.run.cost
    macs = cost.stated_macs if cost else None
    retrieval = noted(group)
    steps = [entry.training.cost.step_seconds for entry in group if entry.training]
    alone = bool(steps) and None not in steps
    lpips = [_mean([score.lpips for score in entry.evaluation.scores]) for entry in group]
    peaks = [entry.training.cost.train_peak_bytes for entry in group if entry.training]
    return {
        "comparison": comparison[:10],
        "suite": first.run.suite,
        "recipe": first.run.recipe.name if first.run.recipe else "",
        "device": first.run.device,
        "mode": mode,
        "method": method,
        "form": first.run.settings.get("form"),
        "data_set": data_set,
        "sigma": first.evaluation.sigma,
        "condition": condition,
        "psnr_db": _mean([mean_psnr(entry) for entry in group]),
        "psnr_pm_seeds": _half([mean_psnr(entry) for entry in group]),
        "ssim": _mean([mean_ssim(entry) for entry in group]),
        "ssim_pm_seeds": _half([mean_ssim(entry) for entry in group]),
        "lpips": _mean(lpips),
        "images": len(first.evaluation.scores),
        "seeds": ",".join(str(entry.run.seed) for entry in group) if first.training else "-",
        "parameters": cost.parameters if cost else None,
        "gmacs": macs / 1e9 if macs is not None else None,
        "gmacs_needed": cost.macs_needed / 1e9 if cost and cost.macs_needed is not None else None,
        "gmacs_note": cost.macs_note if cost else None,
        "resolution": cost.resolution if cost else None,
        "train_peak_bytes": _mean(peaks),
        "seconds_per_step": _mean(
            steps if alone else [entry.training.seconds_per_step for entry in group if entry.training]
        ),
        "contended": None
        if alone
        else max([entry.training.contended or 0 for entry in group if entry.training], default=None),
        "protocol": first.evaluation.stamp,
        "best": to_best.b if to_best else None,
        "to_best_db": to_best.found.mean if to_best else None,
        "to_best_low": to_best.found.interval.low if to_best and to_best.found.interval else None,
        "to_best_high": to_best.found.interval.high if to_best and to_best.found.interval else None,
        "p_holm": to_best.p_holm if to_best else None,
        "within_noise": not to_best.decided if to_best and to_best.p_holm is not None else None,
        "detectable_db": to_best.detectable if to_best else None,
        "statistics_note": to_best.found.note if to_best else None,
        "retrieval": None if retrieval is None else str(retrieval),
        "runs": ",".join(entry.run.key[:10] for entry in group),
    }


def _half(values: Sequence[float]) -> float | None:
    """Half the 95 % interval over seeds; None for one seed."""
    found = mean_interval(values)
    return None if found is None else (found.high - found.low) / 2


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of all values; None where there is none, or where one of them was not measured."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def suites_of(block: pd.DataFrame) -> list[str]:
    """The suites of the trained rows of a block; of all where none is trained."""
    trained = block[block["comparison"] != ""]
    return sorted(set((trained if len(trained) else block)["suite"]))


def _comparison_order(found: Sequence[Entry]) -> dict[str, str]:
    """Sorts blocks by suites, recipe and key, whatever the order of the folders."""
    suites = suites_by_comparison(found)
    return {
        run.comparison[:10]: "/".join(
            (*sorted(suites[run.comparison]), run.recipe.name if run.recipe else "", run.comparison)
        )
        for run in (entry.run for entry in found)
    }
