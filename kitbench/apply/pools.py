"""`kitbench pools`: trained runs scored again in tiles of several sizes, from their stored weights.

A run is scored on the sets and at the noise levels that it was scored on before. Each size of tiles is a protocol of
its own (kitbench/spec/pools.py), and each evaluation a record in the run's folder like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kitbench.apply.trained import load_trained, trained_method
from kitbench.data.own import card_of_set
from kitbench.data.photograph import Photograph
from kitbench.data.repetition import images_of
from kitbench.errors import InputError, Interrupted
from kitbench.model.backbone import UNet
from kitbench.model.methods import Restore
from kitbench.runs.sets import set_sha256
from kitbench.runs.source import scoring_digest
from kitbench.scoring import evaluate
from kitbench.scoring.lpips import LPIPS
from kitbench.scoring.perceptual import lpips_missing
from kitbench.spec.fields import Mode, digest
from kitbench.spec.pools import pool_protocol
from kitbench.spec.suite import Protocol
from kitbench.spec.tasks import Denoise
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Run, Score
from kitbench.system.environment import make_repeatable, numerics
from kitbench.system.interrupt import Stop


@dataclass
class PoolScoring:
    """Scores runs at several sizes of tiles. Sets and LPIPS networks are read once for all runs."""

    sizes: Sequence[int]
    """Sides of the tiles in pixels, 0 for whole images."""
    data_sets: Sequence[str]
    """The test sets to score on; empty: all that a run was scored on."""
    root: Path | None
    device: torch.device
    method_file: Path | None = None
    lpips_weights: str | None = None
    _sets: dict[tuple[str, Mode], list[Photograph]] = field(default_factory=dict)
    _lpips: dict[str, LPIPS] = field(default_factory=dict)
    _notes: dict[str, str | None] = field(default_factory=dict)
    """By network: why it is missing."""

    def missing(self, folder: RunFolder) -> list[tuple[Evaluation, Protocol]]:
        """What is still to be scored of a run: an evaluation of the same images, and the protocol to score by.

        Raises InputError for sets that the run was not scored on, or whose images here are others, and where something
        is to be scored without weights or method.
        """
        run = folder.run
        found: dict[tuple[str, float | None, str], tuple[Evaluation, Protocol]] = {}
        for evaluation in folder.evaluations():
            if self.data_sets and evaluation.data_set not in self.data_sets:
                continue
            for size in self.sizes:
                protocol = pool_protocol(evaluation.protocol, size)
                found.setdefault((evaluation.data_set, evaluation.sigma, protocol.stamp), (evaluation, protocol))
        if not found:
            wanted = f"none of {', '.join(self.data_sets)}" if self.data_sets else "no set"
            raise InputError(f"{folder.path} was scored on {wanted} yet; score it first, with `kitbench run`.")
        todo = [
            (like, protocol)
            for like, protocol in found.values()
            if folder.evaluation(like.data_set, self._checked(run, like), like.sigma, protocol.stamp) is None
        ]
        if todo:
            trained_method(folder, self.method_file)
        for _, protocol in todo:
            self._why_missing(protocol)
        return todo

    def score(self, folder: RunFolder, stop: Stop, advance: Callable[[int, int], None]) -> int:
        """Score and store what is missing of a run; the number of evaluations that were made.

        advance: called with the images done and their total. Raises InputError as `missing`, Interrupted between two
        images once `stop()` is true, RunError for an image that cannot be scored.
        """
        todo = self.missing(folder)
        if not todo:
            return 0
        run = folder.run
        assert run.recipe is not None
        make_repeatable(run.recipe)
        model, _ = load_trained(folder, self.method_file, self.device)
        model.lay_out(torch.channels_last if run.recipe.channels_last else torch.contiguous_format)
        total = sum(len(self.photographs(like.data_set, run.mode)) for like, _ in todo)
        done = 0
        with folder.lock():
            for like, protocol in todo:
                restore, conditions = self._scorer(run, model, like, protocol)
                scores: list[Score] = []
                for photo in self.photographs(like.data_set, run.mode):
                    if stop():
                        raise Interrupted(f"stopped while scoring {folder.path.name}; complete evaluations are kept")
                    scores += evaluate.scores(restore, [photo], conditions)
                    done += 1
                    advance(done, total)
                record = Evaluation(
                    key=run.key, data_set=like.data_set, data_sha256=like.data_sha256, sigma=like.sigma,
                    protocol=protocol, stamp=protocol.stamp, numerics=numerics(scoring_digest()),
                    lpips_note=self._why_missing(protocol),
                    scores=tuple(scores),
                )  # fmt: skip
                path = folder.evaluation_path(like.data_set, like.sigma, protocol.stamp)
                folder.write(str(path.relative_to(folder.path)), record)
        return len(todo)

    def photographs(self, name: str, mode: Mode) -> list[Photograph]:
        """The images of a test set. Raises InputError where they are not here."""
        if (name, mode) not in self._sets:
            self._sets[name, mode] = images_of(card_of_set(name), self.root, mode)
        return self._sets[name, mode]

    def _scorer(
        self, run: Run, model: UNet, like: Evaluation, protocol: Protocol
    ) -> tuple[Restore, evaluate.Conditions]:
        """The network as a function of an image, and under which conditions images are scored."""
        assert run.recipe is not None
        net = protocol.lpips
        if net != "none" and net not in self._lpips and self._why_missing(protocol) is None:
            self._lpips[net] = LPIPS(net, self.lpips_weights)
        restore = evaluate.network(model, self.device, protocol, run.recipe.precision)
        return restore, evaluate.Conditions(like.data_set, run.task, like.sigma, protocol, self._lpips.get(net))

    def _why_missing(self, protocol: Protocol) -> str | None:
        """Why a protocol's LPIPS cannot be computed. Raises InputError for a file of weights that cannot be used."""
        if protocol.lpips not in self._notes:
            self._notes[protocol.lpips] = (
                None if protocol.lpips == "none" else lpips_missing(protocol.lpips, self.lpips_weights)
            )
        return self._notes[protocol.lpips]

    def _checked(self, run: Run, like: Evaluation) -> str:
        """The digest of a test set's images here, which must be those that the run was scored on."""
        photographs = self.photographs(like.data_set, run.mode)
        sha256 = set_sha256(photographs)
        if not isinstance(run.task, Denoise) and any(photo.degraded is None for photo in photographs):
            sha256 = digest([sha256, run.task.model_dump(mode="json")])
        if sha256 != like.data_sha256:
            raise InputError(
                f"The images of {like.data_set} here are not those that run {run.key[:10]} was scored on; give the "
                f"folder with the same version by --data, or choose other sets with --test-set."
            )
        return sha256
