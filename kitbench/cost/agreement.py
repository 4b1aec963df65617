"""The multiply-adds that a table row states: a closed form, checked against two counters that work differently.

1. torch's FlopCounterMode on fake tensors (flops.py), at the size of the row.
2. fvcore on the traced graph (second_counter.py), which computes: at a size that takes a moment on any machine.

Where closed form and counters agree to 1 % the row carries no note; otherwise one that says what differs. Of a network,
closed form and count may differ by 1 % of its attention's multiply-adds: those of the rest would hide an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kitbench.cost.flops import Count, count_module
from kitbench.cost.second_counter import count_fvcore
from kitbench.errors import METHOD_ERRORS

TOLERANCE = 0.01
COMPARED_SIDES = (256, 192, 128, 96, 64)
"""Sides in pixels at which the two counters may be compared."""
COMPARED_MACS = 2_000_000_000
"""The largest forward pass that is run for the comparison: well below a second on one core."""


@dataclass(frozen=True)
class StatedMacs:
    """Multiply-adds of one forward pass of one image."""

    closed: int | None
    """As the method states them; None where it states none."""
    counted: int | None
    """By torch's counter; None where the method cannot run on fake tensors."""
    note: str | None
    """What a reader of the row must know; None where all three figures agree."""


def state_macs(model: nn.Module, channels: int, side: int, closed: int | None) -> StatedMacs:
    """Count one forward pass of `model` on an image [1, channels, side, side], and compare it with the closed form.

    model: in evaluation mode. closed: the multiply-adds that its author states, if any. Raises nothing that the model
    raises: a method may be anybody's code, and the note then says which figure is missing.
    """
    stated: list[int] = []
    with _attentions_apart(model, stated):
        try:
            counted = count_module(model, (1, channels, side, side))
        except METHOD_ERRORS as error:  # an attention may fail on fake tensors: the row says so
            return StatedMacs(closed, None, f"closed form only: it could not be counted ({type(error).__name__})")
        part = sum(stated) if stated else None
        notes = [
            _without_closed_form(counted)
            if closed is None
            else reconcile(closed, counted.macs, counted.uncounted, part),
            compare_counters(model, channels, {side: counted.macs}),
        ]
    return StatedMacs(closed, counted.macs, "; ".join(note for note in notes if note) or None)


@contextmanager
def _attentions_apart(model: nn.Module, stated: list[int]) -> Iterator[None]:
    """Let every call of an attention inside `model`, which its method `attentions` names, add its closed form.

    What it returns is copied, so that a product which it ends with (a gate) is not taken for a multiply-add because the
    network adds the residual to it: the count of an attention is that of the attention alone.
    """

    def state(attention: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        stated.append(attention.macs(*arguments[0].shape[1:3]))  # type: ignore[operator]

    named = tuple(model.attentions()) if hasattr(model, "attentions") else ()  # type: ignore[operator]
    handles = [module.register_forward_pre_hook(state) for _, module in named if hasattr(module, "macs")]
    handles += [module.register_forward_hook(lambda _, __, found: found.clone()) for _, module in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reconcile(
    closed_form_macs: int, counted_macs: int, uncounted: Mapping[str, int], part: int | None = None
) -> str | None:
    """None where closed form and count agree to 1 %; otherwise one sentence that marks the row.

    part: the share of the closed form that 1 % is taken of, all of it by default.
    """
    if abs(counted_macs - closed_form_macs) <= TOLERANCE * (closed_form_macs if part is None else part):
        return None
    found = f"closed form {closed_form_macs / 1e6:.1f} MMAC, counted {counted_macs / 1e6:.1f}"
    if not uncounted:
        return f"{found}: no operator was left uncounted, so the closed form is wrong"
    return f"{found}: {_without_formula(sorted(uncounted, key=lambda name: -uncounted[name]))}"


def compare_counters(model: nn.Module, channels: int, counted: Mapping[int, int]) -> str | None:
    """None where torch's counter and fvcore agree to 1 % on `model`; otherwise one sentence that marks the row.

    model: in evaluation mode, [1, channels, H, W] to anything. It runs once, on the device where it lies. counted: what
    torch's counter is known to find, by side in pixels.
    """
    try:
        for side in COMPARED_SIDES:
            by_torch = counted[side] if side in counted else count_module(model, (1, channels, side, side)).macs
            if by_torch <= COMPARED_MACS:
                break
    except METHOD_ERRORS as error:  # it may need sides that are multiples of something: the row says so
        return f"checked by one counter only: it cannot be run at {side} px ({type(error).__name__})"
    device = next((p.device for p in model.parameters()), None)
    try:
        by_fvcore, unsupported = count_fvcore(model, torch.zeros(1, channels, side, side, device=device))
    except METHOD_ERRORS as error:  # tracing fails on code that it does not support: the row says so
        return f"checked by one counter only: fvcore could not trace it ({type(error).__name__})"
    if agree(by_torch, by_fvcore):
        return None
    found = f"at {side} px torch's counter finds {by_torch / 1e6:.1f} MMAC, fvcore {by_fvcore / 1e6:.1f}"
    return f"{found}: in fvcore, {_without_formula(sorted(unsupported))}" if unsupported else found


def agree(expected: int, found: int) -> bool:
    """Whether two counts are equal to 1 % of the first."""
    return abs(found - expected) <= TOLERANCE * expected


def _without_closed_form(counted: Count) -> str:
    note = "counted only: the method states no closed form (macs)"
    return f"{note}; {_without_formula(sorted(counted.uncounted))}" if counted.uncounted else note


def _without_formula(operators: Collection[str]) -> str:
    """The first operators that a counter has no formula for."""
    return f"no formula for {', '.join(list(operators)[:4])}"
