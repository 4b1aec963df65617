"""The training log, log.csv: one line every so many steps, written and read here alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

_OPTIONAL = {"seconds_per_step": 0.0, "seconds_data": 0.0, "validation_psnr_db": None}
"""Columns that older logs lack, with what stands for them."""


class LogLine(NamedTuple):
    """Means over the steps since the line before."""

    step: int
    """Steps done."""
    loss: float
    psnr_db: float
    """Of the training batches."""
    lr: float
    """Learning rate of the last step."""
    seconds_per_step: float
    """Without checkpoints and validation."""
    seconds_data: float
    """Of these, seconds spent waiting for data; on CUDA, while the device had nothing left to do."""
    validation_psnr_db: float | None = None
    """Mean over the validation crops, where they were scored after this step."""


def log_text(lines: Sequence[LogLine]) -> str:
    """The log as CSV, every number with all its digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(LogLine._fields)
    writer.writerows(["" if value is None else repr(value) for value in line] for line in lines)
    return text.getvalue()


def parse_log(text: str) -> list[LogLine]:
    """The lines of a log. Raises ValueError where it is no training log."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = set(LogLine._fields) - _OPTIONAL.keys() - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"columns are missing: {', '.join(sorted(missing))}")
    return [_line(row) for row in reader]


def _line(row: dict[str, str]) -> LogLine:
    if None in row or None in row.values():
        raise ValueError("a line has another number of columns than the header")
    values = {name: float(row[name]) if row.get(name) else _OPTIONAL.get(name) for name in LogLine._fields[1:]}
    absent = [name for name, value in values.items() if value is None and name not in _OPTIONAL]
    if absent:
        raise ValueError(f"a line lacks {absent[0]}")
    return LogLine(int(row["step"]), **values)  # type: ignore[arg-type]
