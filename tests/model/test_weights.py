"""Files of weights: read whatever published them, never run, refused in one sentence that names what does not fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from kitbench.errors import InputError
from kitbench.model.weights import fit, read_state


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))


def save(path: Path, state: object) -> Path:
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@given(
    form=st.sampled_from(["zip", "legacy", "safetensors"]),
    place=st.integers(0, 400),
    other=st.binary(min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_damaged_file_is_read_or_refused_in_one_sentence(form: str, place: int, other: bytes, tmp_path: Path) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "legacy":
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=False)
    else:
        save(path, network().state_dict())
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + other + whole[place + len(other) :])
    said = ""
    try:
        read_state(path)
    except InputError as refused:
        said = str(refused)
    assert "\n" not in said


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
@pytest.mark.parametrize("wrap", ["plain", "params", "module"])
def test_every_common_form_gives_the_same_weights(name: str, wrap: str, tmp_path: Path) -> None:
    given, state = network(), network().state_dict()
    with torch.no_grad():
        [p.zero_() for p in given.parameters()]
    if wrap == "module":
        stored: object = {f"module.{key}": tensor for key, tensor in state.items()}
    elif wrap == "params" and not name.endswith(".safetensors"):
        stored = {"epoch": 3, "params": state}
    else:
        stored = state
    path = save(tmp_path / name, stored)
    fit(given, read_state(path), path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in given.state_dict().items())


def test_of_several_state_dicts_one_must_be_named(tmp_path: Path) -> None:
    state = network().state_dict()
    half = {key: tensor / 2 for key, tensor in state.items()}
    path = save(tmp_path / "two.pth", {"params": state, "params_ema": half})
    with pytest.raises(InputError, match=r"several \(params, params_ema\); choose one with --key"):
        read_state(path)
    assert torch.equal(read_state(path, "params_ema")["0.bias"], state["0.bias"] / 2)
    with pytest.raises(InputError, match="no state dict 'ema'; found: params, params_ema"):
        read_state(path, "ema")


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path = save(tmp_path / "trap.pth", {"params": Trap(tmp_path / "sprung")})
    with pytest.raises(InputError, match=r"\(posix\.mkdir\), which is never run"):
        read_state(path)
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.pth", network().state_dict()).read_bytes()
    safe = save(tmp_path / "whole.safetensors", network().state_dict()).read_bytes()
    for name, data in (
        ("half.pth", whole[: len(whole) // 2]), ("half.safetensors", safe[: len(safe) // 2]), ("empty.pth", b""),
        ("text.pth", b"not weights"), ("text.safetensors", b"not weights at all"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name) as refused:
            read_state(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"none\.pth cannot be read"):
        read_state(tmp_path / "none.pth")
    with pytest.raises(InputError, match="contains a list"):
        read_state(save(tmp_path / "list.pth", [torch.zeros(1)]))
    with pytest.raises(InputError, match="it contains none"):
        read_state(save(tmp_path / "numbers.pth", {"epoch": 3}))


def test_what_does_not_fit_is_named_the_first_few(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", network().state_dict()
    with pytest.raises(InputError, match=r"lacks 0\.bias, 0\.weight, 2\.bias and 1 more; it has body\.bias, which"):
        fit(network(), {"body.bias": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"has 0\.weight of \[4, 3, 3, 3\] instead of \[4, 1, 3, 3\]"):
        fit(network(), {**state, "0.weight": torch.zeros(4, 3, 3, 3)}, path)
    before = network()
    with pytest.raises(InputError):
        fit(before, {"0.bias": torch.ones(4)}, path)
    assert torch.equal(before.state_dict()["0.bias"], state["0.bias"])  # nothing half loaded
