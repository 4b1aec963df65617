"""What a trained attention reports of itself, kept with the run: for k-NN retrieval, how well and how far it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from kitbench.model.backbone import UNet
from kitbench.runs.work import CellWork


def attention_notes(work: CellWork, model: UNet) -> dict[str, dict[str, Any]]:
    """What each attention that has a method `report(x)` says of itself on a clean image.

    The image is the first of the first test set, or its first tile; x are the tokens that the attention gets there.
    """
    found: dict[str, dict[str, Any]] = {}

    def listen(name: str, attention: nn.Module) -> None:
        def before(module: nn.Module, arguments: tuple[torch.Tensor]) -> None:
            found[name] = {k: round(v, 4) if isinstance(v, float) else v for k, v in module.report(*arguments).items()}  # type: ignore[operator]

        handles.append(attention.register_forward_pre_hook(before))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name, attention in model.attentions():
        if hasattr(attention, "report"):
            listen(name, attention)
    if handles:
        image = next(iter(work.prepared.sets[work.cell.mode].test.values()))[0].pixels
        side = work.prepared.protocols[work.cell.mode].tile or max(image.shape[:2])
        x = torch.from_numpy(image[:side, :side].transpose(2, 0, 1).astype(np.float32) / 255)[None]
        with torch.inference_mode():
            model(x.to(work.prepared.device))
    for handle in handles:
        handle.remove()
    return found
