"""What the pages show is what the commands print, and what the README teaches works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from kitbench.cost.agreement import state_macs
from kitbench.model import contract, methods
from kitbench.model.backbone import UNet
from kitbench.spec.loading import load_suite
from kitbench.store.folder import find
from kitbench.verdict.rows import rows
from tests.conftest import ROOT, run_kitbench
from tools import readme
from tools.readme import BLOCK, printed

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {path: path.read_text("utf-8") for path in readme.PAGES}
REFERENCE = ROOT / "results" / "reference" / "denoise-quick-cpu"


@pytest.mark.parametrize(
    ("path", "command"), [(path, block["command"]) for path, text in PAGES.items() for block in BLOCK.finditer(text)]
)
def test_every_figure_is_what_its_command_prints_from_stored_runs(path: Path, command: str) -> None:
    if command == "python tools/messages.py gpu" and torch.version.cuda is not None:
        pytest.skip("the page shows what a CPU build of torch leads to")
    [text] = [block["text"].strip() for block in BLOCK.finditer(PAGES[path]) if block["command"] == command]
    words = shlex.split(command)
    ours = words[:3] == ["python", "-m", "kitbench"]
    assert text == (run_kitbench(ROOT, *words[3:]).stdout.strip() if ours else printed(command))


@pytest.mark.parametrize("path", [path for path, text in PAGES.items() if readme.SHOWN.search(text)])
def test_every_picture_is_what_its_command_draws_from_stored_runs(path: Path) -> None:
    drawn = readme.drawn(PAGES[path])
    assert drawn.keys() == set(readme.SHOWN.findall(PAGES[path]))
    assert not readme.stale(drawn)


def test_every_stored_picture_is_on_a_page() -> None:
    shown = {name for text in PAGES.values() for name in readme.SHOWN.findall(text)}
    assert {path.name for path in readme.DRAWN.iterdir()} == shown


def test_a_picture_of_other_numbers_is_found_and_one_of_other_rounding_is_not() -> None:
    svg = '<g id="p0123456789"><path d="M 10.25 3.5" clip-path="url(#p0123456789)"/><text x="10.25">kit</text></g>'
    assert readme.alike(svg, svg.replace("10.25", "10.251").replace("0123456789", "abcdef0123"))
    for old, new in (("3.5", "3.6"), ("kit", "window"), ("M 10.25", "M 10.25 4.5")):
        assert not readme.alike(svg, svg.replace(old, new))


def test_the_attention_in_the_readme_is_one_that_kitbench_takes(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) <= 25
    path = tmp_path / "mine.py"
    path.write_text(code[1])
    loaded = methods.load_method(str(path), "mine")
    settings = loaded.resolve({"reduction": 8})
    contract.check_method(loaded, {1: (16, 1, 12)}, settings)
    model = UNet(3, load_suite("denoise", "quick").backbone, loaded, settings, 0).eval()
    assert state_macs(model, 3, 256, model.macs(256, 256)).note is None


def test_every_trained_method_of_the_reference_gains_6_db_and_beats_non_local_means() -> None:
    table = rows(find([REFERENCE]))
    at_25 = table[(table["sigma"] == 25)].set_index("method")["psnr_db"]
    trained = at_25.drop(["input", "nlm"])
    assert sorted(trained.index) == ["conv", "global", "kit", "kit-random", "local", "window"]
    assert (trained > at_25["input"] + 6).all()
    assert (trained > at_25["nlm"]).all()


@pytest.mark.parametrize(("name", "gain"), [("derain", 2), ("denoise-real", 2), ("deblur", 0.5)])
def test_every_trained_method_of_the_other_tasks_gains_over_its_input(name: str, gain: float) -> None:
    psnr = rows(find([REFERENCE.with_name(f"{name}-quick-cpu")])).set_index("method")["psnr_db"]
    trained = psnr.drop(["input", "nlm"], errors="ignore")
    assert len(trained) == 6
    assert (trained > psnr["input"] + gain).all()


def test_the_rainy_inputs_of_rain100l_score_what_print_has() -> None:
    psnr = rows(find([REFERENCE.with_name("derain-rain100l-cpu")])).set_index("method")["psnr_db"]
    assert round(psnr["input"], 2) == 26.90
