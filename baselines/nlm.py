"""nlm: non-local means, the training-free reference of denoising.

Paper: Buades, Coll and Morel, "A non-local algorithm for image denoising", CVPR 2005; the fast form of Darbon et al.,
    ISBI 2008, as in scikit-image.
Operator: every pixel is replaced by the mean of the pixels around it, weighted by the similarity of their patches.
Cost: 13 x 13 comparisons of 5 x 5 patches a pixel: linear in H and in W.
Departures: none; the parameters are those of scikit-image's own example for a known sigma (patch 5, distance 6,
    h = 0.8 sigma, fast). Where the task states no sigma it is estimated from the image's finest wavelets (Donoho and
    Johnstone 1994, scikit-image's estimate_sigma), the mean over channels.
"""

from __future__ import annotations

import numpy as np
from skimage.restoration import denoise_nl_means, estimate_sigma


def restore(image: np.ndarray, sigma: float | None) -> np.ndarray:
    """Denoise float32 [H, W, C], nominal range 0..1, whose noise has standard deviation sigma / 255."""
    level = sigma / 255 if sigma is not None else estimate_sigma(image, average_sigmas=True, channel_axis=-1)
    restored = denoise_nl_means(
        image, patch_size=5, patch_distance=6, h=0.8 * level, sigma=level, fast_mode=True, channel_axis=-1
    )
    # scikit-image drops the axis of a single channel.
    whole: np.ndarray = restored.reshape(image.shape).astype(np.float32)
    return whole
