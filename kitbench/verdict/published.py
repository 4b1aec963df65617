"""Scores that others published (kitbench/published/*.toml), for the table "published, not run here"."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal

from kitbench.spec.fields import Frozen
from kitbench.spec.messages import parse
from kitbench.spec.tasks import condition
from kitbench.verdict.compare import Column, heading
from kitbench.verdict.sheets import Sheet

HEADING = "Published, not run here"
CAUTION = (
    "Trained on other data with other recipes, and scored under other protocols: do not rank these figures against the "
    "rows of stored runs."
)


class Figure(Frozen):
    """One printed score. PSNR in dB; `metric` states of which channels."""

    data_set: str
    sigma: float | None = None
    psnr_db: float
    metric: Literal["PSNR RGB", "PSNR Y", "PSNR gray"]


class Published(Frozen):
    """The scores of one model on one task, as printed in one source."""

    method: str
    task: Literal["denoise", "deblur", "derain", "denoise-real"]
    paper: str
    source: str
    """Where the scores are printed."""
    weights_sha256: str = ""
    """Of the public file of weights with these scores, if any; `kitbench anchors` compares its scores with them."""
    protocol: str = ""
    """Of the figures with weights: id of the shipped protocol with the conventions of print."""
    figures: tuple[Figure, ...]


@cache
def published() -> tuple[Published, ...]:
    """All published scores, by file name."""
    files = sorted(resources.files("kitbench.published").iterdir(), key=lambda file: file.name)
    return tuple(
        parse(Published, tomllib.loads(file.read_text("utf-8")), f"published figures {file.name}")
        for file in files
        if file.name.endswith(".toml")
    )


def sheets(columns: Sequence[Column]) -> list[Sheet]:
    """For each task with figures at these (data set, condition): models down, columns across in the given order.

    A model without any printed score is a row of n/a where another row has its task.
    """
    tasks = dict.fromkeys(model.task for model in published() if any(_column(f) in columns for f in model.figures))
    return [_sheet(task, columns) for task in tasks]


def _column(figure: Figure) -> Column:
    return figure.data_set, condition(figure.sigma)


def _sheet(task: str, columns: Sequence[Column]) -> Sheet:
    models = [model for model in published() if model.task == task]
    figures = {(m.method, f.metric, m.source, _column(f)): f"{f.psnr_db:.2f}" for m in models for f in m.figures}
    own = [column for column in dict.fromkeys(columns) if any(column == of for *_, of in figures)]
    rows = dict.fromkeys((method, metric, source) for method, metric, source, column in figures if column in own)
    sources = {source: f"[{at}]" for at, source in enumerate(dict.fromkeys(source for _, _, source in rows), 1)}
    lines = [
        (method, metric, sources[source], *(figures.get((method, metric, source, column), "") for column in own))
        for method, metric, source in rows
    ]
    without = [model for model in models if not model.figures]
    return Sheet(
        f"{HEADING}: {task}, PSNR in dB",
        ("Method", "Metric", "Read in", *map(heading, own)),
        (*lines, *((model.method, "", "", *("n/a" for _ in own)) for model in without)),
        (
            CAUTION,
            "Read in: " + "; ".join(f"{sign} {source}" for source, sign in sources.items()) + ".",
            *(f"{model.method}: {model.source}." for model in without),
        ),
    )


def records(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The figures at these (data set, condition) as rows of the long form: `read_in` says where, `protocol` of what."""
    return [
        {
            "method": model.method, "data_set": figure.data_set, "sigma": figure.sigma,
            "condition": condition(figure.sigma), "psnr_db": figure.psnr_db,
            "protocol": f"{figure.metric}, as printed", "read_in": model.source,
        }
        for model in published()
        for figure in model.figures
        if (figure.data_set, condition(figure.sigma)) in columns
    ]  # fmt: skip
