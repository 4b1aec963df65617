"""Trackers are told what the run folder keeps, through one seam, and are refused where they are missing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from kitbench.errors import InputError
from kitbench.store.folder import RunFolder
from kitbench.system import tracking
from tests.conftest import Kitbench
from tests.stored import store


class Notebook:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def start(self, folder: RunFolder, step: int) -> None:
        self.told.append(("start", folder.path.name, step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, dict(values)))

    def stop(self) -> None:
        self.told.append("stop")


def test_every_tracker_hears_the_same_and_is_stopped_even_after_an_error(tmp_path: Path) -> None:
    first, second = Notebook(), Notebook()

    def run() -> None:
        with tracking.tracked([first, second], RunFolder(tmp_path / "run"), 4) as log:
            log(10, {"loss": 0.5})
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert first.told == second.told == [("start", "run", 4), (10, {"loss": 0.5}), "stop"]


def test_unknown_and_missing_trackers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="did you mean 'wandb'"):
        tracking.trackers(["wandbb"])

    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    for name in tracking.TRACKERS:
        with pytest.raises(InputError, match=rf"pip install 'kitbench\[{name}\]'"):
            tracking.trackers([name])


def test_tensorboard_shows_the_curves_of_the_log(kitbench: Kitbench, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed; pip install 'kitbench[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kitbench("run", "--suite", "tiny.toml", "--method", "conv", "--track", "tensorboard")
    [folder] = tmp_path.glob("results/*/tensorboard")
    events = EventAccumulator(str(folder)).Reload()
    log = [line.split(",") for line in (folder.parent / "log.csv").read_text().splitlines()[1:]]
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == [int(line[0]) for line in log]
    assert [event.value for event in curve] == pytest.approx([float(line[1]) for line in log], rel=1e-6)
    assert next(event.value for event in events.Scalars("test/skimage-test σ25 psnr_db")) > 10


def test_mlflow_keeps_one_run_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder instead of a server or a database
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed; pip install 'kitbench[mlflow]'")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    stored = store(tmp_path, "kit", 30.0)
    for step in (10, 20):  # the second is a run that goes on
        with tracking.tracked(tracking.trackers(["mlflow"]), stored, step - 10) as log:
            log(step, {"train/loss": 0.5})
    [run] = mlflow.search_runs(experiment_names=["kitbench"], output_format="list")
    assert [m.step for m in mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")] == [10, 20]


def test_weights_and_biases_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed; pip install 'kitbench[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = store(tmp_path, "kit", 30.0)
    with tracking.tracked(tracking.trackers(["wandb"]), folder, 0) as log:
        log(10, {"train/loss": 0.5})
    assert list(folder.path.glob("wandb/offline-run-*/*.wandb"))
