"""Training is a pure function of the cell, and goes on bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from kitbench.data.batches import Batches
from kitbench.data.cards import card
from kitbench.data.photograph import read_set
from kitbench.errors import Interrupted, RunError
from kitbench.model import methods
from kitbench.model.backbone import UNet
from kitbench.runs.checkpoint import state_sha256
from kitbench.runs.train import (
    TrainingContext,
    clip_gradients,
    decay_groups,
    learning_rate,
    loss_of,
    train,
    validation_steps,
)
from kitbench.spec import loading
from kitbench.spec.suite import Recipe
from kitbench.store.folder import RunFolder
from kitbench.system.environment import seed_torch
from kitbench.system.interrupt import Stop

SETS = [
    "backbone.width=8",
    "backbone.head_dim=8",
    "recipe.steps=12",
    "recipe.batch=2",
    "recipe.crop=32",
    "recipe.warmup=2",
]
SUITE = loading.load_suite("denoise", "smoke", [*SETS, "recipe.checkpoint_every=4"])
CPU = torch.device("cpu")


class After(Stop):
    """Calls `act(n)` after the n-th step; its truth asks for a stop, as Ctrl-C would."""

    def __init__(self, act: Callable[[int], bool]) -> None:
        super().__init__()
        self.act, self.steps = act, 0

    def __call__(self) -> bool:
        self.steps += 1
        return self.act(self.steps)


def built(name: str = "kit") -> UNet:
    method = methods.load_method(name)
    settings = SUITE.methods[name].settings if name in SUITE.methods else {}
    return UNet(3, SUITE.backbone, method, method.resolve(settings), 0)


def trained(
    folder: Path, name: str = "kit", recipe: Recipe = SUITE.recipe, stop_at: int | None = None,
    said: list[str] | None = None, model: UNet | None = None, act: Callable[[int], bool] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
) -> UNet:  # fmt: skip
    """Train in `folder`; `stop_at`: as if Ctrl-C had come after so many steps."""
    model = model or built(name)
    batches = Batches(read_set(card("skimage-train"), None, "colour"), SUITE.task, recipe, 5)
    stop = After(act or (lambda step: step == stop_at))
    say = [].append if said is None else said.append
    train(model, batches, TrainingContext(CPU, RunFolder(folder), stop, say=say, validate=validate))
    return model


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return state_sha256(trained(folder).state_dict()), _numbers(folder)


def _numbers(folder: Path) -> str:
    """The log without its times."""
    lines = RunFolder(folder).logged()
    return "\n".join(map(str, (line._replace(seconds_per_step=0.0, seconds_data=0.0) for line in lines)))


@pytest.mark.parametrize("stop_at", [1, 4, 7, 11])
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(
    stop_at: int, tmp_path: Path, uninterrupted: tuple[str, str]
) -> None:
    with pytest.raises(Interrupted, match=f"step {stop_at} of 12"):
        trained(tmp_path, stop_at=stop_at)
    assert (tmp_path / "checkpoint.safetensors").is_file()
    resumed = trained(tmp_path)
    assert (state_sha256(resumed.state_dict()), _numbers(tmp_path)) == uninterrupted


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(where: float) -> Callable[[bytes], bytes]:
    """One bit flipped at a share of the file's length."""

    def change(data: bytes) -> bytes:
        place = int(where * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]

    return change


@pytest.mark.parametrize("damage", [cut, lambda _: b"", *map(flip, (0, 0.002, 0.02, 0.4, 0.7, 1))])
def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_used(
    damage: Callable[[bytes], bytes], tmp_path: Path, uninterrupted: tuple[str, str]
) -> None:
    with pytest.raises(Interrupted):
        trained(tmp_path, stop_at=10)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    said: list[str] = []
    resumed = trained(tmp_path, said=said)
    assert len(said) == 1
    assert "checkpoint.safetensors is damaged" in said[0]
    assert "going on from the one before it, at step 8" in said[0]
    assert (state_sha256(resumed.state_dict()), _numbers(tmp_path)) == uninterrupted


def test_a_crash_between_the_two_renames_of_a_checkpoint_loses_nothing(
    tmp_path: Path, uninterrupted: tuple[str, str]
) -> None:
    with pytest.raises(Interrupted):
        trained(tmp_path, stop_at=10)
    (tmp_path / "checkpoint.safetensors").rename(tmp_path / "checkpoint-previous.safetensors")
    resumed = trained(tmp_path)
    assert (state_sha256(resumed.state_dict()), _numbers(tmp_path)) == uninterrupted


def test_where_no_checkpoint_is_good_the_run_says_so_and_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        trained(tmp_path, stop_at=10)
    paths = [tmp_path / "checkpoint.safetensors", tmp_path / "checkpoint-previous.safetensors"]
    for path in paths:
        path.write_bytes(cut(path.read_bytes()))
    before = [path.read_bytes() for path in paths]
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged .*previous\.safetensors is damaged"):
        trained(tmp_path)
    assert before == [path.read_bytes() for path in paths]


def test_the_moving_average_of_the_weights_is_what_is_left(tmp_path: Path) -> None:
    """Against the recursion itself, a = d a + (1 - d) w, over the weights after every step."""
    recipe = SUITE.recipe.model_copy(update={"ema": 0.75})
    model = built("conv")
    average = {name: p.detach().clone() for name, p in model.named_parameters()}

    def watch(step: int) -> bool:
        for name, p in model.named_parameters():
            average[name] = 0.75 * average[name] + 0.25 * p.detach()
        return False

    trained(tmp_path, "conv", recipe, model=model, act=watch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, average[name])


def test_a_run_with_a_moving_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe = SUITE.recipe.model_copy(update={"ema": 0.9})
    whole = trained(tmp_path / "whole", "conv", recipe)
    with pytest.raises(Interrupted):
        trained(tmp_path / "parts", "conv", recipe, stop_at=7)
    parts = trained(tmp_path / "parts", "conv", recipe)
    assert state_sha256(parts.state_dict()) == state_sha256(whole.state_dict())
    assert state_sha256(whole.state_dict()) != state_sha256(trained(tmp_path / "none", "conv").state_dict())


def test_validation_sees_the_averaged_weights_at_even_steps_and_changes_no_number(tmp_path: Path) -> None:
    recipe = SUITE.recipe.model_copy(update={"ema": 0.9, "steps": 40, "validations": 3})
    seen: list[str] = []

    def validate(model: nn.Module) -> float:
        assert not model.training
        torch.rand(3)  # whatever is drawn here must not move what training draws
        seen.append(state_sha256(model.state_dict()))
        return 20.0 + len(seen)

    model = trained(tmp_path / "curve", "kit", recipe, validate=validate)
    plain = trained(tmp_path / "plain", "kit", recipe)
    assert state_sha256(model.state_dict()) == state_sha256(plain.state_dict()) == seen[-1]
    assert len(set(seen)) == 3
    log = RunFolder(tmp_path / "curve").logged()
    assert {line.step: line.validation_psnr_db for line in log} == {10: None, 20: 21.0, 30: 22.0, 40: 23.0}
    assert [line._replace(validation_psnr_db=None)[:4] for line in log] == [
        line[:4] for line in RunFolder(tmp_path / "plain").logged()
    ]


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(700, 7, {100, 200, 300, 400, 500, 600, 700}), (12, 2, {10, 12}), (20, 0, set()), (5, 50, {5})],
)
def test_validation_steps_are_spread_evenly_and_end_with_the_last(steps: int, count: int, expected: set[int]) -> None:
    recipe = SUITE.recipe.model_copy(update={"steps": steps, "validations": count})
    assert validation_steps(recipe) == expected


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    trained(tmp_path, "conv", SUITE.recipe.model_copy(update={"steps": 60}))
    losses = [float(line.split(",")[1]) for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.8 * losses[0]


def poisoned(at: int, tmp_path: Path, value: float = math.nan) -> str:
    """The sentence of a run whose weights get `value` after the step `at`; checkpoints come after every fourth step."""
    model = built("conv")

    def act(step: int) -> bool:
        if step == at:
            with torch.no_grad():
                model.head.weight[0, 0, 0, 0] = value
        return False

    with pytest.raises(RunError) as caught:
        trained(tmp_path, "conv", model=model, act=act)
    return str(caught.value)


@pytest.mark.parametrize(("at", "kept"), [(1, None), (5, 4), (7, 4), (9, 8), (10, 8)])
def test_a_loss_that_is_not_finite_names_step_and_batch_and_keeps_the_last_good_checkpoint(
    at: int, kept: int | None, tmp_path: Path
) -> None:
    """The step behind the poisoned one is the first to feel it: step `at`, counted from 0."""
    sentence = poisoned(at, tmp_path)
    batches = Batches(read_set(card("skimage-train"), None, "colour"), SUITE.task, SUITE.recipe, 5)
    assert f"the loss is nan at step {at}, on the crops {', '.join(batches.places(at))};" in sentence
    if kept is None:
        assert "there was no checkpoint yet" in sentence
        assert not (tmp_path / "checkpoint.safetensors").exists()
    else:
        with safetensors.safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
            assert file.metadata()["steps"] == str(kept)
            assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


def test_weights_that_went_bad_in_the_last_step_are_not_kept(tmp_path: Path) -> None:
    assert "weights are not finite, though every loss was" in poisoned(12, tmp_path)


def test_a_loss_that_grows_without_bound_stops_the_run(tmp_path: Path) -> None:
    assert re.search(r"the loss is \d[\d.]*e\+\d+ at step 3,", poisoned(3, tmp_path, 1e9))


def test_the_places_of_a_batch_are_where_its_crops_come_from() -> None:
    recipe = SUITE.recipe.model_copy(update={"augment": False})
    photographs = {p.name: p for p in read_set(card("skimage-train"), None, "colour")}
    batches = Batches(list(photographs.values()), SUITE.task, recipe, 5)
    _, clean = batches[3]
    for image, place in zip(clean, batches.places(3), strict=True):
        name, _, corner = place.rpartition(" at ")
        left, top = map(int, corner.split(","))
        crop = photographs[name].pixels[top : top + recipe.crop, left : left + recipe.crop]
        assert torch.equal(image, torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 255)


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


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_clipped_bit_for_bit_as_torch_clips_them(limit: float) -> None:
    models = built(), built()
    for model, clip in zip(models, (clip_gradients, nn.utils.clip_grad_norm_), strict=True):
        model(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().mean().backward()
        model.head.bias.grad = None
        clip(list(model.parameters()), limit)
    for ours, theirs in zip(*(model.named_parameters() for model in models), strict=True):
        if ours[0] == "head.bias":
            assert ours[1].grad is theirs[1].grad is None
        else:
            assert torch.equal(ours[1].grad, theirs[1].grad), ours[0]


def test_the_generator_is_seeded_as_torch_seeds_it() -> None:
    torch.manual_seed(2**62 + 3)
    expected = torch.rand(4)
    seed_torch(2**62 + 3, CPU)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_generators_of_gpus_are_seeded_as_torch_seeds_them() -> None:
    torch.manual_seed(7)
    expected = torch.rand(4, device="cuda")
    seed_torch(7, torch.device("cuda"))
    assert torch.equal(torch.rand(4, device="cuda"), expected)


def test_every_parameter_is_optimised_once_and_biases_do_not_decay() -> None:
    method = methods.load_method("window")
    model = UNet(3, SUITE.backbone, method, method.resolve({}), 0)
    decayed, still = decay_groups(model, 0.02)
    assert (decayed["weight_decay"], still["weight_decay"]) == (0.02, 0.0)
    groups = [{id(p) for p in group["params"]} for group in (decayed, still)]  # type: ignore[attr-defined]
    assert groups[0] | groups[1] == {id(p) for p in model.parameters()}
    assert not groups[0] & groups[1]
    assert id(model.head.bias) in groups[1]
    assert id(model.head.weight) in groups[0]
