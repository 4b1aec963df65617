"""`kitbench.psnr` and `kitbench.ssim`: metrics on arrays whose range is stated or follows from their dtype."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitbench.errors import InputError
from kitbench.scoring import metrics

RANGES = (1.0, 255.0)


def array_psnr(restored: ArrayLike, clean: ArrayLike, *, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE), over all pixels and channels.

    restored, clean: images [H, W] or [H, W, C] (C 1, 3 or 4) of one shape and dtype: uint8, float32 or float64.
    data_range: the value of white. uint8 has 255; floating point has 1 unless 255 is given. Values outside
    0..data_range, and floating-point images given with 255 that look like 0..1, are refused.
    Nothing is clipped, rounded or converted to luma: protocols do that. Returns inf for equal images.
    Raises InputError for what does not fit.
    """
    return metrics.psnr(*_checked(restored, clean, data_range))


def array_ssim(restored: ArrayLike, clean: ArrayLike, *, data_range: float | None = None) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window 11 x 11, sigma 1.5, the mean over the valid region.

    Arguments as for `array_psnr`; images must have at least 11 pixels a side. Colour images: the mean over channels.
    Raises InputError.
    """
    return metrics.ssim(*_checked(restored, clean, data_range))


def _checked(
    restored: ArrayLike, clean: ArrayLike, data_range: float | None
) -> tuple[NDArray[np.generic], NDArray[np.generic], float]:
    """Both images and the value of white. Raises InputError where one of them does not fit the other or the range."""
    a, b = _array(restored), _array(clean)
    for image in (a, b):
        if image.dtype not in (np.uint8, np.float32, np.float64):
            raise InputError(f"Images must be uint8, float32 or float64, found {image.dtype}; convert them first.")
        if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
            raise InputError(
                f"Images must be [H, W] or [H, W, C] with 1, 3 or 4 channels last, found {list(image.shape)}; "
                "transpose them, and give one image at a time."
            )
        if not image.size:
            raise InputError(f"An image is empty, found {list(image.shape)}; no metric is defined for it.")
    if data_range is not None and data_range not in RANGES:
        raise InputError(f"data_range is the value of white, 1 or 255; found {data_range!r}.")
    if np.uint8 in (a.dtype, b.dtype):
        if data_range == 1:
            raise InputError("uint8 images are in 0..255; leave data_range out, or divide them by 255 yourself.")
        return a, b, 255.0
    white = 1.0 if data_range is None else float(data_range)
    _within(a, b, white)
    return a, b, white


def _array(image: ArrayLike) -> NDArray[np.generic]:
    try:
        return np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU or with gradients, a ragged list
        raise InputError(
            f"An image of type {type(image).__name__} cannot be read as an array ({error}); give a NumPy array, of a "
            f"tensor x.detach().cpu().numpy()."
        ) from error


def _within(a: NDArray[np.generic], b: NDArray[np.generic], white: float) -> None:
    """Raises InputError where floating-point images are not in 0..white, or are in 0..1 while white is 255."""
    low, high = (float(f([f(a), f(b)])) for f in (np.min, np.max))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("An image contains NaN or infinity; no metric is defined for it.")
    if low < 0 or high > white:
        hint = "; for images in 0..255 give data_range=255" if white == 1 and low >= 0 and high <= 255 else ""
        raise InputError(
            f"Values must be in 0..{white:g}, found {low:.4g} to {high:.4g}: clip them as your protocol says{hint}."
        )
    if white > 1 and 0 < high <= 1:
        raise InputError(
            f"data_range is 255, but all values are in 0..1 (at most {high:.4g}); leave data_range out for such images."
        )
