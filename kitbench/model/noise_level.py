"""Whole networks that take the noise level beside the image."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from kitbench.errors import InputError


class AtNoiseLevel(nn.Module):
    """A network that takes the noise level, at one level: a network of the image alone.

    sigma: standard deviation of the noise in 8-bit grey levels. The network is called with float [B, 1, 1, 1] that
    holds sigma / 255, on the image's device and in its dtype.
    """

    def __init__(self, network: nn.Module, sigma: float) -> None:
        super().__init__()
        self.network, self.sigma = network, sigma

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        restored: Tensor = self.network(x, x.new_full((x.shape[0], 1, 1, 1), self.sigma / 255))
        return restored


def at_noise_level(network: nn.Module, sigma: float | None, method: str) -> nn.Module:
    """The network as one of the image alone; itself where its forward takes nothing else.

    A second argument of forward is the noise level where it has no default, or is named `sigma`. sigma: in 8-bit grey
    levels; None where the task states none. method: its name, for messages. Raises InputError where forward requires
    other arguments or a noise level that the task does not state, or takes `sigma` in another place where it is stated.
    """
    signature = inspect.signature(network.forward)
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    second = [p for p in signature.parameters.values() if p.kind in places][1:2]
    takes_level = any(p.default is p.empty or p.name == "sigma" for p in second)
    refusal = InputError(
        f"Method {method!r}: forward must take (x), or (x, sigma) where the network needs the noise level, found "
        f"{signature}."
    )
    if sigma is not None and "sigma" in signature.parameters and all(p.name != "sigma" for p in second):
        raise refusal  # it would be left out, and the network scored without
    try:
        signature.bind(*[None] * (1 + takes_level))
    except TypeError as error:
        raise refusal from error
    if not takes_level or (sigma is None and second[0].default is not inspect.Parameter.empty):
        return network
    if sigma is None:
        raise InputError(
            f"Method {method!r} needs the noise level ({second[0].name}), which only tasks of kind denoise state; "
            "choose a suite of such a task."
        )
    return AtNoiseLevel(network, sigma)
