"""Generated images of known repetition: for every patch it is known which other patches are its exact copies.

Two sets with the same scenes, side by side: `Repetition`, and `Repetition-none`, in which every copy is replaced by new
content of the same kind. A scene is one of two:

- copies: a ground without repetition, on which squares stand twice, at a known distance;
- periodic: one square, repeated over the whole image.

The ground is value noise: sums of linearly interpolated random grids of 64 px down to 2 px, the finer the weaker.
All arithmetic is in integers on raw bits of Philox, whose stream NumPy guarantees, so that the pixels are the same on
every platform; the checksums on the cards state them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from kitbench.data.cards import Card
from kitbench.data.images import to_gray
from kitbench.data.locate import files_of_set
from kitbench.data.own import require_readable_as_shown
from kitbench.data.photograph import Photograph, read_set
from kitbench.data.pixels import pixel_sha256
from kitbench.errors import InputError
from kitbench.seeds import derive
from kitbench.spec.fields import Mode

WITH, WITHOUT = "Repetition", "Repetition-none"
"""The names of the two sets."""
CONTRAST = {64: 60, 32: 50, 16: 40, 8: 34, 4: 28, 2: 22}
"""Largest deviation in grey levels of each grid of the ground, by its spacing in pixels."""
TINT = 3
"""Each channel deviates from the common grey by up to a third of that."""


@dataclass(frozen=True)
class Scene:
    """One image of the sets."""

    kind: Literal["copies", "periodic"]
    side: int
    """Of the square image, pixels; a multiple of 64."""
    block: int
    """Side of the squares that stand more than once, pixels; they lie on a grid of this spacing."""
    distance: int
    """From a square to its copy, along a row or a column, pixels; a multiple of `block`."""
    number: int = 0
    """Tells scenes of equal measures apart."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.side}-{self.distance:03d}-{'abcdefgh'[self.number]}"


SCENES = (
    *(Scene("copies", 256, 32, 32, n) for n in range(2)),
    *(Scene("copies", 256, 64, distance, n) for distance in (64, 128, 192) for n in range(2)),
    Scene("copies", 128, 32, 32),
    Scene("copies", 128, 64, 64),
    *(Scene("periodic", side, period, period) for side, period in ((256, 128), (256, 64), (192, 32), (128, 16))),
)


def generated_set(card: Card, mode: Mode) -> list[Photograph]:
    """The images of a card that names a generator, in the order of their names; gray ones by MATLAB's rgb2gray.

    Raises InputError where they are not those that the card states.
    """
    made = [(scene.name, scene_pixels(scene, card.name == WITH)) for scene in SCENES]
    for name, pixels in made:
        if pixel_sha256(pixels) != card.sha256.get(name):
            raise InputError(
                f"Data set {card.name}: the generated image {name} has other pixels than the card states; "
                f"its source in kitbench/data/repetition.py was changed: restore it."
            )
    shown = sorted((name, to_gray(pixels) if mode == "gray" else pixels) for name, pixels in made)
    return [Photograph(name, pixels, pixel_sha256(pixels)) for name, pixels in shown]


def images_of(card: Card, root: Path | None, mode: Mode) -> list[Photograph]:
    """The images of any set: generated, or read from files as `read_set` does.

    Raises InputError as that does, and for pictures in a user's own folder that would not be read as a viewer shows
    them (`require_readable_as_shown`).
    """
    if card.generated:
        return generated_set(card, mode)
    if card.own:
        for entry in files_of_set(card, Path(card.own)):
            require_readable_as_shown(entry)
    return read_set(card, root, mode)


def scene_pixels(scene: Scene, repeated: bool) -> np.ndarray:
    """uint8 [side, side, 3]. Without repetition, each copy gives way to a square of another ground."""
    ground, origin = _ground(scene, "ground"), origins(scene)
    if repeated:
        return np.ascontiguousarray(ground.reshape(-1, 3)[origin])
    copied = origin != np.arange(origin.size).reshape(origin.shape)
    # Squares of the other ground in random order, so that they have borders wherever copies have.
    cells = (scene.side // scene.block) ** 2
    moved = _pixels_of_cells(scene, _order(scene, "other", cells))
    return np.ascontiguousarray(np.where(copied[..., None], _ground(scene, "other").reshape(-1, 3)[moved], ground))


def origins(scene: Scene) -> np.ndarray:
    """For every pixel of the repeated image, the number of the ground's pixel that it shows: int64 [side, side].

    Two pixels are copies of one another if and only if their numbers are equal.
    """
    across = scene.side // scene.block
    cells = np.arange(across**2)
    if scene.kind == "periodic":
        return _pixels_of_cells(scene, np.zeros_like(cells))
    step = scene.distance // scene.block
    shown, taken = cells.copy(), np.zeros(cells.size, bool)
    pairs = 0
    for cell in _order(scene, "pairs", cells.size):
        row, column = divmod(int(cell), across)
        neighbours = [(row, column + step), (row + step, column), (row, column - step), (row - step, column)]
        inside = [r * across + c for r, c in neighbours if 0 <= r < across and 0 <= c < across]
        free = [twin for twin in inside if not taken[twin]]
        if taken[cell] or not free or pairs == max(1, cells.size // 4):
            continue
        shown[free[0]] = cell
        taken[[cell, free[0]]] = True
        pairs += 1
    return _pixels_of_cells(scene, shown)


def copies_of_patches(scene: Scene, patch: int) -> np.ndarray:
    """Which patches of the repeated image are exact copies: int64 [N], equal numbers for patches with equal content.

    patch: side in pixels of the patches, a divisor of the image's side, in row-major order. Content that occurs twice
    by chance does not count: only what was copied.
    """
    across = scene.side // patch
    shown = origins(scene).reshape(across, patch, across, patch).transpose(0, 2, 1, 3).reshape(across**2, -1)
    _, group = np.unique(shown, axis=0, return_inverse=True)
    return group.reshape(-1)


def _pixels_of_cells(scene: Scene, cells: np.ndarray) -> np.ndarray:
    """Numbers of pixels of an image that shows these cells of another, in row-major order: int64 [side, side]."""
    across, block = scene.side // scene.block, scene.block
    top, left = (part.reshape(across, across) * block for part in np.divmod(cells, across))
    inside = np.arange(block)
    rows = top[:, None, :, None] + inside[None, :, None, None]
    columns = left[:, None, :, None] + inside[None, None, None, :]
    return (rows * scene.side + columns).reshape(scene.side, scene.side)


def _order(scene: Scene, part: str, count: int) -> np.ndarray:
    """A random order of `count` things."""
    return np.argsort(_bits(scene, part, count), kind="stable")


def _ground(scene: Scene, part: str) -> np.ndarray:
    """Value noise, uint8 [side, side, 3]."""
    total = np.zeros((scene.side, scene.side, 3), np.int32)
    for spacing, contrast in CONTRAST.items():
        points = scene.side // spacing + 1
        bits = _bits(scene, f"{part}/{spacing}", points**2 * 4)
        grid = (bits >> np.uint64(56)).astype(np.int32).reshape(points, points, 4) - 128
        grid = TINT * grid[..., :1] + grid[..., 1:]  # what is common to the channels, and what is their own
        place = np.arange(scene.side, dtype=np.int32)
        first, share = place // spacing, place % spacing
        rows: np.ndarray = grid[first] * (spacing - share)[:, None, None] + grid[first + 1] * share[:, None, None]
        both: np.ndarray = rows[:, first] * (spacing - share)[:, None] + rows[:, first + 1] * share[:, None]
        total += both * contrast * (64 // spacing) ** 2  # in units of 1 / (128 * TINT * 64^2) grey levels
    return np.clip(128 + total // (128 * TINT * 64**2), 0, 255).astype(np.uint8)


def _bits(scene: Scene, part: str, count: int) -> np.ndarray:
    """Random uint64 [count]."""
    return np.asarray(np.random.Philox(key=derive("repetition", scene.name, part)).random_raw(count))
