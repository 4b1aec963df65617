"""What explain finds, draws and refuses."""

from __future__ import annotations

import os
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from kitbench.apply import trained
from kitbench.apply.explain import Pixel, choices
from kitbench.apply.picture import Picture
from kitbench.errors import InputError
from tests.apply.test_restore import CPU, photograph, refused, run_of
from tests.conftest import run_kitbench


def test_explain_finds_the_twin_of_a_patch(tiny_runs) -> None:
    """A picture of flat patches, all different but for one pair: each names the other first."""
    model, _ = trained.load_trained(run_of(tiny_runs, "kit"), None, CPU)
    random = np.random.default_rng(1)
    cells = random.integers(30, 220, (8, 8, 3), dtype=np.uint8)
    cells[6, 5] = cells[1, 2]
    picture = Picture(cells.repeat(32, 0).repeat(32, 1), None)
    [one] = [c for c in choices(model, picture, Pixel(2 * 32 + 16, 32 + 16), CPU) if c.name.startswith("bottom")]
    own, *others = one.patches
    assert own == (80, 48, 8, 8)  # the patch of 4 x 4 at half resolution that holds the pixel
    assert len(set(one.patches)) == 4
    twins = {(2, 1), (5, 6)}
    assert all((left // 32, top // 32) in twins for left, top, *_ in others)


def test_explain_takes_any_attention_that_says_which_patches_it_attends_to(tiny_runs) -> None:
    """Two columns and four rows of patches, each of which attends to itself and the next one."""
    model, _ = trained.load_trained(run_of(tiny_runs, "conv"), None, CPU)
    patches = torch.tensor([[[number, (number + 1) % 8] for number in range(8)]])
    for _, module in model.attentions():
        module.attended = lambda tokens: (patches, 2)
    picture = Picture(np.zeros((64, 96, 3), np.uint8), None)
    for at, expected in (((60, 10), [(48, 0), (0, 16)]), ((10, 60), [(0, 48), (48, 48)])):
        found = choices(model, picture, Pixel(*at), CPU)
        assert found
        assert all(one.patches == [(left, top, 48, 16) for left, top in expected] for one in found)
    with pytest.raises(
        InputError, match=r"2 x 4 patches, into which a map of \d+ x 31 does not divide; give the attent"
    ):
        choices(model, Picture(np.zeros((62, 96, 3), np.uint8), None), Pixel(1, 1), CPU)


def test_explain_draws_and_prints_what_was_chosen(tiny_runs, tmp_path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), photograph(60, 80, 3))
    kit, conv = (str(run_of(tiny_runs, method).path) for method in ("kit", "conv"))
    text = run_kitbench(tmp_path, "explain", "a.png", "--run", kit, "--at", "30,20").stdout
    assert re.search(r"^bottom\.0\.attention: 40 x 30 map, 4 x 4 patches: 24,16, ", text, re.MULTILINE)
    with Image.open(tmp_path / "explain.png") as drawn:
        assert drawn.size[0] > 300
    shutil.copytree(kit, tmp_path / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    os.mkfifo(tmp_path / "pipe")
    for picture, sentence in (("gone.png", "gone.png cannot be read"), ("pipe", "pipe is not a file; give the path")):
        assert sentence in refused(tmp_path, "explain", picture, "--run", kit, "--at", "1,1", "--out", "explain.png")
    for arguments, sentence in (
        (["--run", conv, "--at", "1,1"], "does not say which patches it attends to; give a run of kit"),
        (["--run", kit, "--at", "80,1"], "outside the picture of 80 x 60"),
        (["--run", kit, "--at", "x"], "--at takes X,Y"),
        (["--run", kit, "--at", "1,1", "--out", "a.gif"], "is not a format to draw in"),
        (["--run", kit, "--at", "1,1", "--out", "a.png"], "a.png is the picture that is explained; give another file"),
        (["--run", "no-weights", "--at", "1,1"], "no-weights is stored without its weights; train it again with"),
    ):
        assert sentence in refused(tmp_path, "explain", "a.png", *arguments)
