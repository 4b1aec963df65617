"""Scores that others published (kitbench/published/*.toml), for the table "published, not run here"."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any, Literal

from kitbench.spec.fields import Frozen
from kitbench.spec.messages import parse
from kitbench.spec.tasks import condition
from kitbench.verdict.compare import Column, heading

HEADING = "Published, not run here"
CAUTION = (
    "Trained on other data with other recipes, and scored under other protocols: do not rank these figures against the "
    "rows above. Each is quoted from the source in the last column."
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


def lines(columns: set[Column] | None = None) -> list[list[str]]:
    """Rows (method, task, data set, metric, dB, read in) of the figures at these (data set, condition); of all without.

    A model without any printed score is a row with n/a, where another row has its task.
    """
    found = []
    for model in published():
        for figure in model.figures:
            column = figure.data_set, condition(figure.sigma)
            if columns is None or column in columns:
                found.append(
                    [
                        model.method,
                        model.task,
                        heading(column),
                        figure.metric,
                        f"{figure.psnr_db:.2f}",
                        model.source,
                    ]
                )
    tasks = {line[1] for line in found}
    return found + [
        [m.method, m.task, "", "", "n/a", m.source] for m in published() if not m.figures and m.task in tasks
    ]


def records(columns: set[Column]) -> list[dict[str, Any]]:
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


HEADER = ["Method", "Task", "Data set", "Metric", "dB", "Read in"]
