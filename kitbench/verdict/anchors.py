"""`kitbench anchors`: scores of published weights measured here against those that their authors printed.

This validates a protocol. A stored run is compared with a published figure where its weights are the published file (by
checksum), and data set, noise level and channels agree. Each protocol under which it was scored is one row. Where it
has another convention than print, such as rounding where the authors truncate, the row is marked with what differs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from kitbench.errors import InputError
from kitbench.spec.shipped import builtin
from kitbench.spec.suite import Protocol
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Run
from kitbench.verdict.compare import heading
from kitbench.verdict.published import Figure, Published, published

HEADER = ["Model", "Data set", "Metric", "Published dB", "Measured here dB", "Difference", "Protocol", "Published in"]
SIGN = "†"
CONVENTIONS = ("rounding", "border", "space", "shift", "tile")
"""Keys of a protocol that move PSNR by more than another draw of the noise does."""


@dataclass(frozen=True)
class Anchor:
    """One published figure, and the score of the same weights in a stored run. PSNR in dB."""

    model: Published
    figure: Figure
    evaluation: Evaluation
    psnr_db: float
    """Mean over images."""

    @property
    def difference(self) -> float:
        return self.psnr_db - self.figure.psnr_db

    @property
    def unlike_print(self) -> str | None:
        """The conventions of scoring that differ from those of print; None where there are none."""
        if not self.model.protocol:
            return None
        text = builtin("protocols")[self.model.protocol]
        theirs, ours = Protocol.model_validate(tomllib.loads(text)), self.evaluation.protocol
        pairs = [(key, getattr(ours, key), getattr(theirs, key)) for key in CONVENTIONS]
        found = [f"{key} {own} where print has {printed}" for key, own, printed in pairs if own != printed]
        return f"{', '.join(found)} (protocol {theirs.stamp})" if found else None


def anchors(runs: Sequence[RunFolder]) -> list[Anchor]:
    """The stored evaluations with a published figure, by model, data set and protocol. InputError if there is none."""
    found = []
    for folder in runs:
        run = folder.run
        sha256 = run.identity.get("weights_sha256")
        models = [model for model in published() if sha256 is not None and model.weights_sha256 == sha256]
        for evaluation in folder.evaluations() if models else ():
            found += [
                Anchor(model, figure, evaluation, evaluation.mean_psnr)
                for model in models
                for figure in model.figures
                if _is_for(figure, run, evaluation)
            ]
    if not found:
        raise InputError(
            "None of these runs has weights with a figure in kitbench/published; evaluate such a file with "
            "`kitbench eval` first."
        )
    return sorted(found, key=lambda a: (a.model.method, a.figure.data_set, a.figure.sigma or 0, a.evaluation.stamp))


def _is_for(figure: Figure, run: Run, evaluation: Evaluation) -> bool:
    luma = evaluation.protocol.space != "native" and run.mode == "colour"
    metric = "PSNR gray" if run.mode == "gray" else "PSNR Y" if luma else "PSNR RGB"
    return (figure.data_set, figure.sigma, figure.metric) == (evaluation.data_set, evaluation.sigma, metric)


def anchors_markdown(found: Sequence[Anchor]) -> str:
    """A Markdown table and a line for each convention unlike print, ending in a newline."""
    unlike = list(dict.fromkeys(a.unlike_print for a in found if a.unlike_print))
    lines = [
        [
            a.model.method, heading((a.figure.data_set, a.evaluation.condition)), a.figure.metric,
            f"{a.figure.psnr_db:g}", f"{a.psnr_db:.3f}", f"{a.difference:+.3f}",
            a.evaluation.stamp + (SIGN * (unlike.index(a.unlike_print) + 1) if a.unlike_print else ""), a.model.source,
        ]
        for a in found
    ]  # fmt: skip
    align = ["left", "left", "left", "right", "right", "right", "left", "left"]
    table = tabulate(lines, HEADER, tablefmt="pipe", disable_numparse=True, colalign=align) + "\n"
    notes = [f"\n{SIGN * number} Another convention than print: {text}.\n" for number, text in enumerate(unlike, 1)]
    return table + "".join(notes)
