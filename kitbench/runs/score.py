"""A cell's evaluations: its images restored and scored, a share of them at a time, and the records written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kitbench.errors import Interrupted, RunError
from kitbench.model.methods import Restore
from kitbench.runs.cell import Cell
from kitbench.runs.checkpoint import trained_state
from kitbench.runs.prepare import PreparedScoring, PreparedSuite, Unit
from kitbench.runs.source import scoring_digest
from kitbench.runs.work import Reporter
from kitbench.scoring import evaluate
from kitbench.scoring.crops import crop_saver
from kitbench.store.folder import RunFolder
from kitbench.store.records import Evaluation, Score
from kitbench.system.environment import numerics
from kitbench.system.interrupt import Stop
from kitbench.system.progress import heartbeat

Numbered = tuple[int, Score]
"""The number of an image in its set, and its score."""


@dataclass(frozen=True)
class Share:
    """Images of one evaluation, by their numbers in the set."""

    unit: Unit
    numbers: tuple[int, ...]


def restorer(prepared: PreparedSuite, cell: Cell) -> Restore:
    """A cell's method as a function of one image: training-free, or with the run's stored weights.

    Raises RunError where the weights are gone, InputError where they are damaged.
    """
    if not cell.trained:
        found = prepared.references[cell.method].restore
        assert found is not None
        return found
    folder = prepared.folder(cell)
    if not folder.weights.is_file():
        raise RunError(f"{folder.weights} is missing, so it cannot be evaluated anew; delete the folder to train again")
    model = prepared.build(cell)
    model.load_state_dict(trained_state(folder))
    model.to(prepared.device).eval()
    return evaluate.network(model, prepared.device, prepared.protocols[cell.mode], prepared.suite.recipe.precision)


def score_share(
    scoring: PreparedScoring, cell: Cell, share: Share, restore: Restore, each: Callable[[Numbered], None]
) -> None:
    """Restore and score some images of one evaluation; `each` is called with every score. Keeps crops."""
    (name, sigma), protocol = share.unit, scoring.protocols[cell.mode]
    photographs = scoring.sets[cell.mode].test[name]
    conditions = evaluate.Conditions(name, scoring.suite.task, sigma, protocol, scoring.lpips.get(protocol.lpips))
    folder = RunFolder(scoring.options.out / cell.folder)
    keep = crop_saver(folder, photographs, name, sigma, protocol.stamp)
    chosen = (photographs[number] for number in share.numbers)
    for number, found in zip(share.numbers, evaluate.scores(restore, chosen, conditions, keep), strict=True):
        each((number, found))


def store_evaluation(scoring: PreparedScoring, cell: Cell, unit: Unit, scores: Sequence[Numbered]) -> None:
    """Write the record of an evaluation, all of whose images are scored."""
    (name, sigma), protocol = unit, scoring.protocols[cell.mode]
    folder = RunFolder(scoring.options.out / cell.folder)
    record = Evaluation(
        key=cell.key, data_set=name, data_sha256=scoring.test_sha256(cell.mode, name), sigma=sigma,
        protocol=protocol, stamp=protocol.stamp, numerics=numerics(scoring_digest()),
        lpips_note=scoring.lpips_notes.get(protocol.lpips), scores=tuple(score for _, score in sorted(scores)),
    )  # fmt: skip
    path = folder.evaluation_path(name, sigma, protocol.stamp)
    folder.write(str(path.relative_to(folder.path)), record)


def score_cell(scoring: PreparedScoring, cell: Cell, restore: Restore, reporter: Reporter, stop: Stop) -> None:
    """Do the evaluations of a cell that are missing, shared with the other processes of the run, if there are any.

    Raises Interrupted between two images once `stop()` is true, and RunError for an image that cannot be scored.
    """
    world, folder = scoring.world, RunFolder(scoring.options.out / cell.folder)
    missing = scoring.missing(cell, folder)
    sizes = {name: len(photos) for name, photos in scoring.sets[cell.mode].test.items()}
    shares = [Share(unit, tuple(range(sizes[unit[0]])[world.rank :: world.size])) for unit in missing]
    total, done = sum(len(share.numbers) for share in shares), 0
    beat = heartbeat(folder, "scoring", total) if world.first else lambda done: None
    for share in shares:
        scores: list[Numbered] = []

        def each(found: Numbered, unit: Unit = share.unit, scores: list[Numbered] = scores) -> None:
            nonlocal done
            scores.append(found)
            done += 1
            beat(done)
            reporter.advance("scoring", done, total, score_text(unit, found[1]))
            if stop() and done < total:
                raise Interrupted(f"stopped while scoring {folder.path.name}; complete evaluations are kept")

        score_share(scoring, cell, share, restore, each)
        everyone = world.gather(scores)
        if world.first:
            store_evaluation(scoring, cell, share.unit, everyone)
    if world.first:
        (folder.path / "progress.json").unlink(missing_ok=True)


def score_text(unit: Unit, score: Score) -> str:
    """Of one image: `CBSD68 sigma 25, 101085: 30.12 dB`"""
    name, sigma = unit
    at = "" if sigma is None else f" sigma {sigma:g}"
    return f"{name}{at}, {score.image}: {'inf' if score.psnr is None else f'{score.psnr:.2f} dB'}"
