"""The command of each cell's worker on a cluster, and where the cells run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True)
class ClusterOptions:
    """What the command line says of where a cluster runs the cells."""

    jobs: int | None
    """Cells at a time."""
    gpus: str | None
    """How many GPUs a cell gets."""
    cpus: int | None
    """CPU cores per cell."""
    partition: str | None
    minutes: int | None


def command(arguments: Sequence[str], label: str, processes: int = 1) -> list[str]:
    """What runs one cell: `run` with these arguments, which are without the launcher's, in so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    shared = torchrun if processes > 1 else []
    return [sys.executable, *shared, "-m", "kitbench", "run", *arguments, "--jobs", "1", "--only", label]


def show(labels: Sequence[str], arguments: Sequence[str], console: Console, processes: int = 1) -> None:
    """What would be run: each cell, and the command that runs it alone."""
    for label in labels:
        words = ["python", *command(arguments, label, processes)[1:]]
        console.print(f"{label:<28}{shlex.join(words)}", highlight=False, soft_wrap=True, markup=False)
