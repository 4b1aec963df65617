"""The search for learning rates, shown from its stored record."""

from __future__ import annotations

from tabulate import tabulate

from kitbench.store.records import Tuning


def tuning_table(record: Tuning, form: str = "simple") -> str:
    """Validation PSNR in dB of every method at every rate, the best of each method marked. `form`: of tabulate."""
    psnr = {(trial.method, trial.lr): trial.psnr_db for trial in record.trials}
    lines = [
        [method, *(_cell(psnr[method, rate], rate == best) for rate in record.rates)]
        for method, best in record.best.items()
    ]
    head = ["learning rate", *(f"{rate:g}" for rate in record.rates)]
    grown = "; the grid was widened, since a best rate lay at its edge" if record.widened else ""
    caption = (
        f"{record.suite}, {record.mode}, preset {record.preset}: PSNR in dB on {record.validation} after "
        f"{record.steps} steps, seed {record.seed}; * the method's best{grown}"
    )
    align = ["left"] + ["right"] * len(record.rates)
    return f"{caption}\n\n{tabulate(lines, head, form, disable_numparse=True, colalign=align)}\n"


def _cell(psnr: float | None, best: bool) -> str:
    return "diverged" if psnr is None else f"{psnr:.2f}{'*' if best else ''}"
