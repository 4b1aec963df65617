"""`kitbench explain`: draws on an image which patches the patch at a pixel attends to, one panel for each attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch

from kitbench.apply.picture import Picture, read_picture
from kitbench.apply.trained import load_trained
from kitbench.errors import InputError
from kitbench.model.backbone import UNet
from kitbench.store.files import replace_with
from kitbench.store.folder import RunFolder

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the backend was chosen: no display is needed
from matplotlib.patches import Rectangle


@dataclass(frozen=True)
class Choice:
    """The patches that a query patch attends to in one attention, in pixels: (left, top, width, height), itself first.

    A shifted grid wraps around: a patch across the border is drawn at its top left corner.
    """

    name: str
    patches: list[tuple[int, int, int, int]]


class Pixel(NamedTuple):
    """A place in a picture: column and row, from 0."""

    x: int
    y: int


def choices(model: UNet, picture: Picture, at: Pixel, device: torch.device) -> list[Choice]:
    """The patches that the patch at a pixel attends to, in every attention with a method `attended`.

    One pass over the whole picture. Raises InputError for a pixel outside the picture, for a network without such an
    attention, and for a grid of patches that does not divide its map.
    """
    height, width = picture.pixels.shape[:2]
    if not (0 <= at.x < width and 0 <= at.y < height):
        raise InputError(f"The pixel {at.x},{at.y} lies outside the picture of {width} x {height}; give one inside.")
    found: dict[str, Choice] = {}
    coarsest = 1 << (len(model.config.blocks) - 1)
    padded = -(-height // coarsest) * coarsest
    handles = [
        module.register_forward_hook(_listener(name, found, at, padded))
        for name, module in model.attentions()
        if hasattr(module, "attended")
    ]
    if not handles:
        raise InputError(
            "This run's attention does not say which patches it attends to; give a run of kit, of one of its variants, "
            "or of a method of your own that has attended(x)."
        )
    full = np.float32(np.iinfo(picture.pixels.dtype).max)
    image = torch.from_numpy(picture.pixels.astype(np.float32) / full).permute(2, 0, 1)
    channels = model.head.in_channels
    image = image.mean(0, keepdim=True) if channels == 1 else image.expand(channels, -1, -1)
    with torch.inference_mode():
        model(image[None].to(device))
    for handle in handles:
        handle.remove()
    return list(found.values())


def _listener(name: str, found: dict[str, Choice], at: Pixel, padded: int) -> Any:
    def after(module: Any, arguments: tuple[torch.Tensor], _: torch.Tensor) -> None:
        tokens = arguments[0]  # [1, h, w, C]: the map is a power of two smaller than the padded image
        rows, columns = tokens.shape[1:3]
        stride = padded // rows
        chosen, across = module.attended(tokens)
        wide, high = _patch(module, (columns, rows), (across, chosen.shape[1] // across))
        roll = getattr(module, "roll", 0)
        row, column = (at.y // stride - roll) % rows // high, (at.x // stride - roll) % columns // wide
        patches = []
        for number in chosen[0, row * across + column].tolist():
            left, top = (number % across * wide + roll) % columns, (number // across * high + roll) % rows
            patches.append((left * stride, top * stride, wide * stride, high * stride))
        found[name] = Choice(f"{name}: {columns} x {rows} map, {wide} x {high} patches", patches)

    return after


def _patch(module: Any, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a patch in positions of a map (columns, rows) that a grid (columns, rows) of patches covers.

    Raises InputError where the attention does not say them and the grid does not divide the map.
    """
    if hasattr(module, "patch"):
        return module.patch, module.patch
    if size[0] % grid[0] or size[1] % grid[1]:
        raise InputError(
            f"attended(x) names {grid[0]} x {grid[1]} patches, into which a map of {size[0]} x {size[1]} does not "
            "divide; give the attention an attribute `patch`, the side of its square patches."
        )
    return size[0] // grid[0], size[1] // grid[1]


def draw_choices(picture: Picture, choices: list[Choice], at: Pixel, path: Path) -> None:
    """One panel for each attention: the query patch in yellow, its neighbours numbered in order of similarity."""
    full = np.iinfo(picture.pixels.dtype).max
    shown = np.repeat(picture.pixels, 3, 2) if picture.pixels.shape[2] == 1 else picture.pixels
    columns = min(3, len(choices))
    rows = -(-len(choices) // columns)
    height = 5.0 * picture.pixels.shape[0] / picture.pixels.shape[1] + 0.5
    with plt.rc_context({"font.size": 9}):
        figure, grid = plt.subplots(
            rows, columns, figsize=(5 * columns, height * rows), squeeze=False, layout="constrained"
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, choice in zip(grid.flat, choices, strict=False):
            axes.imshow(shown / full)
            for number, (left, top, wide, high) in list(enumerate(choice.patches))[::-1]:
                colour = "#ffd400" if number == 0 else "#00d5ff"
                for width, edge in ((3.5, "black"), (1.8, colour)):
                    axes.add_patch(
                        Rectangle((left - 0.5, top - 0.5), wide, high, fill=False, edgecolor=edge, linewidth=width)
                    )
                if number:
                    box = {"boxstyle": "round,pad=0.15", "facecolor": "black", "edgecolor": "none", "alpha": 0.7}
                    corner = (left + wide, top)
                    offset = {"xytext": (3, 0), "textcoords": "offset points", "annotation_clip": False}
                    axes.annotate(str(number), corner, color="white", va="center", fontsize=7, bbox=box, **offset)
            axes.plot([at.x], [at.y], "+", color="#ffd400", markersize=9)
            axes.set_title(choice.name)
        replace_with(path, lambda aside: figure.savefig(aside, format=path.suffix[1:].lower() or "png", dpi=110))
        plt.close(figure)


def explain_pixel(
    image: Path, folder: RunFolder, method_file: Path | None, at: Pixel, device: torch.device, out: Path
) -> list[Choice]:
    """Draw and return the neighbours that a run's attentions find for a pixel of an image. Raises InputError."""
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"The suffix of {out} is not a format to draw in; use .png, .svg or .pdf.")
    picture = read_picture(image)
    if out.exists() and out.samefile(image):
        raise InputError(f"--out {out} is the picture that is explained; give another file.")
    model, _ = load_trained(folder, method_file, device)
    found = choices(model, picture, at, device)
    draw_choices(picture, found, at, out)
    return found
