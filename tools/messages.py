"""Make kitbench stop with one of its common messages, and print the terminal as the user sees it, in Markdown.

    python tools/messages.py                 the names of the cases
    python tools/messages.py full-disk       one case: commands, what they print on stderr, exit code

docs/messages.md is made of these. Each case runs the real command line in a temporary folder. Faults that cannot be had
cheaply there (a full disk, Ctrl-C at a given step) are injected at the calls of the operating system, so that
everything above them is the program's own.
"""

from __future__ import annotations

import errno
import itertools
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
SMOKE = ("run", "--suite", "denoise", "--preset", "smoke", "--method", "conv")


@dataclass(frozen=True)
class Case:
    """`arguments` of kitbench, run in a folder that `prepare` has filled, with the fault of that name."""

    arguments: tuple[str, ...]
    prepare: Callable[[Path], object] = lambda folder: None
    fault: str = ""
    keys: str = ""
    """What the user presses, as a terminal echoes it."""


# Folders


def stored(*names: str) -> Callable[[Path], None]:
    """What fills `results/` with these reference runs."""

    def prepare(folder: Path) -> None:
        for name in names:
            shutil.copytree(REFERENCE / name, folder / "results", dirs_exist_ok=True)

    return prepare


def damaged(folder: Path) -> None:
    """A stored score that somebody has edited."""
    stored("denoise-smoke-cpu")(folder)
    record = next(folder.glob("results/denoise-colour-kit-s0-*/eval/*.json"))
    record.write_text(record.read_text().replace('"psnr": 2', '"psnr": 3', 1))


def other_recipe(folder: Path) -> None:
    """Runs of the quick preset, and a reference of the smoke preset."""
    stored("denoise-quick-cpu")(folder)
    shutil.copy(REFERENCE / "smoke.json", folder)


def other_names(folder: Path) -> None:
    """Two folders of a picture each, of two names."""
    for place, name in (("restored", "sunrise"), ("clean", "sunset")):
        (folder / place).mkdir()
        Image.new("RGB", (64, 64)).save(folder / place / f"{name}.png")


def other_weights(folder: Path) -> None:
    """The 20 convolutions of the blind DnCNN, instead of the 17 for one sigma."""
    import safetensors.torch
    import torch

    widths = [3, *[64] * 19, 3]
    state = {}
    for layer, (before, after) in enumerate(itertools.pairwise(widths)):
        state[f"model.{2 * layer}.weight"] = torch.zeros(after, before, 3, 3)
        state[f"model.{2 * layer}.bias"] = torch.zeros(after)
    safetensors.torch.save_file(state, folder / "dncnn_color_blind.safetensors")


def own_method(folder: Path) -> None:
    """A method file with a misspelt name in its forward pass."""
    (folder / "mine.py").write_text(
        "from torch import nn\n\n\nclass Attention(nn.Module):\n"
        "    def __init__(self, dim, heads, *, shift=False, reduction: int = 4):\n"
        "        super().__init__()\n        self.mix = nn.Linear(dim, dim // reduction)\n\n"
        "    def forward(self, x):\n        return self.mxi(x)\n"
    )


# Faults


def little_space() -> None:
    """A disk with 1 MiB left."""
    usage: Any = SimpleNamespace(total=1 << 40, used=(1 << 40) - (1 << 20), free=1 << 20)
    shutil.disk_usage = lambda path: usage


def full_disk() -> None:
    """The disk is full when trained weights are to be put in their place."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("weights.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)


def ctrl_c() -> None:
    """Ctrl-C at the first checkpoint."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("checkpoint.safetensors"):
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(hook)


FAULTS: dict[str, Callable[[], None]] = {"little-space": little_space, "full-disk": full_disk, "ctrl-c": ctrl_c}

CASES = {
    "suite": Case(("run", "--suite", "denois")),
    "suite-file": Case(("run", "--suite", "mine.toml")),
    "key": Case(("run", "--suite", "denoise", "--set", "recipe.step=2000")),
    "data": Case(("run", "--suite", "denoise", "--data", "photos"), lambda folder: (folder / "photos").mkdir()),
    "data-folder": Case(("run", "--suite", "denoise", "--data", "photos")),
    "own-set": Case(("run", "--suite", "denoise", "--train-set", "photos"), lambda folder: (folder / "photos").mkdir()),
    "partners": Case(("score", "restored", "clean", "--protocol", "awgn8"), other_names),
    "method": Case(("run", "--suite", "denoise", "--method", "mine.py"), own_method),
    "method-setting": Case(
        ("run", "--suite", "denoise", "--method", "mine.py", "--set", "methods.mine.reduction=0"), own_method
    ),
    "gpu": Case(("run", "--suite", "denoise", "--device", "cuda")),
    "disk-before": Case(SMOKE, fault="little-space"),
    "disk": Case(SMOKE, fault="full-disk"),
    "damage": Case(("table", "results"), damaged),
    "weights": Case(
        ("eval", "--method", "dncnn", "--weights", "dncnn_color_blind.safetensors", "--suite", "denoise"), other_weights
    ),
    "ctrl-c": Case((*SMOKE, "--set", "recipe.checkpoint_every=10"), fault="ctrl-c", keys="^C"),
    "nothing": Case(("table", "results"), lambda folder: (folder / "results").mkdir()),
    "check": Case(("check", "results", "--against", "smoke.json"), other_recipe),
    "protocols": Case(("table", "results"), stored("denoise-smoke-cpu", "derain-quick-cpu")),
}


def shown(case: Case) -> str:
    """The terminal of a case, in a fence."""
    command = shlex.join(["python", "-m", "kitbench", *case.arguments])
    with tempfile.TemporaryDirectory() as place:
        case.prepare(Path(place))
        with_fault = [str(Path(__file__).absolute()), "--with", case.fault] if case.fault else ["-m", "kitbench"]
        done = subprocess.run(
            [sys.executable, *with_fault, *case.arguments],
            cwd=place,
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "KITBENCH_DATA"} | {"CUDA_VISIBLE_DEVICES": ""},
        )
    # Progress and tables go to stdout, messages to stderr.
    log = " > log.txt" if done.stdout else ""
    lines = [f"$ {command}{log}", *([case.keys] if case.keys else []), *done.stderr.strip().splitlines()]
    return "\n".join(["```console", *lines, "$ echo $?", str(done.returncode), "```"])


def main(words: Sequence[str]) -> int:
    if words[:1] == ["--with"]:
        FAULTS[words[1]]()
        sys.argv = ["kitbench", *words[2:]]
        runpy.run_module("kitbench", run_name="__main__", alter_sys=True)
    elif len(words) == 1 and words[0] in CASES:
        print(shown(CASES[words[0]]))
    elif words:
        print(f"messages.py: no case {' '.join(words)!r}; one of {', '.join(CASES)}", file=sys.stderr)
        return 2
    else:
        print("\n".join(CASES))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
