"""PSNR and SSIM of whole images: kitbench against scikit-image, interleaved, the median of the rounds' ratios.

    python benchmarks/metrics.py

Prints a line per image size: milliseconds of both, how many times faster, how many times less time of the processors
(which other work on the machine moves less), and the difference of the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kitbench.scoring.metrics import psnr, ssim

ROUNDS = 15
SHAPES = [(256, 256), (321, 481, 3), (512, 512), (512, 512, 3), (720, 1280, 3), (1080, 1920, 3)]


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> float:
    axis = -1 if a.ndim == 3 else None
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return float(structural_similarity(a, b, channel_axis=axis, **options))


def skimage_psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(peak_signal_noise_ratio(a, b, data_range=255))


def ssim_one_thread(a: np.ndarray, b: np.ndarray) -> float:
    return ssim(a, b, threads=1)


def skimage_both(a: np.ndarray, b: np.ndarray) -> float:
    return skimage_psnr(a, b) + skimage_ssim(a, b)


def both(a: np.ndarray, b: np.ndarray) -> float:
    return psnr(a, b) + ssim(a, b)


PAIRS: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "psnr": (skimage_psnr, psnr),
    "ssim, one thread": (skimage_ssim, ssim_one_thread),
    "ssim": (skimage_ssim, ssim),
    "psnr and ssim": (skimage_both, both),
}


def seconds(fn: Callable[..., float], a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Elapsed, and of all processors together."""
    start, cpu = time.perf_counter(), time.process_time()
    fn(a, b)
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    rng = np.random.default_rng(0)
    print("           image            metric  skimage ms  kitbench ms  times faster  less CPU  difference")
    for shape in SHAPES:
        a = rng.integers(0, 256, shape, dtype=np.uint8)
        b = np.clip(np.round(a + rng.normal(0, 25, shape)), 0, 255).astype(np.uint8)
        for name, (theirs, ours) in PAIRS.items():
            difference = abs(theirs(a, b) - ours(a, b))  # also the warm-up
            times = np.array([(seconds(theirs, a, b), seconds(ours, a, b)) for _ in range(ROUNDS)])
            (old, _), (new, _) = np.median(times, axis=0) * 1e3
            ratio, less = np.median(times[:, 0] / times[:, 1], axis=0)
            size = "x".join(map(str, shape))
            print(f"{size:>16} {name:>17} {old:11.2f} {new:12.2f} {ratio:13.1f} {less:9.1f} {difference:11.1e}")


if __name__ == "__main__":
    main()
