"""Which cells are which: all that decides numbers is in the key of a run, and nothing else.

The golden figures notice a change of the source that moves them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from kitbench import NUMERICS
from kitbench.data.batches import Batches
from kitbench.data.cards import card
from kitbench.data.photograph import read_set
from kitbench.model import methods
from kitbench.runs.cell import Cell, decisive
from kitbench.runs.train import TrainingContext, train
from kitbench.spec import loading
from kitbench.spec.fields import digest
from kitbench.spec.tasks import Kind
from kitbench.store.folder import RunFolder
from kitbench.system.interrupt import Stop
from tests.conftest import ROOT
from tests.runs.test_train import CPU, SETS, SUITE, built


def cell(**changes: object) -> Cell:
    fields = {
        "suite": SUITE, "mode": "colour", "method": "kit", "attention": "kit", "source_sha256": None,
        "settings": {"k": 4}, "seed": 0, "device": "cpu", "train_sha256": "00",
    }  # fmt: skip
    return Cell(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "gray"}, {"attention": "window"}, {"source_sha256": "11"}, {"settings": {"k": 8}}, {"seed": 1},
        {"device": "NVIDIA H100"}, {"train_sha256": "01"},
        *({"suite": loading.load_suite("denoise", "smoke", [*SETS, o])} for o in (
            "recipe.lr=1e-4", "recipe.ema=0.9", "recipe.loss=l2", "backbone.ffn_ratio=3", "task.sigma_train=[0, 50]")),
    ],
)  # fmt: skip
def test_all_that_decides_numbers_changes_the_key(changes: dict) -> None:
    assert cell(**changes).key != cell().key


def test_nothing_else_changes_the_key() -> None:
    other = loading.load_suite(
        "denoise", "smoke", [*SETS, "recipe.checkpoint_every=7", "task.sigma_test=[15]", "protocol=awgn8", "seeds=[5]"]
    )
    assert cell(suite=other).key == cell().key
    assert dataclasses.replace(cell(), method="renamed").key == cell().key
    assert dataclasses.replace(cell(), method="renamed").folder != cell().folder


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results/reference").glob("*/*-s0-*/run.json")), ids=lambda p: p.parent.name
)
def test_stored_runs_keep_their_keys(path: Path) -> None:
    """A setting that recipes got later is no part of the key of a run that does not use it."""
    record = RunFolder(path.parent).run
    assert digest(record.identity) == record.key == json.loads(path.read_text())["key"]
    assert record.recipe is not None
    assert decisive(record.recipe) == record.identity["recipe"]


def test_only_method_and_seed_leave_the_comparison_as_it_is() -> None:
    assert cell(attention="window", settings={}, seed=3).comparison == cell().comparison
    assert cell(train_sha256="01").comparison != cell().comparison
    assert cell(seed=None).comparison == ""


GOLDEN = {
    ("channel", "denoise"): (0.095595419, 17.64242181),
    ("conv", "denoise"): (0.095608152, 17.64061573),
    ("global", "denoise"): (0.095664598, 17.63848728),
    ("global-position", "denoise"): (0.095714957, 17.63402801),
    ("categories", "denoise"): (0.0958297476, 17.61965436),
    ("centres", "denoise"): (0.0955400169, 17.64937209),
    ("graph", "denoise"): (0.0956815928, 17.63668377),
    ("kit", "denoise"): (0.095644094, 17.64014824),
    ("kit-nonadjacent", "denoise"): (0.095658496, 17.63904524),
    ("kit-random", "denoise"): (0.095664784, 17.6384004),
    ("kit-unshifted", "denoise"): (0.095664591, 17.63848869),
    ("local", "denoise"): (0.095655732, 17.63914858),
    ("neighbourhood", "denoise"): (0.095690079, 17.63613315),
    ("overlap", "denoise"): (0.095662326, 17.6385535),
    ("nlsn", "denoise"): (0.0955618471, 17.64361217),
    ("san", "denoise"): (0.095702738, 17.63262217),
    ("sparse", "denoise"): (0.095705315, 17.63466048),
    ("window", "denoise"): (0.095656611, 17.63923829),
    ("conv", "deblur"): (0.01306813, 34.53031063),
    ("conv", "derain"): (0.040972322, 21.28550117),
    ("conv", "denoise-real"): (0.02121911, 29.77172535),
}
"""Loss and training PSNR of the last two of twelve steps, at NUMERICS 1."""
TRAINED = [name for name, (kind, _) in methods.method_cards().items() if kind == "trained"]


def test_every_trained_method_and_every_task_has_golden_figures() -> None:
    assert {name for name, task in GOLDEN if task == "denoise"} == set(TRAINED)
    assert {task for _, task in GOLDEN} == set(get_args(Kind))


@pytest.mark.parametrize(("name", "task"), GOLDEN)
def test_the_numerics_are_those_that_their_version_stands_for(name: str, task: str, tmp_path: Path) -> None:
    """Fails where a change moved the numbers of a run: then raise kitbench.NUMERICS and write the new ones here."""
    suite = loading.load_suite(task, "smoke", [*SETS, "recipe.checkpoint_every=4"])
    batches = Batches(read_set(card("skimage-train"), None, "colour"), suite.task, suite.recipe, 5)
    train(built(name), batches, TrainingContext(CPU, RunFolder(tmp_path), Stop()))
    last = RunFolder(tmp_path).logged()[-1]
    assert NUMERICS == 1
    assert (last.loss, last.psnr_db) == pytest.approx(GOLDEN[name, task], rel=2e-5)
