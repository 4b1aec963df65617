"""Every command of docs/own-pictures.md, in the order of the page, on photographs of scikit-image as one's own."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from skimage import data as photographs

from kitbench.cli.main import cli
from kitbench.store.folder import RunFolder, find
from tests.pages import fenced
from tests.test_documented_commands import split

PAGE = "docs/own-pictures.md"
SMALLER = (
    "recipe.steps=4", "recipe.warmup=1", "recipe.batch=1", "recipe.crop=32", "recipe.validations=0",
    "backbone.blocks=[1, 1]", "backbone.attention_levels=[2]", "references=['input']",
)  # fmt: skip
QUICK = ["--preset", "smoke", "--jobs", "1", *(word for key in SMALLER for word in ("--set", key))]
"""Added to every training command, which otherwise takes minutes."""


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders that the page names."""
    monkeypatch.delenv("KITBENCH_DATA", raising=False)
    random = np.random.default_rng(0)
    for name, folder in (("coffee", "photos"), ("rocket", "photos"), ("astronaut", "held-out")):
        clean = getattr(photographs, name)()[100:180, 100:190]
        save(tmp_path / folder / f"{name}.png", clean)
        degraded = np.clip(clean + random.normal(0, 25, clean.shape), 0, 255).astype(np.uint8)
        for half, pixels in (("input", degraded), ("target", clean)):
            save(tmp_path / {"photos": "rain", "held-out": "rain-held-out"}[folder] / half / f"{name}.png", pixels)
    clean = photographs.chelsea()[100:170, 150:230]
    save(tmp_path / "clean" / "chelsea.png", clean)
    save(
        tmp_path / "noisy" / "chelsea.png", np.clip(clean + random.normal(0, 25, clean.shape), 0, 255).astype(np.uint8)
    )
    return tmp_path


def test_the_commands_of_the_page_do_what_it_says(place: Path) -> None:
    said: dict[str, str] = {}
    for line in (found for text in fenced(PAGE, "sh") for row in text.splitlines() for found in split(PAGE, row)):
        assert line.words[:3] == ("python", "-m", "kitbench")
        words = list(line.words[3:])
        if "RUN" in " ".join(words):
            run = next(
                folder for folder in runs(place) if folder.run.method == "kit" and folder.run.task.kind == "denoise"
            )
            words = [re.sub(r"\bRUN\b", run.path.name.rpartition("-")[2], word) for word in words]
        with contextlib.chdir(place):
            done = CliRunner().invoke(cli, [*words, *(QUICK if words[0] == "run" else [])])
        assert done.exit_code == 0, f"{line}\n{done.output}"
        said[" ".join(words)] = done.output
    torch.use_deterministic_algorithms(False)

    assert "./photos: 2 images, all readable" in said["data check ./photos ./held-out"]
    restored = {path.name for path in (place / "restored").iterdir()}
    assert restored == {"chelsea-restored.png", "chelsea-side-by-side.png"}
    report = (place / "report.html").read_text()
    assert "./held-out" in report
    assert report.count("data:image/") >= 3  # input, restored and clean
    measured = {(e.data_set, len(e.scores)) for folder in runs(place) for e in folder.evaluations()}
    assert measured == {("./held-out", 1), ("./clean", 1), ("./rain-held-out", 1)}
    tuned = [folder.run for folder in runs(place) if folder.run.recipe is not None and folder.run.recipe.init]
    assert [run.method for run in tuned] == ["kit"]
    assert "init_sha256" in tuned[0].identity
    trained = {tuple(folder.run.train_sets) for folder in runs(place) if folder.run.seed is not None}
    assert trained == {("./photos",), ("./rain",)}


def runs(place: Path) -> list[RunFolder]:
    return find([path for path in (place / "results", place / "rain-results") if path.is_dir()])
