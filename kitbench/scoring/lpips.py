"""LPIPS (Zhang et al., CVPR 2018), version 0.1, without torchvision.

The linear heads are read from the files of the installed `lpips` package, which is not imported: its import needs a
torchvision of torch's version and build, and PyPI's is not of a CPU build. The ImageNet backbones are the modules
below, with torchvision's names, so that torchvision's weight files fit. Weights are not downloaded: give the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kitbench.errors import InputError, nearest
from kitbench.model.weights import load_file

VERSION = "0.1"
ENVIRONMENT = "KITBENCH_LPIPS_WEIGHTS"
SMALLEST = 32  # pixels a side: below it the last feature maps of some backbone are empty

_URL = "https://download.pytorch.org/models/"
_FILES = {"squeeze": "squeezenet1_1-b8a52dc0.pth", "alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
_TAPS = {"squeeze": (1, 4, 7, 9, 10, 11, 12), "alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}


def available(net: str, weights: str | Path | None = None) -> str | None:
    """None where LPIPS with this backbone can be computed; otherwise one sentence: why not, and what to do."""
    try:
        LPIPS(net, weights)
    except InputError as error:
        return str(error)
    return None


class LPIPS(nn.Module):
    """Learned perceptual distance; smaller is more alike, 0 for equal images.

    net: backbone, "squeeze", "alex" or "vgg". weights: the backbone's file, or a folder that holds it; by default what
    the environment variable KITBENCH_LPIPS_WEIGHTS names, then the cache of torch hub. Raises InputError where heads or
    backbone are missing or are not what they should be.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str = "squeeze", weights: str | Path | None = None) -> None:
        super().__init__()
        if net not in _FILES:
            raise InputError(f"Unknown LPIPS backbone {net!r}; {nearest(net, _FILES)}")
        heads = load_file(_heads_file(net))
        file = _backbone_file(net, weights)
        self.taps = _TAPS[net]
        self.features = {"squeeze": _squeezenet, "alex": _alexnet, "vgg": _vgg}[net]()
        _fill(self.features, load_file(file), file, net)
        for number in range(len(self.taps)):
            self.register_buffer(f"head{number}", heads[f"lin{number}.model.1.weight"])
        # ImageNet's mean and deviation, moved to inputs in [-1, 1] as the authors' package has them.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of each pair: a, b float [B, 3, H, W] in [0, 1], 32 pixels a side at least -> [B]. InputError."""
        if a.shape != b.shape or a.dim() != 4 or a.shape[1] != 3 or min(a.shape[2:]) < SMALLEST:
            raise InputError(
                f"LPIPS compares two colour batches [B, 3, H, W] of one shape, {SMALLEST} pixels a side or more; "
                f"found {list(a.shape)} and {list(b.shape)}."
            )
        if not a.is_floating_point() or not b.is_floating_point():
            raise InputError(f"LPIPS takes floating point in [0, 1], found {a.dtype} and {b.dtype}: divide by 255.")
        total = torch.zeros(len(a), dtype=a.dtype, device=a.device)
        for number, (f, g) in enumerate(zip(self._taps(a), self._taps(b), strict=True)):
            difference = (_normalise(f) - _normalise(g)).square()
            total += (difference * getattr(self, f"head{number}")).sum(1).mean((1, 2))
        return total

    def _taps(self, image: Tensor) -> list[Tensor]:
        f = (2 * image - 1 - self.shift) / self.scale
        found = []
        for number, layer in enumerate(self.features):
            f = layer(f)
            if number in self.taps:
                found.append(f)
        return found


def _normalise(f: Tensor) -> Tensor:
    return f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10)


class _Fire(nn.Module):
    """SqueezeNet's module: a 1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def _squeezenet() -> nn.Sequential:
    """The features of SqueezeNet 1.1."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(64, 16, 64), _Fire(128, 16, 64), nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(128, 32, 128), _Fire(256, 32, 128), nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256),
    )  # fmt: skip


def _alexnet() -> nn.Sequential:
    """The features of AlexNet, in the width of "One weird trick" (Krizhevsky 2014)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def _vgg() -> nn.Sequential:
    """The features of VGG-16 up to relu5_3."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def _heads_file(net: str) -> Path:
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "LPIPS needs the linear heads inside the package lpips, which is not installed: "
            "run `pip install lpips`, or with a CPU build of torch `pip install --no-deps lpips`."
        )
    file = Path(spec.submodule_search_locations[0]) / "weights" / f"v{VERSION}" / f"{net}.pth"
    if not file.is_file():
        raise InputError(f"The installed package lpips has no file {file}: reinstall it.")
    return file


def _backbone_file(net: str, weights: str | Path | None) -> Path:
    """The given file, or the first one found. Raises InputError where the hash in its name is not its content's."""
    standard = _FILES[net]
    given = weights or os.environ.get(ENVIRONMENT)
    place = Path(given).expanduser() if given else Path(torch.hub.get_dir()) / "checkpoints"
    stem = standard.rsplit("-", 1)[0]
    candidates = [place] if place.is_file() else [place / standard, *sorted(place.glob(f"{stem}*.pth"))]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        cache = _without_home(Path(torch.hub.get_dir()) / "checkpoints")
        raise InputError(
            f"LPIPS-{net} needs the backbone's weights {standard} ({_URL}{standard}), "
            f"not found in {_without_home(place)}: download it and name the file, or its folder, "
            f"as the weights of the metric or in {ENVIRONMENT}, or put "
            f"it into {cache}."
        )
    stated = re.search(r"-([0-9a-f]{8,64})\.pth$", found.name)
    if stated:
        with found.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if not actual.startswith(stated[1]):
            raise InputError(
                f"{found} is damaged: its SHA-256 starts with {actual[: len(stated[1])]}, its name says {stated[1]}; "
                f"download it again from {_URL}{standard}."
            )
    return found


def _without_home(path: Path) -> str:
    """A path for a stored record: the user's home folder as ~."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _fill(features: nn.Sequential, state: dict[str, Any], file: Path, net: str) -> None:
    own = features.state_dict()
    given = {key: state.get(f"features.{key}") for key in own}
    wrong = [key for key, value in given.items() if not isinstance(value, Tensor) or value.shape != own[key].shape]
    if wrong:
        raise InputError(
            f"{file} is not torchvision's {_FILES[net].rsplit('-', 1)[0]}: features.{wrong[0]} is missing or has "
            f"another shape; LPIPS-{net} needs {_URL}{_FILES[net]}."
        )
    features.load_state_dict(given)
