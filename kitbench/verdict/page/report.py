"""`kitbench report`: one self-contained HTML file of stored runs, readable offline and printable; its figures as files.

Verdict, claims, tables, figures, settings, environment, and how to reproduce each number. The page is a Jinja template,
report.html; images and scripts are embedded.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import pandas as pd

from kitbench.errors import InputError
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run
from kitbench.store.sweeps import Sweep
from kitbench.text import capitalised
from kitbench.verdict import published
from kitbench.verdict.claims import claims
from kitbench.verdict.compare import Compared, against_best, equal_seeds, paired_scores
from kitbench.verdict.contrasts import ComparedRuns, blocks
from kitbench.verdict.entries import Entry, entries, labels, suites_by_comparison
from kitbench.verdict.ladder import ladders
from kitbench.verdict.layout import caption_of, detects, layout_of
from kitbench.verdict.page import pictures
from kitbench.verdict.page.figures import Figure, curves_of, galleries_of, ladder_of, pictures_of, scaling, tuning_of
from kitbench.verdict.page.tables import Grid, ablation, differences_of, grid_of, table_of
from kitbench.verdict.rows import rows, split, suites_of
from kitbench.verdict.searches import NONE_SEARCHED, Searches


def report(
    runs: Sequence[RunFolder], sweeps: Sequence[Sweep], searches: Searches = NONE_SEARCHED, protocol: str | None = None
) -> str:
    """The HTML text. Raises InputError where there are no runs, or they cannot be in one table."""
    if not runs:
        raise InputError(
            "There are no runs in these folders, and a report is about runs; of searches and sweeps alone `kitbench "
            "figures` writes the figures, and `kitbench curves` prints searches."
        )
    page = _page(runs, searches, protocol)
    found = page.found
    judged = claims(runs, sweeps, searches, protocol)
    galleries, left_out = galleries_of(found, page.folders)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("kitbench", "verdict/page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    return template.render(
        title=", ".join(dict.fromkeys(entry.run.suite for entry in found)),
        protocol=found[0].evaluation.protocol,
        stamp=found[0].evaluation.stamp,
        sections=page.sections(rows(runs, protocol)),
        claims=judged,
        ladders=page.ladders(),
        searches=[tuning_of(record, page.look) for record in searches.records],
        galleries=galleries,
        left_out=left_out,
        error_full=pictures.ERROR_FULL,
        scaling=[scaling(sweep) for sweep in sweeps],
        published=[
            grid_of(sheet)
            for sheet in published.sheets([(entry.evaluation.data_set, entry.evaluation.condition) for entry in found])
        ],
        settings=_settings(found),
        reproduce=_reproduce(found, page.folders),
        environments=_environments(found),
    ) + "\n"  # fmt: skip


def figures(
    runs: Sequence[RunFolder],
    sweeps: Sequence[Sweep],
    searches: Searches = NONE_SEARCHED,
    protocol: str | None = None,
    form: pictures.Form = "svg",
) -> dict[str, bytes]:
    """The figures of the page, by the names of their files without suffix.

    Raises InputError as `report` does, and where there is none.
    """
    shown: list[Figure] = []
    page = _page(runs, searches, protocol, form)
    for section in page.sections(rows(runs, protocol)) if runs else ():
        shown += section["pictures"]
        shown += section["curves"].pictures if section["curves"] else []
    for drawn, _ in [*page.ladders(), *(tuning_of(record, page.look) for record in searches.records)]:
        shown += drawn
    named: dict[str, bytes] = {}
    for figure in [*shown, *(scaling(sweep, form) for sweep in sweeps)]:
        name = re.sub(r"[^\w.-]", "_", figure.name)  # of a user's suite, whose name may hold anything
        alike = sum(other.partition("+")[0] == name for other in named)  # e.g. at several learning rates
        named[f"{name}+{alike + 1}" if alike else name] = figure.image
    if not named:
        raise InputError("These runs give no figure: that takes a trained run, a sweep or a search of learning rates.")
    return named


def _page(runs: Sequence[RunFolder], searches: Searches, protocol: str | None, form: pictures.Form = "svg") -> _Page:
    found = entries(runs, protocol) if runs else []
    compared = blocks(found)
    names = {m for block in compared for m in block.methods} | {m for record in searches.records for m in record.best}
    look = pictures.Look(pictures.styles(sorted(names)), form)
    return _Page(found, compared, {folder.run.key: folder for folder in runs}, look)


@dataclass(frozen=True)
class _Page:
    """What the sections of a report share."""

    found: Sequence[Entry]
    compared: list[ComparedRuns]
    folders: dict[str, RunFolder]
    look: pictures.Look

    def sections(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """Of each comparison, with the rows of all."""
        return [self.section(block, run) for block, run in split(table, self.found)]

    def ladders(self) -> list[tuple[list[Figure], Grid]]:
        return [ladder_of(ladder, self.look) for ladder in ladders(self.compared)]

    def section(self, block: pd.DataFrame, run: Run) -> dict[str, Any]:
        """Tables and figures of the runs of one comparison."""
        mine = [e for e in self.found if e.run.comparison == run.comparison and e.run.mode == run.mode]
        trained = next(iter(blocks(mine)), None)
        compared = _against_best(trained) if trained else []
        names = labels(self.found)
        given = {names[e.run.key, e.run.method] for e in self.found if "weights_sha256" in e.run.identity}
        title = caption_of(run, suites_of(block))
        return {
            "title": title,
            "verdict": _verdict(block, trained, compared, given),
            "table": table_of(layout_of(block, title)),
            "differences": differences_of([c for c, _ in compared]),
            "ablation": ablation(trained),
            "curves": curves_of(trained, self.folders, self.look) if trained else None,
            "pictures": pictures_of(block, trained, compared, self.look),
        }


def _against_best(block: ComparedRuns) -> list[tuple[Compared, Any]]:
    """Every ranked method against the one with the best mean over all images, worst last, with its differences."""
    methods = {name: block.methods[name] for name in equal_seeds(block.methods)}
    compared = against_best({"all": methods}).get("all", [])
    scores = paired_scores(list(methods.values())) if compared else None
    if scores is None:
        return []
    values = dict(zip(methods, scores.values, strict=True))
    return sorted(((c, values[c.a] - values[c.b]) for c in compared), key=lambda pair: -pair[0].found.mean)


def _verdict(
    block: pd.DataFrame, trained: ComparedRuns | None, compared: Sequence[tuple[Compared, Any]], given: Collection[str]
) -> list[str]:
    """What the runs show about quality, in sentences. given: the methods that were scored with given weights."""
    if trained is None or len(trained.methods) < 2:
        return ["There are fewer than two trained methods, so there is nothing to compare."]
    if not compared:
        return ["No two of the trained methods have the same seeds and test images, so there is nothing to compare."]
    best = compared[0][0].b
    worse = [c.a for c, _ in compared if c.decided]
    level = [c.a for c, _ in compared if not c.decided and c.p_holm is not None]
    undecided = [c for c, _ in compared if c.p_holm is None]
    alike = " with the same seeds" * (len(compared) + 1 < len(trained.methods))
    without = f", {compared[0][0].without}," if compared[0][0].without else ","
    sentences = [f"Over all test images{without} {best} has the highest mean PSNR of the trained methods{alike}."]
    if worse:
        sentences.append(f"It is significantly better than {', '.join(worse)}.")
    if level:
        sentences.append(f"It is not distinguishable from {', '.join(level)}: these runs do not rank them.")
    if undecided:
        sentences.append(f"Nothing is decided about {', '.join(c.a for c in undecided)}: {undecided[0].found.note}.")
    others = trained.methods.keys() - {best, *(c.a for c, _ in compared)}
    if higher := _above(block, others, best):
        sentences.append(f"With other seeds, and so not compared, these have a higher mean: {', '.join(higher)}.")
    for method in _above(block, set(block["method"]) - trained.methods.keys(), best):
        how = "with weights trained elsewhere, scores higher"
        if method not in given:
            how = "without any training, scores higher: these runs were not trained long enough"
        sentences.append(f"{method}, {how}.")
    smallest = [c.detectable for c, _ in compared if c.detectable is not None]
    if smallest:
        sentences.append(detects(max(smallest)))
    notes = dict.fromkeys(c.found.note for c, _ in compared if c.found.note and c.p_holm is not None)
    return sentences + [f"{capitalised(note)}." for note in notes if note]


def _above(block: pd.DataFrame, others: Collection[str], best: str) -> list[str]:
    """Which others have a higher mean than the best compared method, over the columns that both have."""
    table = block.pivot_table(index=["data_set", "condition"], columns="method", values="psnr_db")
    both = {m: table[[best, m]].dropna().mean() for m in table.columns if m in others}
    return [m for m, means in both.items() if means[m] > means[best]]


def _settings(found: Sequence[Entry]) -> list[dict[str, str]]:
    """Everything that determines the numbers: shared parts for each comparison, then settings of each method."""
    shown: dict[str, dict[str, str]] = {}
    suites = suites_by_comparison(found)
    for entry in found:
        run = entry.run
        if run.recipe is not None and run.backbone is not None and run.comparison not in shown:
            shared = {
                "task": run.task.model_dump(mode="json"),
                "backbone": run.backbone.model_dump(mode="json"),
                "recipe": run.recipe.model_dump(mode="json"),
                "training sets": run.train_sets,
            }
            text = json.dumps(shared, indent=1, ensure_ascii=False)
            shown[run.comparison] = {"title": caption_of(run, suites[run.comparison]), "text": text}
    names = labels(found)
    own = {names[e.run.key, e.run.method]: dict(e.run.settings) for e in found if e.run.settings}
    methods = {"title": "Settings of the attentions", "text": json.dumps(dict(sorted(own.items())), indent=1)}
    protocol = found[0].evaluation.protocol.model_dump(mode="json")
    last = {
        "title": f"Protocol {found[0].evaluation.stamp}",
        "text": json.dumps(protocol, indent=1, ensure_ascii=False),
    }
    return [*(shown[key] for key in sorted(shown)), methods, last]


def _reproduce(found: Sequence[Entry], folders: dict[str, RunFolder]) -> list[dict[str, str]]:
    """One row for each run: key, folder, command, commit, and the checksum of its weights."""
    lines = {}
    for entry in sorted(found, key=lambda e: (e.run.method, e.run.seed or 0, e.run.key)):
        environment = entry.run.environment
        lines[entry.run.key] = {
            "key": entry.run.key[:10],
            "folder": folders[entry.run.key].path.name,
            "command": "python -m " + shlex.join(environment.command),
            "commit": environment.commit or f"kitbench {environment.kitbench}",
            "weights": entry.training.weights_sha256[:16] if entry.training else "",
        }
    return list(lines.values())


def _environments(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """The environments of the runs: one entry for all runs of the same machine and versions."""
    shown: dict[str, dict[str, Any]] = {}
    for entry in sorted(found, key=lambda e: e.run.key):
        e = entry.run.environment
        facts = {
            "host": e.host, "device": e.device, "driver": e.driver or "none", "threads": e.threads, "python": e.python,
            **e.versions, **{key: value for key, value in e.flags.items() if value is not None},
        }  # fmt: skip
        one = shown.setdefault(json.dumps(facts, sort_keys=True), {"facts": facts, "runs": {}})
        one["runs"][entry.run.key[:10]] = None
    return [{"facts": one["facts"], "runs": list(one["runs"])} for _, one in sorted(shown.items())]
