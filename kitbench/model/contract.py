"""Checks before any training that a method keeps its contract: what `kitbench.attention` states, and what every run
relies on without saying it in a signature: that a network can be built again from its stored weights, and that the
restoration of an image depends on nothing but that image.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from kitbench.errors import METHOD_ERRORS, InputError, describe_error, own_place, short_path
from kitbench.model.methods import Loaded

if typing.TYPE_CHECKING:
    import torch
    from torch import nn


def check_method(method: Loaded, levels: Mapping[int, tuple[int, int, int]], settings: Mapping[str, Any]) -> None:
    """Run the attention forward and backward at each level's (channels, heads, side) before any training, and what else
    a run will call of it: `macs`, `needed_macs`, `report` and `attended`.

    Raises InputError where it fails; returns another shape or dtype than its input's, or values that are not finite;
    has trainable parameters without a gradient, for which DistributedDataParallel would wait forever; or where its
    result in evaluation mode depends on more than the input and the stored weights.
    """
    for level, (dim, heads, side) in levels.items():
        for shift in (False, True):
            build = _builder(method, dim, heads, shift, settings)
            where = f"Method {method.name!r}, level {level} (input [2, {side}, {side + 1}, {dim}], {heads} heads)"
            module, x = build(), _tokens(side, dim)
            try:
                fault = _trial(module, x)
                if fault is None and method.source_sha256 is not None:  # of shipped ones a test checks it
                    fault = _unrepeatable(module, build, x.detach())
                if fault := fault or _extras(module, x):
                    raise InputError(f"{where}, shift={shift}: {fault}.")
            except InputError:
                raise
            except METHOD_ERRORS as error:
                told = describe_error(error)
                if own_place(error) is None:
                    told += _forward_of(module, _tokens(side, dim))
                raise InputError(f"{where} failed: {told}.") from error


def _builder(method: Loaded, dim: int, heads: int, shift: bool, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A function that builds the attention, with torch seeded as the backbone seeds it: always alike."""
    import torch

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return method.build(dim, heads, shift, **settings)

    return build


def _tokens(side: int, dim: int) -> torch.Tensor:
    import torch

    return torch.randn(2, side, side + 1, dim, generator=torch.Generator().manual_seed(0), requires_grad=True)


def _trial(module: nn.Module, x: torch.Tensor) -> str | None:
    """What is wrong with a forward and a backward pass; None where nothing is."""
    import torch

    inside = [(name, vars(part)) for name, part in module.named_modules()]
    plain = [f"{name}.{key}".lstrip(".") for name, own in inside for key in own if isinstance(own[key], torch.Tensor)]
    if plain:
        return (
            f"{', '.join(plain)} is a plain tensor, which stays behind when the network moves to a GPU; register it by "
            "register_buffer, or make it a parameter"
        )
    y = module(x)
    if fault := _fault(y, x):
        return f"{fault}; return one value per position and channel"
    if not y.requires_grad:
        return (
            "forward returned values without a gradient; compute them by torch operators, without no_grad, detach, "
            ".data or NumPy"
        )
    y.square().mean().backward()
    if idle := [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]:
        return (
            f"no gradient reaches {', '.join(idle)}; remove parameters that do not affect the result, or register them "
            "as buffers"
        )
    return None


def _unrepeatable(module: nn.Module, build: Callable[[], nn.Module], x: torch.Tensor) -> str | None:
    """What the result in evaluation mode depends on besides the input and the stored weights; None where nothing.

    module: after a training pass, which may have changed what is not stored. x: [B, H, W, C], B above 1.
    """
    import torch

    with torch.inference_mode():
        module.eval()
        first = module(x)
        if not torch.equal(first, module(x)):
            return (
                "in evaluation mode two calls with the same input returned different values, so that no score could be "
                "reproduced; keep no state between calls, do not write into the input, and draw random numbers from a "
                "generator with a fixed seed"
            )
        apart = torch.cat([module(image) for image in x.split(1)])
        if not torch.allclose(first, apart, rtol=1e-3, atol=1e-4):
            return (
                "in evaluation mode the result of an image depends on the others of its batch (largest difference "
                f"{float((first - apart).abs().max()):.3g}); compute statistics for each image of [B, H, W, C] alone"
            )
        if not torch.equal(first, _again(module, build)(x)):
            return (
                "built again and given the stored weights (state_dict), it returns other values, so that the scored "
                "network would not be the trained one; keep what training changes in parameters or persistent buffers "
                "(register_buffer), and draw random constants by torch"
            )
        again = _again(module, build)
        again(0.5 * x.flip(1))
        again(2 * x.flip(2))
        if not torch.equal(first, again(x)):
            return (
                "in evaluation mode the result depends on the inputs of earlier calls, so that scores would depend on "
                "the order of images; keep no state between calls"
            )
    return None


def _again(module: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """The module as scoring gets it: built again, with the stored weights, in evaluation mode."""
    again = build()
    again.load_state_dict(module.state_dict())
    return again.eval()


def _extras(module: Any, x: torch.Tensor) -> str | None:
    """What is wrong with what `macs`, `needed_macs`, `report` and `attended` return, where the module has them.

    None where nothing is. x: [B, H, W, C].
    """
    import torch

    for name in ("macs", "needed_macs"):
        if hasattr(module, name):
            macs = getattr(module, name)(x.shape[1], x.shape[2])
            if type(macs) is not int or macs < 0:
                return (
                    f"{name}(height, width) returned {macs!r}, expected a whole number (int) of multiply-adds of one "
                    "image, 0 or more"
                )
    if hasattr(module, "needed_macs") and not hasattr(module, "macs"):
        return "it has needed_macs but no macs(height, width), the multiply-adds executed; add it"
    with torch.inference_mode():
        module.eval()
        if hasattr(module, "report"):
            report = module.report(x.detach())
            try:
                json.dumps(dict(report))
            except (TypeError, ValueError) as error:
                return f"report(x) must return a dictionary of numbers and texts, which JSON can hold: {error}"
        if hasattr(module, "attended") and not _are_patches(module.attended(x.detach()), len(x)):
            return (
                "attended(x) must return the patches that each patch attends to, int64 [B, N, k], itself first, "
                "numbered row by row from 0, and the number of columns of their grid (int)"
            )
    return None


def _are_patches(found: Any, batch: int) -> bool:
    """Whether `found` is what a method `attended` must return for a batch of so many images."""
    import torch

    if not (isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], torch.Tensor)):
        return False
    patches, columns = found
    if patches.dtype != torch.int64 or patches.dim() != 3 or len(patches) != batch or not patches.numel():
        return False
    count = patches.shape[1]
    whole_rows = type(columns) is int and columns >= 1 and count % columns == 0
    itself_first = bool((patches[..., 0] == torch.arange(count, device=patches.device)).all())
    return whole_rows and itself_first and int(patches.min()) >= 0 and int(patches.max()) < count


def _forward_of(module: nn.Module, x: torch.Tensor) -> str:
    """The line of the forward pass whose gradient failed, found by torch's anomaly mode; empty where it finds none."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(Exception), torch.autograd.detect_anomaly():  # it fails again; the warning before it is wanted
            module(x).square().mean().backward()
    file = inspect.getfile(type(module))
    lines = re.findall(rf'File "{re.escape(file)}", line (\d+)', "\n".join(str(warning.message) for warning in caught))
    return f", in the gradient of {short_path(file)}:{lines[-1]}" if lines else ""


def check_network(method: Loaded, network: nn.Module, channels: int, device: torch.device) -> None:
    """Run a whole network on a small image of odd sides. Raises InputError where it fails or returns another shape."""
    import torch

    x = torch.rand(1, channels, 61, 47, generator=torch.Generator().manual_seed(0)).to(device)
    where = f"Method {method.name!r} (input {list(x.shape)})"
    try:
        with torch.inference_mode():
            fault = _fault(network(x), x)
    except METHOD_ERRORS as error:
        raise InputError(f"{where} failed: {describe_error(error)}.") from error
    if fault:
        raise InputError(f"{where}: {fault}; pad inside forward where the network needs multiples.")


def _fault(y: Any, x: torch.Tensor) -> str | None:
    """What is wrong with the output y of a forward pass of x; None where nothing is."""
    import torch

    returned = tuple(y.shape) if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
    dtype = [y.dtype] if isinstance(y, torch.Tensor) else []
    if returned != tuple(x.shape) or y.dtype != x.dtype:
        return (
            f"forward returned {' '.join(map(str, (returned, *dtype)))}, expected the shape of its input, "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if not bool(torch.isfinite(y).all()):
        return "forward returned values that are not finite (NaN or infinity)"
    return None


def check_restore(method: Loaded, channels: int, sigma: float | None) -> None:
    """Run a training-free method on a small image. Raises InputError where it fails or returns another shape."""
    assert method.restore is not None
    image = np.random.default_rng(0).random((32, 33, channels), dtype=np.float32)
    try:
        restored, again = (method.restore(image.copy(), sigma) for _ in range(2))
    except METHOD_ERRORS as error:
        raise InputError(f"Method {method.name!r} failed on {image.shape}: {describe_error(error)}.") from error
    if getattr(restored, "shape", None) != image.shape or not np.isfinite(restored).all():
        found = getattr(restored, "shape", type(restored).__name__)
        raise InputError(
            f"Method {method.name!r}: restore returned {found}, expected finite values of shape {image.shape}."
        )
    if not np.array_equal(restored, again):
        raise InputError(
            f"Method {method.name!r}: restore returned different values for one image in two calls, so that no score "
            "could be reproduced; draw random numbers from a generator with a fixed seed, and keep no state."
        )
