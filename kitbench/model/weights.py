"""Reading files of weights without running code from them, and loading them into a network.

safetensors, or files of torch.save; the latter are pickles, of which only tensors and plain containers are accepted
(torch.load with weights_only).
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kitbench.errors import InputError

NAMED = 3
"""Keys that a message names at most."""


def given_file_sha256(path: Path) -> str:
    """SHA-256 of a file that the user named. Raises InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"Weights file {path} cannot be read ({error.strerror}); give a readable file.") from error


def load_file(path: Path) -> dict[str, Any]:
    """The dictionary in a file of weights, on the CPU. Raises InputError for any other file."""
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise anything on a damaged file
        if isinstance(error, pickle.UnpicklingError):
            if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise InputError(
                    f"{path} contains code ({code[1]}), which is never run: save only its state dict, for example with "
                    "safetensors.torch.save_file."
                ) from error
            reason = "torch did not write it, or it is damaged"
        else:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InputError(f"{path} cannot be read as a file of weights ({reason}): give another file.") from error
    if not isinstance(state, dict):
        raise InputError(
            f"{path} contains a {type(state).__name__}, expected a state dict of tensors: give another file."
        )
    return state


def read_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file: its dictionary, or the dictionary inside it that `key` names or that is the only one.

    A prefix `module.` of all keys, which DataParallel adds, is removed. Raises InputError.
    """
    found = load_file(path)
    inside = sorted(name for name, value in found.items() if isinstance(value, Mapping) and _is_state(value))
    if key is not None:
        if key not in inside:
            raise InputError(f"{path} contains no state dict {key!r}; found: {', '.join(inside) or 'none'}.")
        found = found[key]
    elif not _is_state(found):
        if len(inside) != 1:
            which = f"several ({', '.join(inside)}); choose one with --key" if inside else "none; give another file"
            raise InputError(f"{path} should contain one state dict of tensors, it contains {which}.")
        found = found[inside[0]]
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return dict(found)


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def fit(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load the weights into the network. Raises InputError that names keys or shapes that do not match."""
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    faults = [
        *([f"lacks {_first(missing)}"] if missing else []),
        *([f"has {_first(unknown)}, which the network does not have"] if unknown else []),
        *([f"has {_first([_sizes(n, state[n], own[n]) for n in sorted(shapes)])}"] if shapes else []),
    ]
    if faults:
        raise InputError(f"{path} does not fit the network: it {'; it '.join(faults)}; give weights of this network.")
    network.load_state_dict(state)


def _sizes(name: str, found: Tensor, expected: Tensor) -> str:
    return f"{name} of {list(found.shape)} instead of {list(expected.shape)}"


def _first(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
