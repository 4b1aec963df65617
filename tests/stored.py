"""Stored runs whose numbers are given, written as the run command writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kitbench.model.methods import load_method
from kitbench.runs.cell import Cell
from kitbench.runs.source import source_digests
from kitbench.spec import loading, suite
from kitbench.spec.fields import Mode, digest
from kitbench.store.folder import RunFolder
from kitbench.store.log import LogLine, log_text
from kitbench.store.records import Cost, Environment, Evaluation, Run, Score, Training
from kitbench.verdict.growth import Part

SUITE = loading.load_suite("denoise", "smoke")
ENVIRONMENT = Environment(
    kitbench="0", commit=None, command=("kitbench", "run"), started="2026-01-01T00:00:00+00:00", host="h", device="cpu",
    driver=None, threads=1, python="3", versions={"torch": "2"}, flags={},
)  # fmt: skip

VALIDATION = {"Validation_A": "bb"}
Settings = dict[str, Any] | None


def store(
    out: Path, method: str, psnr: float | Sequence[float] | np.ndarray, seed: int | None = 0, protocol: str = "awgn8",
    sha256: str = "aa", note: str | None = None, settings: Settings = None, lr: float = 1e-3, ssim: float = 0.5,
    sigma: float | None = 25, data_set: str = "Set_A", macs: int = 2_500_000_000, peak: int = 3 * 2**20,
    needed: int | None = None, seconds_per_step: float = 0.25, calibration: float | None = 0.1, steps: int | None = None, notes: Settings = None,
    of: suite.Suite = SUITE, changed: Sequence[str] = (), attention: str | None = None,
    curve: Mapping[int, float | None] | None = None, step_seconds: float | None = 0.5,
    validation_sets: Mapping[str, str] = VALIDATION, lpips: float | None = None, mode: Mode = "colour",
) -> RunFolder:  # fmt: skip
    """Write a run, or another evaluation of it.

    psnr: the mean of two images, or the value of every image, dB. curve: validation PSNR by step; None makes no log.
    """
    recipe = of.recipe.model_copy(update={"lr": lr} | ({} if steps is None else {"steps": steps}))
    chosen = of.model_copy(update={"recipe": recipe})
    cell = Cell(
        chosen, mode, method, attention or method, None, settings or {}, seed, "cpu", None if seed is None else "00"
    )
    folder = RunFolder(out / cell.folder)
    trained = seed is not None
    record = Run(
        key=cell.key, comparison=cell.comparison, identity=cell.identity(), suite=of.name, preset=of.preset, mode=mode,
        method=method, attention=attention or method, card="", settings=settings or {}, changed=tuple(changed), seed=seed, device="cpu", task=chosen.task,
        backbone=chosen.backbone if trained else None, recipe=chosen.recipe if trained else None, train_sets={},
        validation_sets=dict(validation_sets), environment=ENVIRONMENT,
    )  # fmt: skip
    folder.write("run.json", record)
    if trained:
        cost = Cost(
            parameters=1234, attention_parameters=234, resolution=256, macs=macs, macs_counted=macs, macs_needed=needed, macs_note=note,
            train_peak_bytes=peak, memory_note=None, calibration_seconds=calibration, step_seconds=step_seconds,
        )  # fmt: skip
        training = Training(
            steps=1,
            seconds=1,
            seconds_per_step=seconds_per_step,
            loss=1,
            weights_sha256="0",
            cost=cost,
            notes=notes or {},
        )
        folder.write("training.json", training)
        if curve is not None:
            lines = [LogLine(step, 1.0, 20.0, lr, 0.0, 0.0, value) for step, value in curve.items()]
            folder.log.write_text(log_text(lines))
    stamped = loading.load_suite(of.name, overrides=[f"protocol={protocol}"]).protocol
    values = [psnr - 1, psnr + 1] if isinstance(psnr, float) else list(psnr)
    scores = tuple(Score(image=f"{i}", psnr=float(p), ssim=ssim, lpips=lpips, seconds=0) for i, p in enumerate(values))
    evaluation = Evaluation(
        key=cell.key, data_set=data_set, data_sha256=sha256, sigma=sigma, protocol=stamped, stamp=stamped.stamp,
        lpips_note="n/a", scores=scores,
    )  # fmt: skip
    folder.write(f"eval/{folder.evaluation_path(data_set, sigma, stamped.stamp).name}", evaluation)
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record as a stranger could, with a checksum that fits."""
    raw = json.loads(path.read_text())
    raw.pop("sha256")
    change(raw)
    path.write_text(json.dumps(raw | {"sha256": digest(raw)}))


def renamed(folder: RunFolder) -> RunFolder:
    """The run whose identity was changed, with key, comparison and name that follow from it."""

    def follow(raw: dict[str, Any]) -> None:
        identity = raw["identity"]
        raw["key"] = digest(identity)
        left = {key: value for key, value in identity.items() if key not in ("attention", "settings", "seed")}
        raw["comparison"] = digest(left) if raw["seed"] is not None else ""

    rewrite(folder.path / "run.json", follow)
    key = folder.run.key
    for path in (folder.path / "eval").iterdir():
        rewrite(path, lambda raw: raw.update(key=key))
    before = folder.path.name.rpartition("-")[0]
    return RunFolder(folder.path.rename(folder.path.with_name(f"{before}-{key[:10]}")))


def store_whole(
    out: Path, method: str, seed: int | None = 0, psnr: float | Sequence[float] = 30.0, of: suite.Suite = SUITE,
    lr: float | None = None, settings: Settings = None, **more: Any,
) -> RunFolder:  # fmt: skip
    """Like `store`, with all that the run command records: settings, source, as many steps as the recipe has, a log."""
    recipe = of.recipe.model_copy(update={"lr": lr or of.recipe.lr})
    chosen = load_method(method).resolve(settings or {})
    folder = store(out, method, psnr, seed, lr=recipe.lr, of=of, settings=chosen, **more)
    source = source_digests(method, seed is not None)
    rewrite(folder.path / "run.json", lambda raw: raw.update(source=source))
    numerics = {"source": {"scoring": source["scoring"]}, "torch": "2", "threads": 1, "flags": {}}
    for path in (folder.path / "eval").iterdir():
        rewrite(path, lambda raw: raw.update(numerics=numerics))
    if seed is not None:
        log = log_text([LogLine(recipe.steps, 1.0, 20.0, recipe.lr, 0.0, 0.0)]).encode()
        folder.log.write_bytes(log)
        stated = {"steps": recipe.steps, "log_sha256": hashlib.sha256(log).hexdigest()}
        rewrite(folder.path / "training.json", lambda raw: raw.update(stated))
    return folder


def evidence_of(part: Part) -> str:
    """All that a part of a claim says was measured."""
    return "; ".join(part.facts)


def retrained(folder: RunFolder) -> RunFolder:
    """The same run with other weights than `store` states."""
    assert folder.training is not None
    folder.write("training.json", folder.training.model_copy(update={"weights_sha256": "1"}))
    return folder
