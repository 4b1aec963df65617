"""`kitbench anchors`: what published weights score here, beside what their authors printed: the proof of a protocol.

A stored run is set beside a published figure where its weights are the very file (by checksum) whose scores were
published, and data set, noise level and channels agree. Every protocol that it was scored under is a line of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from kitbench.errors import InputError
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Run
from kitbench.verdict.compare import heading
from kitbench.verdict.entries import Entry, mean_psnr
from kitbench.verdict.published import Figure, Published, published

HEADER = ["Model", "Data set", "Metric", "Published dB", "Measured here dB", "Difference", "Protocol", "Published in"]


@dataclass(frozen=True)
class Anchor:
    """One published figure, and what the same weights scored in a stored run. PSNR in dB."""

    model: Published
    figure: Figure
    evaluation: Evaluation
    psnr_db: float
    """Mean over images."""

    @property
    def difference(self) -> float:
        return self.psnr_db - self.figure.psnr_db


def anchors(runs: Sequence[RunFolder]) -> list[Anchor]:
    """Every stored evaluation that a published figure speaks of, by model, data set and protocol. Raises InputError."""
    found = []
    for folder in runs:
        run = folder.run
        sha256 = run.identity.get("weights_sha256")
        models = [model for model in published() if sha256 is not None and model.weights_sha256 == sha256]
        for evaluation in folder.evaluations() if models else ():
            psnr = mean_psnr(Entry(run, None, evaluation))
            found += [
                Anchor(model, figure, evaluation, psnr)
                for model in models
                for figure in model.figures
                if _speaks_of(figure, run, evaluation)
            ]
    if not found:
        raise InputError(
            "None of these runs has weights whose scores are published in kitbench/published; "
            "evaluate such a file with `kitbench eval` first."
        )
    return sorted(found, key=lambda a: (a.model.method, a.figure.data_set, a.figure.sigma or 0, a.evaluation.stamp))


def _speaks_of(figure: Figure, run: Run, evaluation: Evaluation) -> bool:
    luma = evaluation.protocol.space == "y" and run.mode == "colour"
    metric = "PSNR gray" if run.mode == "gray" else "PSNR Y" if luma else "PSNR RGB"
    return (figure.data_set, figure.sigma, figure.metric) == (evaluation.data_set, evaluation.sigma, metric)


def anchors_markdown(found: Sequence[Anchor]) -> str:
    """The table of the README, ending in a newline."""
    lines = [
        [
            a.model.method, heading((a.figure.data_set, a.evaluation.condition)), a.figure.metric,
            f"{a.figure.psnr_db:g}", f"{a.psnr_db:.3f}", f"{a.difference:+.3f}", a.evaluation.stamp, a.model.source,
        ]
        for a in found
    ]  # fmt: skip
    align = ["left", "left", "left", "right", "right", "right", "left", "left"]
    return tabulate(lines, HEADER, tablefmt="pipe", disable_numparse=True, colalign=align) + "\n"
