"""Degradation models: they make the input of a task from a clean photograph, where a data set has no pairs.

All take float32 [H, W, C] in [0, 1] and a generator, and draw every parameter from the task's ranges. Gaussian noise
stays in float and is not clipped, as in the denoising literature; the others imitate pictures of a camera, and are
clipped to [0, 1] and rounded to 8 bits.

    denoise       white Gaussian noise
    deblur        a kernel along a random trajectory (Boracchi and Foi, "Modeling the performance of image restoration
                  from motion blur", IEEE TIP 2012, used by DeblurGAN, CVPR 2018), then Gaussian noise
    derain        O = B + S, streaks added to the background (Yang et al., "Deep joint rain detection and removal from
                  a single image", CVPR 2017, equation 1); the streaks of one image share a direction within 3 degrees
    denoise-real  Poisson and Gaussian noise (Foi et al., "Practical Poissonian-Gaussian noise modeling and fitting for
                  single-image raw-data", IEEE TIP 2008) in linear light, gamma 2.2; read noise as a function of shot
                  noise by Brooks et al., "Unprocessing images for learned raw denoising", CVPR 2019; interpolated
                  from a Bayer mosaic like the picture, which correlates it between pixels and channels

They do not model saturation, moving objects, haze or compression, which real sets contain.
"""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np

from kitbench.spec.tasks import Deblur, Denoise, Derain, RealNoise, Task

Image = np.ndarray  # float32 everywhere; what OpenCV and NumPy return is typed more loosely

GAMMA = 2.2
JITTER = 3.0  # degrees between the streaks of one image
LAYERS = 3  # groups of streaks of one length, width and angle in an image
POINTS = 64  # points of a trajectory


def margin(task: Task) -> int:
    """Pixels around a crop that its degraded version depends on."""
    if isinstance(task, Deblur):
        return math.ceil(task.length[1] / 2) + 2
    return 1 if isinstance(task, RealNoise) and task.mosaic else 0


def degrade(clean: Image, task: Task, random: np.random.Generator, sigma: float | None = None) -> Image:
    """The degraded image, float32 [H, W, C]. sigma: of `denoise`, in 8-bit grey levels; drawn from the task if None."""
    if isinstance(task, Denoise):
        return add_noise(clean, random.uniform(*task.sigma_train) if sigma is None else sigma, random)
    if isinstance(task, Deblur):
        kernel = motion_kernel(random.uniform(*task.length), random)
        blurred = cv2.filter2D(clean, -1, kernel, borderType=cv2.BORDER_REFLECT_101).reshape(*clean.shape)
        return eight_bits(add_noise(blurred, random.uniform(*task.sigma), random))
    if isinstance(task, Derain):
        return eight_bits(clean + streaks(clean.shape[:2], task, random)[..., None])
    return eight_bits(camera_noise(clean, task, random))


def eight_bits(image: Image) -> Image:
    """Clipped to [0, 1] and rounded to the nearest of 256 levels."""
    rounded: Image = np.rint(np.clip(image, 0, 1) * np.float32(255)) / np.float32(255)
    return rounded


def add_noise(clean: Image, sigma: float, random: np.random.Generator) -> Image:
    """White Gaussian noise of standard deviation sigma / 255, added in float32 and not clipped."""
    noise = random.standard_normal(clean.shape, dtype=np.float32)
    noise *= np.float32(sigma / 255)
    noise += clean
    return noise


def motion_kernel(length: float, random: np.random.Generator) -> Image:
    """A blur kernel [K, K], K odd, non-negative, of sum 1, centred on its mass.

    Each value is the share of the exposure that a random trajectory of that length in pixels spends there.

    The velocity changes by Gaussian steps, is pulled back towards the start, and sometimes reverses (a jerk of the
    hand), by amounts drawn for each kernel; positions are distributed over the four nearest pixels bilinearly.
    """
    anxiety, pull, jerk = 0.3 * random.random(), 0.1 * random.random(), 0.2 * random.random()
    heading = random.uniform(0, 2 * math.pi)
    turns, jerks = random.standard_normal((POINTS, 2)).tolist(), random.random((POINTS, 2)).tolist()
    y, x, dy, dx = 0.0, 0.0, math.sin(heading), math.cos(heading)
    points = [(y, x)]
    for (turn_y, turn_x), (chance, angle) in zip(turns[1:], jerks[1:], strict=True):
        dy, dx = dy + anxiety * turn_y - pull * y / POINTS, dx + anxiety * turn_x - pull * x / POINTS
        if chance < jerk * anxiety:
            c, s = math.cos(math.pi * (0.5 + angle)), math.sin(math.pi * (0.5 + angle))
            dy, dx = s * dx + c * dy, c * dx - s * dy
        speed = max(1e-6, math.hypot(dy, dx))
        dy, dx = dy / speed, dx / speed
        y, x = y + dy, x + dx
        points.append((y, x))
    path = np.array(points)
    path = (path - path.mean(0)) * (length / (POINTS - 1))
    radius = math.ceil(np.abs(path).max()) + 1
    corner = np.floor(path).astype(int)
    far = path - corner
    time = np.zeros((2 * radius + 1, 2 * radius + 1))
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - down - far[:, 0]) * np.abs(1 - right - far[:, 1])
        np.add.at(time, (corner[:, 0] + radius + down, corner[:, 1] + radius + right), weight)
    kernel: Image = (time / time.sum()).astype(np.float32)
    return kernel


def streaks(shape: tuple[int, int], task: Derain, random: np.random.Generator) -> Image:
    """Rain alone, [H, W], not negative: in every layer, short lines of one length, width and angle at random places."""
    angle = random.uniform(*task.angle)
    density = random.uniform(*task.density)
    height, width = shape
    edge = math.ceil(task.length[1] / 2 + 3 * task.width[1])  # streaks may be centred outside the picture
    rain = np.zeros((height + 4 * edge, width + 4 * edge), np.float32)
    for _ in range(LAYERS):
        line = streak(
            random.uniform(*task.length), random.uniform(*task.width), angle + random.uniform(-JITTER, JITTER)
        )
        size, radius = len(line), len(line) // 2
        count = random.poisson(density / LAYERS * (height + 2 * edge) * (width + 2 * edge))
        tops, lefts = (random.integers(edge, side + 3 * edge, size=count) - radius for side in shape)
        lights = random.uniform(*task.strength, size=count).astype(np.float32)
        for top, left, light in zip(tops.tolist(), lefts.tolist(), lights, strict=True):
            rain[top : top + size, left : left + size] += light * line
    return rain[2 * edge : 2 * edge + height, 2 * edge : 2 * edge + width]


def streak(length: float, width: float, angle: float) -> Image:
    """One streak [K, K], K odd, brightest value 1: a line with a Gaussian profile and soft ends.

    length and width (standard deviation) in pixels, angle in degrees from the vertical.
    """
    radius = math.ceil(length / 2 + 3 * width)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    turn = math.radians(angle)
    along = x * math.sin(turn) + y * math.cos(turn)
    across = x * math.cos(turn) - y * math.sin(turn)
    beyond = np.maximum(0, np.abs(along) - length / 2)
    light = np.exp(-(across**2 + beyond**2) / (2 * width**2))
    line: Image = (light / light.max()).astype(np.float32)
    return line


def camera_noise(clean: Image, task: RealNoise, random: np.random.Generator) -> Image:
    """The image with the noise of a camera, not clipped."""
    low, high = (math.log(value) for value in task.shot)
    log_shot = random.uniform(low, high)
    # Brooks et al. 2019, section 3.1: log read variance ~ N(2.18 log shot + 1.20, 0.26).
    read = math.exp(2.18 * log_shot + 1.20 + 0.26 * random.standard_normal())
    light = np.clip(clean, 0, 1) ** np.float32(GAMMA)
    noise = random.standard_normal(clean.shape, dtype=np.float32) * np.sqrt(
        np.float32(math.exp(log_shot)) * light + read
    )
    if task.mosaic and clean.shape[2] == 3:
        noise = demosaiced(noise, int(random.integers(4)))
    noisy: Image = np.clip(light + noise, 0, None).astype(np.float32) ** np.float32(1 / GAMMA)
    return noisy


def demosaiced(values: Image, phase: int) -> Image:
    """[H, W, 3] sampled on a Bayer mosaic of that phase (0 to 3) and interpolated bilinearly."""
    height, width = values.shape[:2]
    row, column = divmod(phase, 2)
    seen = np.zeros_like(values)
    for channel, places in enumerate(([(0, 0)], [(0, 1), (1, 0)], [(1, 1)])):
        for y, x in places:
            at = slice((y + row) % 2, height, 2), slice((x + column) % 2, width, 2)
            seen[(*at, channel)] = values[(*at, channel)]
    cross, box = _bilinear()
    planes = [np.ascontiguousarray(seen[..., channel]) for channel in range(3)]
    kernels = box, cross, box
    return np.stack(
        [cv2.filter2D(p, -1, k, borderType=cv2.BORDER_REFLECT_101) for p, k in zip(planes, kernels, strict=True)],
        axis=2,
    )


@cache
def _bilinear() -> tuple[Image, Image]:
    """Interpolation from the green places, and from the red or blue ones."""
    return (
        np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]], np.float32) / 4,
        np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]], np.float32) / 4,
    )
