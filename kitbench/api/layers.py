"""`kitbench.attention`: one attention as a layer of your own network."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kitbench.errors import InputError
from kitbench.model.methods import load_method


def attention_layer(name: str | Path, dim: int, heads: int = 1, *, shift: bool = False, **settings: Any) -> nn.Module:
    """An attention of kitbench as a torch module that maps tokens [B, H, W, dim] to the same shape and dtype.

    name: a shipped method (`kit`, `window`, `local`, `global`, ...), or the path of a .py file with a class Attention.
    dim: channels. heads: must divide `dim`. shift: the method's shifted form, in every second block of our networks.
    settings: the method's own, as docs/methods.md lists them; what is not given has its default.
    The residual and the normalisation are left to the network. Called with an input that is empty, or of another layout
    or dtype than its weights, the module raises InputError. Raises InputError for an unknown method or setting, or
    values that do not fit.
    """
    name = str(name)
    loaded = load_method(name)
    if loaded.attention is None:
        raise InputError(
            f"Method {name!r} is no attention layer: it restores whole images; give one with a class Attention, for "
            "example 'kit'."
        )
    for what, number in (("dim", dim), ("heads", heads)):
        if not isinstance(number, Integral) or number < 1:
            raise InputError(f"{what} is {number!r}; give a whole number that is 1 or more.")
    layer = loaded.build(dim, heads, shift, **loaded.resolve(settings))
    layer.register_forward_pre_hook(_Checked(name, dim))
    return layer


@dataclass(frozen=True)
class _Checked:
    """Checks the input of a layer before its forward pass."""

    name: str
    dim: int

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x = arguments[0] if arguments else None
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[3] != self.dim:
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            first = isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == self.dim
            advice = (
                "the channels are in second place, so give x.permute(0, 2, 3, 1), and permute the result back by "
                "(0, 3, 1, 2)"
                if first
                else f"give a tensor whose last axis has {self.dim} channels"
            )
            raise InputError(
                f"Attention {self.name!r} takes tokens [B, H, W, {self.dim}] (channels last), found {found}; {advice}."
            )
        if not x.numel():
            raise InputError(
                f"Attention {self.name!r} was given an empty tensor {list(x.shape)}; give at least one token."
            )
        weights = next(module.parameters(), x)
        if x.dtype != weights.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InputError(
                f"Attention {self.name!r} was given {x.dtype}, its weights are {weights.dtype}; convert one of them, "
                f"or call it under torch.autocast."
            )
