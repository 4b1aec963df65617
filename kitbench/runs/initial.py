"""Fine-tuning: the weights of a stored run that training starts from, where the recipe names one (`init`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kitbench.data.own import card_of_set
from kitbench.data.photograph import Photograph
from kitbench.data.repetition import images_of
from kitbench.errors import InputError
from kitbench.model.backbone import UNet
from kitbench.model.weights import fit
from kitbench.runs.checkpoint import trained_state
from kitbench.spec.suite import Suite
from kitbench.store.folder import RunFolder

SHORTEST = 4
"""Digits of a key that are enough to name a run."""


@dataclass(frozen=True)
class InitialWeights:
    """The trained weights of a stored run."""

    folder: RunFolder
    sha256: str
    """Of the weights, as the run's training.json states it; in the key of every run that starts from them."""
    state: Mapping[str, Tensor]

    def put_into(self, model: UNet) -> None:
        """Replace all weights of the network. Raises InputError where it is another network."""
        try:
            fit(model, self.state, self.folder.weights)
        except InputError as error:
            raise InputError(
                f"The weights of recipe.init are those of {self.folder.run.mode} {self.folder.run.method}: {error}"
            ) from error


def stored_run(name: str, out: Path) -> RunFolder:
    """The run that a path names, or the first digits of its key, which is then looked for in `out`.

    Raises InputError where that names no run, or several.
    """
    if (Path(name) / "run.json").is_file():
        return RunFolder(Path(name))
    digits = re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", name)
    runs = [path.parent for path in sorted(out.glob(f"*-{name[:10]}*/run.json"))] if digits else []
    found = [path for path in runs if RunFolder(path).key_begins(name)]
    if not found:
        raise InputError(
            f"{name} is neither the folder of a run nor the beginning of the hash of one in {out} "
            f"({SHORTEST} digits or more); give one of these."
        )
    if len(found) > 1:
        raise InputError(f"{name} begins the hashes of {' and '.join(map(str, found))}; give more digits, or a folder.")
    return RunFolder(found[0])


def initial_weights(suite: Suite, out: Path) -> tuple[Suite, InitialWeights | None]:
    """The weights that the recipe's `init` names; and the suite, with the path of their run instead of a hash.

    Raises InputError where there is no such run, or it has no trained weights.
    """
    if suite.recipe.init is None:
        return suite, None
    try:
        folder = stored_run(suite.recipe.init, out)
    except InputError as error:
        raise InputError(f"recipe.init: {error}") from error
    training = folder.training
    if (origin := folder.origin) is not None and not folder.weights.is_file():
        raise InputError(
            f"recipe.init: {folder.path} was imported without weights (run by {origin.by}); train it into another "
            f"--out."
        )
    if training is None:
        raise InputError(f"recipe.init: {folder.path} has no trained weights; finish that run, or give another one.")
    recipe = suite.recipe.model_copy(update={"init": str(folder.path)})
    weights = InitialWeights(folder, training.weights_sha256, trained_state(folder))
    return suite.model_copy(update={"recipe": recipe}), weights


def seen_images(folder: RunFolder, root: Path | None, say: Callable[[str], object]) -> dict[str, list[Photograph]]:
    """The images that the weights of a run were trained on, by set: its own, and those of the run that it started from,
    and so on. `say` is told of what is not here, and so cannot be compared with test images.
    """
    mode, found, runs = folder.run.mode, dict[str, list[Photograph]](), [folder]
    for one in runs:
        run = one.run
        for name in (name for name in run.train_sets if name not in found):
            try:
                found[name] = images_of(card_of_set(name), root, mode)
            except InputError as error:
                say(f"not compared with the training images of {name}: {error}")
        init = run.recipe.init if run.recipe else None
        if init is not None and all(init != str(before.path) for before in runs):
            if (Path(init) / "run.json").is_file():
                runs.append(RunFolder(Path(init)))
            else:
                say(f"not compared with the training images of {init}, from which {one.path} started: it is not here")
    return found
