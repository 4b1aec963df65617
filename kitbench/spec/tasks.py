"""Tasks: the degradation that is to be removed, with the ranges that its parameters are drawn from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kitbench.spec.fields import Degrees, Frozen, Grey, Pixels, Share


class Ranges(Frozen):
    """A task whose keys are ranges [low, high]: a value is drawn from each for every crop and every test image."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for key, value in self:
            if isinstance(value, tuple) and key != "sigma_test" and value[0] > value[1]:
                raise ValueError(f"{key} must be [low, high], found {list(value)}")
        return self

    @property
    def conditions(self) -> tuple[float | None, ...]:
        """The noise levels at which every test set is scored; None where a set has one condition."""
        return (None,)


def condition(sigma: float | None) -> str:
    """What follows a test set's name: `σ25`, or nothing where a task has one condition."""
    return "" if sigma is None else f"σ{sigma:g}"


class Denoise(Ranges):
    """Additive white Gaussian noise, sigma in 8-bit grey levels (0..255)."""

    kind: Literal["denoise"]
    sigma_train: tuple[Grey, Grey]
    """The sigma of a training crop is drawn uniformly between these; equal values train for one sigma."""
    sigma_test: Annotated[tuple[Annotated[float, Field(gt=0, le=255)], ...], Field(min_length=1)]

    @property
    def conditions(self) -> tuple[float | None, ...]:
        return self.sigma_test


class Deblur(Ranges):
    """Camera shake: a kernel that follows a random trajectory, then noise (kitbench/data/degrade.py)."""

    kind: Literal["deblur"]
    length: tuple[Pixels, Pixels]
    """Length of the trajectory, pixels."""
    sigma: tuple[Grey, Grey]
    """White Gaussian noise added after the blur, in 8-bit grey levels."""


class Derain(Ranges):
    """Rain streaks added to the scene (kitbench/data/degrade.py)."""

    kind: Literal["derain"]
    density: tuple[Share, Share]
    """Streaks per pixel."""
    length: tuple[Pixels, Pixels]
    """Of a streak, pixels."""
    width: tuple[Pixels, Pixels]
    """Of a streak (standard deviation of its Gaussian profile), pixels."""
    angle: tuple[Degrees, Degrees]
    """Of an image's rain, degrees from the vertical."""
    strength: tuple[Share, Share]
    """Brightness of a streak, as a share of white."""


class RealNoise(Ranges):
    """Camera noise: Poisson and Gaussian in linear light, through a Bayer mosaic (kitbench/data/degrade.py)."""

    kind: Literal["denoise-real"]
    shot: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
    """Variance per unit of light, drawn uniformly in its logarithm; it determines the read noise."""
    mosaic: bool = True
    """Each pixel measures one colour; the noise is interpolated as by bilinear demosaicing."""


Task = Annotated[Denoise | Deblur | Derain | RealNoise, Field(discriminator="kind")]
Kind = Literal["denoise", "deblur", "derain", "denoise-real"]
