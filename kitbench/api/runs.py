"""`kitbench.results` and `kitbench.run`: stored runs as a pandas table, and runs made from Python."""

from __future__ import annotations

import json
import os
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import pandas as pd

from kitbench.errors import InputError, RunError
from kitbench.model.methods import method_kinds
from kitbench.spec.loading import load_suite
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Evaluation
from kitbench.verdict.entries import mean_lpips, scored_under


def results_table(
    paths: str | Path | Sequence[str | Path] = "results", *, protocol: str | None = None, per_image: bool = False
) -> pd.DataFrame:
    """Stored runs as a table: one row per run, test set, condition and protocol; with `per_image`, one row per image.

    paths: folders of runs, or folders that contain such folders. protocol: only scores under this one (id or id.vN).
    Columns: what the run was (`run`, `folder`, `run_by`: who made it, where it was imported, `suite`, `preset`, `mode`,
    `method`, `settings`, `seed`, `device`, `recipe`, `steps`), what was scored (`data_set`, `sigma` in grey levels,
    `protocol`), the scores (`psnr_db`, `ssim`, `lpips`) and, one row per run, `images`, `parameters`, `gmacs` at
    `resolution` px, `train_peak_bytes` and `step_seconds`. With `per_image`: `image`, and `seconds` of its restoration.
    What was not measured is missing (NaN).
    Nothing is averaged over seeds: see `python -m kitbench table` for that. Raises InputError.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths) if isinstance(paths, Iterable) else [paths]
    if not all(isinstance(path, str | Path) for path in given):
        raise InputError(f"paths is {paths!r}; give the path of a folder of runs, or a list of paths.")
    return _table(find([Path(path) for path in given]), protocol, per_image)


def _table(runs: Sequence[RunFolder], protocol: str | None, per_image: bool) -> pd.DataFrame:
    pairs = [(folder, evaluation) for folder in runs for evaluation in folder.evaluations()]
    chosen = [pair for pair in pairs if protocol is None or scored_under(pair[1], protocol)]
    if not chosen:
        stamps = ", ".join(sorted({evaluation.stamp for _, evaluation in pairs})) or "none"
        under_it = "" if protocol is None else f" under protocol {protocol!r}"
        raise InputError(f"These runs have no evaluation{under_it}; found protocols: {stamps}.")
    rows: list[dict[str, Any]] = []
    for folder, evaluation in chosen:
        about = _about(folder) | {
            "data_set": evaluation.data_set, "sigma": evaluation.sigma, "protocol": evaluation.stamp,
        }  # fmt: skip
        rows += [about | scores for scores in (_images(evaluation) if per_image else [_means(folder, evaluation)])]
    keys = ["suite", "mode", "method", "seed", "run", "data_set", "sigma", "protocol"]
    return pd.DataFrame(rows).sort_values(keys, kind="stable", ignore_index=True)


def _about(folder: RunFolder) -> dict[str, Any]:
    run, origin = folder.run, folder.origin
    return {
        "run": run.key[:10], "folder": folder.path.name, "run_by": origin.by if origin else None, "suite": run.suite,
        "preset": run.preset, "mode": run.mode, "method": run.method,
        "settings": json.dumps(run.settings, sort_keys=True),
        "seed": pd.NA if run.seed is None else run.seed, "device": run.device,
        "recipe": run.recipe.name if run.recipe else None, "steps": run.recipe.steps if run.recipe else pd.NA,
    }  # fmt: skip


def _images(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for score in evaluation.scores:
        psnr = float("inf") if score.psnr is None else score.psnr
        yield {
            "image": score.image, "psnr_db": psnr, "ssim": score.ssim, "lpips": score.lpips, "seconds": score.seconds,
        }  # fmt: skip


def _means(folder: RunFolder, evaluation: Evaluation) -> dict[str, Any]:
    cost = folder.training.cost if folder.training else folder.run.cost
    macs = cost.stated_macs if cost else None
    return {
        "psnr_db": evaluation.mean_psnr, "ssim": evaluation.mean_ssim, "lpips": mean_lpips(evaluation),
        "images": len(evaluation.scores), "parameters": cost.parameters if cost else pd.NA,
        "gmacs": None if macs is None else macs / 1e9, "resolution": cost.resolution if cost else pd.NA,
        "train_peak_bytes": cost.train_peak_bytes if cost else pd.NA,
        "step_seconds": cost.step_seconds if cost else None,
    }  # fmt: skip


class RunOptions(TypedDict, total=False):
    """What `kitbench.run` takes besides the suite, as the options of the command of the same name."""

    data: str | Path | None
    device: str
    workers: int
    lpips_weights: str | None
    micro_batch: int | None
    jobs: int
    gpus: str | None


LEAST = {"workers": 0, "micro_batch": 1, "jobs": 1}
"""The lowest number that the command takes for an option that is a number."""
DEFAULTS: dict[str, Any] = {"data": None, "device": "auto", "workers": 0, "lpips_weights": None, "jobs": 1}


def run_from_python(
    suite: str | Path,
    *,
    preset: str | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    out: str | Path = "results",
    **options: Unpack[RunOptions],
) -> pd.DataFrame:
    """Train and score the methods of a suite as `python -m kitbench run` does; the table of its runs.

    suite: a shipped suite, or the path of a .toml file. preset, methods, seeds: those of the suite by default; a method
    may be a path of a .py file. settings: changed keys, `{"recipe.steps": 2000}`, as with `--set`. out: the folder of
    the runs; what it holds is not run again. options: those of the command. `jobs`, runs at a time, is 1 by default:
    more start processes, which a script must guard by `if __name__ == "__main__":`.
    Progress is printed. torch's threads, determinism and random state are put back afterwards.
    Returns one row per run, test set, condition and protocol: the columns of `results_table`.
    Raises InputError before anything is written, and RunError where runs failed or were interrupted (state saved).
    """
    _check({"methods": methods, "seeds": seeds, "settings": settings, "out": out}, options)
    suite, seeds = str(suite), list(seeds or ())
    changed = [f"{key}={_toml(key, value)}" for key, value in (settings or {}).items()]
    names = [str(method) for method in methods or ()]
    resolved = load_suite(suite, preset, changed, names, seeds, method_kinds() if names else {})
    from rich.console import Console

    from kitbench.runs.prepare import Options
    from kitbench.runs.queue import run_suite

    chosen: dict[str, Any] = DEFAULTS | options
    chosen["data"] = None if chosen["data"] is None else Path(chosen["data"])
    words = ["run", "--suite", suite, *(["--preset", preset] if preset else [])]
    words += [word for name in names for word in ("--method", name)]
    words += ["--seeds", ",".join(map(str, seeds))] if seeds else []
    words += [word for change in changed for word in ("--set", change)]
    given = {"out": out, **{name: value for name, value in options.items() if value is not None}}
    words += [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with _torch_as_it_was(), _command(words):
        complete, failed = run_suite(resolved, Options(out=Path(out), **chosen), Console(width=140))
    if failed:
        raise RunError(f"{len(failed)} of the suite's runs failed: " + "; ".join(failed))
    return _table(complete, None, per_image=False)


def _check(given: Mapping[str, object], options: Mapping[str, Any]) -> None:
    """Raises InputError for what Python lets pass where the command line would refuse it, and in another thread than
    the main one, in which nobody can wait for Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InputError(
            f"kitbench.run was called in the thread {threading.current_thread().name!r}, where it could not answer "
            f"Ctrl-C; call it in the main thread, or in a process of its own."
        )
    for name in ("methods", "seeds"):
        found = given[name]
        if isinstance(found, str) or not isinstance(found, Iterable | None):
            what = f"the text {found!r}" if isinstance(found, str) else repr(found)
            raise InputError(f"{name} is {what}; give a list, as in {name}=[{found!r}].")
        if found is not None and not list(found):
            raise InputError(f"{name} is empty; leave it out to run those of the suite.")
    settings, out = given["settings"], given["out"]
    if not isinstance(settings, Mapping | None):
        raise InputError(f"settings is {settings!r}; give changed keys, as in settings={{'recipe.steps': 2000}}.")
    if not isinstance(out, str | Path):
        raise InputError(f"out is {out!r}; give the path of a folder.")
    unknown = options.keys() - RunOptions.__annotations__.keys()
    if unknown:
        raise InputError(
            f"run has no option {', '.join(sorted(unknown))}; known: {', '.join(RunOptions.__annotations__)}."
        )
    for name, least in LEAST.items():
        number = options.get(name)
        if number is not None and (not isinstance(number, Integral) or int(number) < least):
            raise InputError(f"{name} is {number!r}; give a whole number that is {least} or more.")


def _toml(key: str, value: Any) -> str:
    """A value as TOML, which for strings, numbers, booleans and lists of them is JSON. Raises InputError for others."""
    try:
        text = json.dumps(value.item() if isinstance(value, np.generic) else value, ensure_ascii=False)
        tomllib.loads(f"value = {text}")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"settings[{key!r}] is {value!r}; give text, a number, True or False, or a list of these."
        ) from error
    return text


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Put the global state of torch that a run changes back at the end."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    benchmark, tf32 = cudnn.benchmark, (cudnn.allow_tf32, matmul.allow_tf32)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        cudnn.benchmark, (cudnn.allow_tf32, matmul.allow_tf32) = benchmark, tf32


@contextmanager
def _command(words: Sequence[str]) -> Iterator[None]:
    """Let the records of runs contain the command that makes them again, not this script's arguments."""
    before = sys.argv
    sys.argv = ["kitbench", *words]
    try:
        yield
    finally:
        sys.argv = before
