"""Training curves where people watch them: one seam of three calls, `start`, `log`, `stop`, whatever stands behind it.

The run folder stays the record of truth: a tracker receives what the folder keeps anyway, decides no number, and may be
left out. TensorBoard writes beside the run; Weights & Biases and MLflow go where their own environment variables say
(WANDB_MODE=offline, MLFLOW_TRACKING_URI).
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from kitbench.errors import InputError, nearest
from kitbench.store.folder import RunFolder

Log = Callable[[int, Mapping[str, float]], None]
"""Called with (steps done, values by name)."""


class Tracker(Protocol):
    """The seam. Its module is imported when it is made, so that a missing package is reported before training."""

    def start(self, folder: RunFolder, step: int | None) -> None:
        """A run begins or goes on, its training behind `step` (None: it is trained). Its record is in the folder."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def stop(self) -> None: ...


class TensorBoard:
    """Event files in the run's own folder: `tensorboard --logdir results`."""

    def __init__(self) -> None:
        self._writer_class: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def start(self, folder: RunFolder, step: int | None) -> None:
        # What was logged behind the checkpoint that a run goes on from is logged again.
        self._writer = self._writer_class(
            str(folder.path / "tensorboard"), purge_step=None if step is None else step + 1
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def stop(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `kitbench`, known by the key of the run."""

    def __init__(self) -> None:
        self._wandb: Any = importlib.import_module("wandb")

    def start(self, folder: RunFolder, step: int | None) -> None:
        run = folder.run
        self._run = self._wandb.init(
            project="kitbench", id=run.key[:32], name=folder.path.name, group=run.suite, config=run.identity,
            dir=str(folder.path), resume="allow",
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def stop(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment `kitbench`, known by its tag `kitbench.key`."""

    def __init__(self) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")

    def start(self, folder: RunFolder, step: int | None) -> None:
        run, flow = folder.run, self._mlflow
        flow.set_experiment("kitbench")
        known = flow.search_runs(filter_string=f"tags.`kitbench.key` = '{run.key}'", output_format="list")
        if known:
            flow.start_run(run_id=known[0].info.run_id)
            return
        flow.start_run(run_name=folder.path.name, tags={"kitbench.key": run.key})
        flow.log_params({"suite": run.suite, "method": run.method, "mode": run.mode, "seed": run.seed, **run.settings})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def stop(self) -> None:
        self._mlflow.end_run()


TRACKERS: Mapping[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def trackers(names: Sequence[str]) -> list[Tracker]:
    """The trackers of these names. Raises InputError for an unknown name or a package that is missing."""
    made = []
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"--track {name} is not known; {nearest(name, TRACKERS)}")
        try:
            made.append(TRACKERS[name]())
        except ImportError as error:
            raise InputError(f"--track {name} needs its package ({error}); pip install 'kitbench[{name}]'.") from error
    return made


@contextmanager
def tracked(made: Sequence[Tracker], folder: RunFolder, step: int | None) -> Iterator[Log]:
    """Tell all trackers of one run while the block runs; the block calls what it is given."""

    def log(step: int, values: Mapping[str, float]) -> None:
        for tracker in begun:
            tracker.log(step, values)

    begun: list[Tracker] = []
    try:
        for tracker in made:
            tracker.start(folder, step)
            begun.append(tracker)
        yield log
    finally:
        for tracker in begun:
            tracker.stop()


def logged_steps(folder: RunFolder) -> int:
    """Up to which step the log of a run's last checkpoint goes."""
    log = folder.logged()
    return log[-1].step if log else 0


def test_means(folder: RunFolder) -> dict[str, float]:
    """Mean PSNR (over images where it is finite) and SSIM of every stored evaluation of a run."""
    means = {}
    for evaluation in folder.evaluations():
        name = f"test/{' '.join((evaluation.data_set, evaluation.condition)).strip()}"
        finite = [score.psnr for score in evaluation.scores if score.psnr is not None]
        if finite:
            means[f"{name} psnr_db"] = statistics.mean(finite)
        means[f"{name} ssim"] = statistics.mean(score.ssim for score in evaluation.scores)
    return means
