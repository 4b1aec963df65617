"""Training is a pure function of the cell, and goes on bit for bit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from kitbench import NUMERICS, methods, suite
from kitbench.backbone import UNet
from kitbench.cell import Cell
from kitbench.data.batches import Batches
from kitbench.data.cards import card, read
from kitbench.errors import Interrupted, RunError
from kitbench.run import state_sha256
from kitbench.store import RunFolder
from kitbench.suite import Recipe
from kitbench.train import decay_groups, learning_rate, loss_of, train

SETS = [
    "backbone.width=8",
    "backbone.head_dim=8",
    "recipe.steps=12",
    "recipe.batch=2",
    "recipe.crop=32",
    "recipe.warmup=2",
]
SUITE = suite.load("denoise", "smoke", [*SETS, "recipe.checkpoint_every=4"])
CPU = torch.device("cpu")


def trained(folder: Path, name: str = "kit", recipe: Recipe = SUITE.recipe, stop_at: int | None = None) -> UNet:
    """Train in `folder`; `stop_at`: as if Ctrl-C had come after so many steps."""
    method = methods.load(name)
    model = UNet(3, SUITE.backbone, method, method.resolve(SUITE.methods[name].settings), 0)
    batches = Batches(read(card("skimage-train"), None, "colour"), SUITE.task, recipe, 5)
    steps = iter(range(1, 10_000))
    train(model, batches, recipe, CPU, RunFolder(folder), 0, lambda *_: None, lambda: next(steps) == stop_at)
    return model


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return state_sha256(trained(folder).state_dict()), _numbers(folder)


def _numbers(folder: Path) -> str:
    """The log without its times."""
    return "\n".join(line.rpartition(",")[0] for line in (folder / "log.csv").read_text().splitlines())


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(
    stop_at: int, tmp_path: Path, uninterrupted: tuple[str, str]
) -> None:
    with pytest.raises(Interrupted, match=f"step {stop_at} of 12"):
        trained(tmp_path, stop_at=stop_at)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    resumed = trained(tmp_path)
    assert (state_sha256(resumed.state_dict()), _numbers(tmp_path)) == uninterrupted


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trained(tmp_path, stop_at=6)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint .* is damaged"):
        trained(tmp_path)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trained(tmp_path, "conv", SUITE.recipe.model_copy(update={"steps": 60}))
    losses = [float(line.split(",")[1]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_steps(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the loss is (nan|inf) within steps"):
        trained(tmp_path, "conv", SUITE.recipe.model_copy(update={"lr": 1e30, "clip": 0.0}))


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    recipe = SUITE.recipe.model_copy(update={"steps": 101, "warmup": 10, "lr": 1.0, "lr_min": 0.1})
    rates = [learning_rate(recipe, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("loss", "expected"), [("l1", 2.0), ("l2", 5.0), ("charbonnier", (math.hypot(1, 1e-3) + math.hypot(3, 1e-3)) / 2)]
)
def test_losses_are_what_they_are_called(loss: str, expected: float) -> None:
    recipe = SUITE.recipe.model_copy(update={"loss": loss})
    assert float(loss_of(torch.tensor([1.0, -3.0]), recipe)) == pytest.approx(expected)


def test_every_parameter_is_optimised_once_and_biases_do_not_decay() -> None:
    method = methods.load("window")
    model = UNet(3, SUITE.backbone, method, method.resolve({}), 0)
    decayed, still = decay_groups(model, 0.02)
    assert (decayed["weight_decay"], still["weight_decay"]) == (0.02, 0.0)
    groups = [{id(p) for p in group["params"]} for group in (decayed, still)]  # type: ignore[attr-defined]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    assert not groups[0] & groups[1]
    assert id(model.head.bias) in groups[1]
    assert id(model.head.weight) in groups[0]


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
        *({"suite": suite.load("denoise", "smoke", [*SETS, o])} for o in (
            "recipe.lr=1e-4", "recipe.loss=l2", "backbone.ffn_ratio=3", "task.sigma_train=[0, 50]")),
    ],
)  # fmt: skip
def test_all_that_decides_numbers_changes_the_key(changes: dict) -> None:
    assert cell(**changes).key != cell().key


def test_nothing_else_changes_the_key() -> None:
    other = suite.load(
        "denoise", "smoke", [*SETS, "recipe.checkpoint_every=7", "task.sigma_test=[15]", "protocol=awgn8", "seeds=[5]"]
    )
    assert cell(suite=other).key == cell().key
    assert dataclasses.replace(cell(), method="renamed").key == cell().key
    assert dataclasses.replace(cell(), method="renamed").folder != cell().folder


def test_only_method_and_seed_leave_the_comparison_as_it_is() -> None:
    assert cell(attention="window", settings={}, seed=3).comparison == cell().comparison
    assert cell(train_sha256="01").comparison != cell().comparison
    assert cell(seed=None).comparison == ""


GOLDEN = {
    "kit": (0.095644094, 17.64014730),
    "window": (0.095656611, 17.63923782),
    "conv": (0.095608152, 17.64061385),
}
"""Loss and training PSNR of the last two of twelve steps, at NUMERICS 1."""


@pytest.mark.parametrize("name", GOLDEN)
def test_the_numerics_are_those_that_their_version_stands_for(name: str, tmp_path: Path) -> None:
    """Fails where a change moved the numbers of a run: then raise kitbench.NUMERICS and write the new ones here."""
    trained(tmp_path, name)
    last = (tmp_path / "log.csv").read_text().splitlines()[-1].split(",")
    assert NUMERICS == 1
    assert (float(last[1]), float(last[2])) == pytest.approx(GOLDEN[name], rel=2e-5)
