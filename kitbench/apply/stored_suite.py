"""The suite of one stored run alone, from its record: to make the run again, or to score it on other sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.spec.loading import load_suite
from kitbench.spec.suite import Data, Method, Protocol, SetNames, Source, Suite
from kitbench.spec.tasks import Denoise
from kitbench.store.records import Run


def suite_of(
    record: Run, test: Sequence[str], sigmas: Sequence[float | None], protocol: Protocol, method_file: Path | None
) -> Suite:
    """The run's own task, network, recipe and seed, with these test sets under this protocol.

    sigmas: noise levels of a denoising run; the task's own where there is none. method_file: of a method that is not
    shipped. Raises InputError where that is missing, or is not the one that the run was made with.
    """
    blank = load_suite("denoise", "smoke")
    task = record.task
    if isinstance(task, Denoise) and sigmas:
        task = task.model_copy(update={"sigma_test": tuple(dict.fromkeys(sigmas))})
    # A suite must name training sets, also where its only method is training-free.
    train = tuple(record.train_sets) or blank.data.embedded.colour.train  # type: ignore[union-attr]
    sets = SetNames(train=train, test=tuple(dict.fromkeys(test)))
    source = Source.model_validate({"modes": (record.mode,), record.mode: sets})
    changes = {
        "name": record.suite, "preset": record.preset, "title": "one run again", "task": task,
        "data": Data(embedded=source, folder=source), "protocol": protocol,
    }  # fmt: skip
    attention = record.attention
    if attention not in methods.shipped():
        if method_file is None:
            raise InputError(f"{record.method} is not a shipped method; give its Python file with --method FILE.")
        if methods.load_method(str(method_file)).source_sha256 != attention:
            raise InputError(f"{method_file} is not the version that the run was made with; give that one.")
        attention = str(method_file)
    if record.seed is None:
        return blank.model_copy(update=changes | {"methods": {}, "references": (record.method,)})
    own = {key: value for key, value in record.settings.items() if key not in record.changed}
    method = Method(attention=attention, settings=record.settings, own=own)
    return blank.model_copy(
        update=changes
        | {
            "methods": {record.method: method}, "references": (), "seeds": (record.seed,),
            "backbone": record.backbone, "recipe": record.recipe,
        }
    )  # fmt: skip
