"""The trained network of a stored run."""

from __future__ import annotations

from pathlib import Path

import torch

from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.runs.checkpoint import trained_state
from kitbench.seeds import derive
from kitbench.spec.fields import CHANNELS
from kitbench.store.folder import RunFolder
from kitbench.store.records import Run


def load_trained(folder: RunFolder, method_file: Path | None, device: torch.device) -> tuple[UNet, Run]:
    """The trained network of a run, in evaluation mode. Raises InputError where there is none or it does not fit.

    method_file: as in `trained_method`.
    """
    loaded, run = trained_method(folder, method_file), folder.run
    assert run.backbone is not None
    model = UNet(CHANNELS[run.mode], run.backbone, loaded, dict(run.settings), derive(run.seed, "model"))
    try:
        model.load_state_dict(trained_state(folder))
    except RuntimeError as error:
        fault = str(error).splitlines()[0]
        raise InputError(f"{folder.weights} does not fit the run's network ({fault}); train the run again.") from error
    return model.to(device).eval(), run


def trained_method(folder: RunFolder, method_file: Path | None) -> methods.Loaded:
    """The method of a trained run. Raises InputError where the run is not trained, or weights or method are not here.

    method_file: the Python file of a method that is not shipped; it must be the one that the run was trained with.
    """
    run = folder.run
    if run.backbone is None or run.seed is None or run.recipe is None:
        raise InputError(f"{folder.path} is a run of the training-free method {run.method}; give a trained run.")
    if (origin := folder.origin) is not None and not folder.weights.is_file():
        raise InputError(
            f"{folder.path} was imported without weights (run by {origin.by}); train it into another --out."
        )
    if folder.trained and not folder.weights.is_file():
        raise InputError(
            f"{folder.path} is stored without its weights; train it again with `kitbench reproduce {folder.path} "
            "--out DIR`, and give the run in DIR."
        )
    if not folder.trained:
        raise InputError(f"{folder.path} contains no {folder.weights.name}; finish the run, or give another one.")
    shipped = run.attention in methods.shipped()
    if not shipped and method_file is None:
        raise InputError(f"{run.method} is not a shipped method; give its Python file with --method FILE.")
    loaded = methods.load_method(run.attention if shipped else str(method_file), run.method)
    if not shipped and loaded.source_sha256 != run.attention:
        raise InputError(f"{method_file} is not the version that {folder.path.name} was trained with; give that one.")
    return loaded
