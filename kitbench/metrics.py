"""Image quality: PSNR, SSIM and MATLAB's luma, in NumPy and OpenCV (no torch).

All functions take images in 0..255, uint8 or floating point, [H, W] (gray) or [H, W, C]. What is measured (which
rounding, which colour space) is the protocol's business, not theirs: round and convert before you call them.
LPIPS, which needs a network, is in kitbench/lpips.py.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kitbench.errors import InputError

_RADIUS = 5  # the 11 x 11 window of Wang et al. 2004
_SIGMA = 1.5
_STRIP = 128  # rows filtered at a time: the planes of one strip stay in the cache


def psnr(a: NDArray, b: NDArray, data_range: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / MSE), over all pixels and channels of one image pair.

    a, b: [H, W] or [H, W, C], of one shape and one dtype (uint8, float32 or float64). Returns inf where they are equal.
    Raises InputError if shapes or dtypes differ, or the dtype is another one.
    """
    _check(a, b)
    if a.dtype != np.uint8:  # OpenCV sums float32 differences in float32
        a, b = a.astype(np.float64), b.astype(np.float64)
    mse = cv2.norm(a.reshape(len(a), -1), b.reshape(len(b), -1), cv2.NORM_L2SQR) / a.size
    return 10 * math.log10(data_range**2 / mse) if mse > 0 else math.inf


def ssim(a: NDArray, b: NDArray, data_range: float = 255.0, threads: int | None = None) -> float:
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
    planes = list(zip(cv2.split(a), cv2.split(b), strict=True))
    halo = 2 * _RADIUS
    strips = [
        (x[top : top + _STRIP + halo], y[top : top + _STRIP + halo])
        for x, y in planes
        for top in range(0, a.shape[0] - halo, _STRIP)
    ]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    threads = threads or min(4, _cores())
    if threads == 1 or len(strips) == 1:
        sums = [_ssim_sum(x, y, c1, c2) for x, y in strips]
    else:
        sums = list(_pool(threads).map(lambda strip: _ssim_sum(strip[0], strip[1], c1, c2), strips))
    return math.fsum(sums) / ((a.shape[0] - halo) * (a.shape[1] - halo) * len(planes))


def luma(rgb: NDArray) -> NDArray:
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


def _check(a: NDArray, b: NDArray) -> None:
    if a.shape != b.shape or a.dtype != b.dtype:
        raise InputError(
            f"Two images to compare must be alike, found {list(a.shape)} of {a.dtype} and {list(b.shape)} of {b.dtype}."
        )
    if a.dtype not in _DTYPES:
        raise InputError(f"Images to compare must be of {_DTYPE_NAMES} in 0..255, found {a.dtype}: convert them first.")
    if a.ndim not in (2, 3) or a.size == 0:
        raise InputError(f"Images to compare must be [H, W] or [H, W, C] and not empty, found {list(a.shape)}.")


def _ssim_sum(a: NDArray[Any], b: NDArray[Any], c1: float, c2: float) -> float:
    """The sum of the SSIM map of one strip of one channel.

    With s = a + b and d = a - b, the four products of the formula are sums and differences of the squares of s and d
    (2ab = (s^2 - d^2) / 2, a^2 + b^2 = (s^2 + d^2) / 2): four filters, and fewer passes than in a and b.
    """
    s: NDArray[Any] = cv2.add(a, b, dtype=cv2.CV_64F)
    d: NDArray[Any] = cv2.subtract(a, b, dtype=cv2.CV_64F)
    mean_s, mean_d = _blur(s), _blur(d)
    mean_s *= mean_s
    mean_d *= mean_d
    s *= s
    d *= d
    var_s, var_d = _blur(s), _blur(d)
    var_s -= mean_s
    var_d -= mean_d

    top = mean_s - mean_d
    top += 2 * c1
    mean_s += mean_d
    mean_s += 2 * c1
    covariance = var_s - var_d
    covariance += 2 * c2
    var_s += var_d
    var_s += 2 * c2
    top *= covariance
    mean_s *= var_s
    top /= mean_s
    return float(top.sum())


def _blur(plane: NDArray) -> NDArray:
    """[H, W] -> [H - 10, W - 10]: only where the whole window lies inside."""
    kernel = _kernel()
    return cv2.sepFilter2D(plane, -1, kernel, kernel)[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


@cache
def _kernel() -> NDArray:
    x = np.arange(-_RADIUS, _RADIUS + 1)
    kernel = np.exp(-(x**2) / (2 * _SIGMA**2))
    return kernel / kernel.sum()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ssim")


if hasattr(os, "register_at_fork"):  # a forked data worker inherits the pool without its threads, and would hang
    os.register_at_fork(after_in_child=_pool.cache_clear)
