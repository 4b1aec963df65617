"""The search for learning rates, shown from its stored record."""

from __future__ import annotations

from tabulate import tabulate

from kitbench.store.records import Tuning
from kitbench.text import counted


def tuning_table(record: Tuning, form: str = "simple") -> str:
    """Validation PSNR in dB of every method at every rate, the best of each method marked. `form`: of tabulate."""
    psnr = {(trial.method, trial.lr): trial.psnr_db for trial in record.trials}
    lines = [
        [method, *(tuning_cell(psnr[method, rate]) + "*" * (rate == best) for rate in record.rates)]
        for method, best in record.best.items()
    ]
    head = ["learning rate", *(f"{rate:g}" for rate in record.rates)]
    align = ["left"] + ["right"] * len(record.rates)
    return f"{tuning_caption(record)}\n\n{tabulate(lines, head, form, disable_numparse=True, colalign=align)}\n"


def tuning_caption(record: Tuning) -> str:
    """What was searched, and what * means."""
    grown = "; the grid was widened, since a best rate lay at its edge" if record.widened else ""
    edge = [method for method, rate in record.best.items() if rate in (record.rates[0], record.rates[-1])]
    beyond = f"; a rate beyond the grid may be better for {', '.join(edge)}" if edge else ""
    return (
        f"{record.suite}, {record.mode}, preset {record.preset}: PSNR in dB on {record.validation} after "
        f"{counted(record.steps, 'step')}, seed {record.seed}; * the method's best{grown}{beyond}"
    )


def tuning_cell(psnr_db: float | None) -> str:
    """The score of a trial as printed."""
    return "diverged" if psnr_db is None else f"{psnr_db:.2f}"
