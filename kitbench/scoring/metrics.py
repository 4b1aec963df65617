"""Image quality: PSNR, SSIM and MATLAB's luma, in NumPy and OpenCV (no torch).

All functions take images in 0..255, uint8 or floating point, [H, W] (gray) or [H, W, C]. They neither round nor convert
colours, which depends on the protocol: do so before calling them.
LPIPS, which needs a network, is in lpips.py.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kitbench.errors import InputError

Array = NDArray[Any]

_RADIUS = 5  # the 11 x 11 window of Wang et al. 2004
_SIGMA = 1.5
_STRIP = 64  # rows filtered at a time: the planes of one strip stay in the cache


def psnr(a: Array, b: Array, data_range: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE), over all pixels and channels of one image pair.

    a, b: [H, W] or [H, W, C], of one shape and one dtype (uint8, float32 or float64). data_range: the value of white;
    the range of the values is not checked. Returns inf where they are equal. Raises InputError if shapes or dtypes
    differ, the dtype is another one, or there are no pixels.
    """
    _check(a, b)
    if a.dtype != np.uint8:  # OpenCV sums float32 differences in float32
        a, b = a.astype(np.float64), b.astype(np.float64)
    mse = cv2.norm(a.reshape(len(a), -1), b.reshape(len(b), -1), cv2.NORM_L2SQR) / a.size
    return 10 * math.log10(data_range**2 / mse) if mse > 0 else math.inf


def ssim(a: Array, b: Array, data_range: float = 255.0, threads: int | None = None) -> float:
    """Structural similarity (Wang et al. 2004), the mean over the valid region and over the channels.

    Gaussian window 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03, population variance, float64, channel by channel. Equal to
    skimage's structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1).
    a, b: [H, W] or [H, W, C], of one shape and one dtype (uint8, float32 or float64), at least 11 pixels a side.
    threads: by default one per usable core, four at most; the result does not depend on it, to the last bit.
    Raises InputError if shapes or dtypes differ, the dtype is another one, or an image is smaller than the window.
    """
    _check(a, b)
    window = 2 * _RADIUS + 1
    if min(a.shape[:2]) < window:
        raise InputError(
            f"SSIM needs images of at least {window} x {window} pixels, found {a.shape[0]} x {a.shape[1]}: "
            "leave SSIM out of the protocol or give larger images."
        )
    return _mean_ssim(cv2.split(a), cv2.split(b), data_range, threads)


def ssim_volume(a: Array, b: Array, data_range: float = 255.0, threads: int | None = None) -> float:
    """MATLAB's `ssim(a, b)` of an image given as [H, W, 3] array: it is taken for a volume whose third axis is colour.

    The SSIM of published scripts for GoPro, HIDE and SIDD (evaluate_*.m of MPRNet and Restormer among them). The
    Gaussian of 11 taps, sigma 1.5, runs along all three axes, every border replicated; the mean is over all voxels.
    K1 = 0.01, K2 = 0.03, population variance, float64. Differences between channels count as contrast, so that values
    are far above those of `ssim`.
    a, b: [H, W] or [H, W, C], of one shape and one dtype (uint8, float32 or float64), of any size; of a gray image it
    is MATLAB's ssim of a matrix. threads as for `ssim`. Raises InputError if shapes or dtypes differ or are others.
    """
    _check(a, b)
    r = _RADIUS
    volumes = [[cv2.copyMakeBorder(x, r, r, r, r, cv2.BORDER_REPLICATE)] for x in (a, b)]
    return _mean_ssim(volumes[0], volumes[1], data_range, threads, _mix(a.shape[2] if a.ndim == 3 else 1))


def best_shift(prediction: Array, target: Array, shift: int) -> tuple[Array, Array]:
    """The part of the prediction that matches the inner part of the target best, over integer shifts; and that part.

    For blind deblurring, where image and kernel are determined only up to opposite shifts. Of the (2 shift + 1)^2
    shifts of up to `shift` pixels on each axis the one with the highest PSNR is chosen.
    For the set of Levin et al. (CVPR 2009) published scores search 5 px in steps of a quarter pixel by linear
    interpolation and leave out 15 px of border (comp_upto_shift.m, also in SelfDeblur and KAIR): integer shifts give at
    most that PSNR, and the same where the estimate is not shifted by a fraction of a pixel.
    prediction, target: as for `psnr`, more than 2 shift pixels a side. Returns two views, 2 shift pixels less a side.
    Raises InputError if they are not alike, or too small.
    """
    _check(prediction, target)
    height, width = target.shape[:2]
    if min(height, width) <= 2 * shift:
        raise InputError(
            f"Shifts of up to {shift} px need images larger than {2 * shift} px a side, found {height} x {width}: "
            "give larger images or a smaller shift."
        )
    inner = target[shift : height - shift, shift : width - shift]
    places = sorted(itertools.product(range(2 * shift + 1), repeat=2), key=lambda at: math.dist(at, (shift, shift)))
    parts = (prediction[y : y + inner.shape[0], x : x + inner.shape[1]] for y, x in places)
    return max(parts, key=lambda part: psnr(part, inner)), inner  # of equal ones the smallest shift


def luma(rgb: Array) -> Array:
    """Y of MATLAB's rgb2ycbcr (ITU-R BT.601, 16..235), the channel on which deraining is scored.

    rgb: [H, W, 3] in 0..255, R first. uint8 gives uint8, rounded as MATLAB rounds it; floating point gives float64,
    unrounded. Returns [H, W]. Raises InputError for another shape or dtype.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype not in _DTYPES:
        raise InputError(f"luma needs an image [H, W, 3] of {_DTYPE_NAMES}, found {list(rgb.shape)} of {rgb.dtype}.")
    if rgb.dtype != np.uint8:
        return 16 + rgb.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255)
    # In integers, because 0.001 has no binary form and a half must round up.
    total = rgb.astype(np.int32) @ np.array([65481, 128553, 24966], np.int32)
    return (16 + (total + 127500) // 255000).astype(np.uint8)


_DTYPES = (np.uint8, np.float32, np.float64)
_DTYPE_NAMES = "uint8, float32 or float64"


def _check(a: Array, b: Array) -> None:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise InputError(
            f"Two images to compare must be alike, found {list(a.shape)} of {a.dtype} and {list(b.shape)} of {b.dtype}."
        )
    if a.dtype not in _DTYPES:
        raise InputError(f"Images to compare must be of {_DTYPE_NAMES} in 0..255, found {a.dtype}: convert them first.")
    if a.ndim not in (2, 3) or a.size == 0:
        raise InputError(f"Images to compare must be [H, W] or [H, W, C] and not empty, found {list(a.shape)}.")


def _mean_ssim(
    a: Sequence[Array], b: Sequence[Array], data_range: float, threads: int | None, mix: Array | None = None
) -> float:
    """The mean SSIM of pairs of planes, or of one pair of volumes, over the valid region, strip by strip."""
    halo = 2 * _RADIUS
    height, width = a[0].shape[:2]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def strip(part: tuple[int, int]) -> float:
        plane, top = part
        rows = slice(top, top + _STRIP + halo)
        return _ssim_sum(a[plane][rows], b[plane][rows], c1, c2, mix)

    parts = list(itertools.product(range(len(a)), range(0, height - halo, _STRIP)))
    threads = threads or min(4, _cores())
    sums = list(map(strip, parts) if threads == 1 or len(parts) == 1 else _pool(threads).map(strip, parts))
    voxels: int = (height - halo) * (width - halo) * len(a) * math.prod(a[0].shape[2:])
    return math.fsum(sums) / voxels


def _ssim_sum(a: Array, b: Array, c1: float, c2: float, mix: Array | None) -> float:
    """The sum of the SSIM map of one strip, [H, W] or [H, W, C]; `mix` is the filter along the channels, if any.

    Only a, b, ab and (a - b)^2 are filtered, which for uint8 are integers of 8 and 16 bits: a^2 + b^2 = (a - b)^2 +
    2ab, and the filter adds the constants. Fewer passes over float64 arrays make this fast.
    """
    if a.dtype == np.uint8:
        difference = cv2.absdiff(a, b)
        product, square = (cv2.multiply(x, y, dtype=cv2.CV_16U) for x, y in ((a, b), (difference, difference)))
    else:
        a, b = a.astype(np.float64), b.astype(np.float64)
        product, square = a * b, (a - b) ** 2
    mean, other = _blur(a, mix), _blur(b, mix)
    contrast = _blur(product, mix, 2.0, c1 + c2)
    variances = _blur(square, mix)

    luminance = mean * other
    luminance *= 2
    luminance += c1  # 2 mean_a mean_b + c1
    mean -= other
    mean *= mean
    contrast -= luminance  # 2 covariance + c2
    variances -= mean
    variances += contrast  # variance_a + variance_b + c2
    mean += luminance  # mean_a^2 + mean_b^2 + c1
    luminance *= contrast
    mean *= variances
    luminance /= mean
    return float(luminance[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS].sum())  # where the whole window lies inside


def _blur(plane: Array, mix: Array | None, times: float = 1.0, plus: float = 0.0) -> Array:
    """times x plane, filtered, + plus: float64 of the plane's shape; invalid in the outer 5 pixels."""
    kernel = _kernel()
    blurred = cv2.sepFilter2D(plane, cv2.CV_64F, times * kernel, kernel, delta=plus)
    return blurred if mix is None or blurred.ndim == 2 else blurred @ mix


@cache
def _kernel() -> Array:
    x = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-(x**2) / (2 * _SIGMA**2))
    kernel: Array = weights / weights.sum()
    return kernel


@cache
def _mix(channels: int) -> Array:
    """[channels in, channels out]: the window along the channels, its border replicated."""
    mix = np.zeros((channels, channels))
    for out, (tap, weight) in itertools.product(range(channels), enumerate(_kernel())):
        mix[np.clip(out + tap - _RADIUS, 0, channels - 1), out] += weight
    return mix


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ssim")


if hasattr(os, "register_at_fork"):  # a forked data worker inherits the pool without its threads, and would hang
    os.register_at_fork(after_in_child=_pool.cache_clear)
