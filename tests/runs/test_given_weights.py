"""Evaluating given weights: rows like all others, no training; and the anchors that prove the protocols right."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from kitbench.baselines import dncnn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kitbench.cli.main import cli
from kitbench.data.cards import card
from kitbench.data.photograph import Photograph, read_set
from kitbench.errors import InputError
from kitbench.model import methods
from kitbench.model.noise_level import at_noise_level
from kitbench.model.weights import fit, read_state
from kitbench.runs.cell import Cell
from kitbench.scoring import evaluate
from kitbench.spec import loading
from kitbench.store.folder import RunFolder, find
from kitbench.verdict.anchors import anchors, anchors_markdown
from kitbench.verdict.published import published
from kitbench.verdict.rows import rows
from tests.conftest import ROOT, TINY

Kitbench = Callable[..., "subprocess.CompletedProcess[str]"]
ANCHORS = ROOT / "results" / "reference" / "anchors"
PROTOCOLS = ("awgn8", "awgn8-seed0")


@pytest.fixture(scope="module")
def dncnn_25(data_root: Path) -> Path:
    path = data_root / "weights" / "dncnn_25.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


def test_dncnn_takes_the_noise_that_it_predicts_from_its_input() -> None:
    network = dncnn.Network(3, depth=4, width=8)
    x = torch.rand(2, 3, 9, 11)
    torch.testing.assert_close(network(x) + network.model(x), x)
    assert [key for key in dncnn.Network(1).state_dict() if key.endswith("weight")] == [
        f"model.{number}.weight" for number in range(0, 33, 2)
    ]
    with FlopCounterMode(display=False) as counter:
        network(x[:1])
    assert counter.get_total_flops() == 2 * network.macs(9, 11)
    with pytest.raises(InputError, match="depth must be at least 2"):
        methods.load_method("dncnn").build_network(1, depth=1)


@pytest.mark.parametrize(("data_set", "images"), [("Set12", 2), ("BSD68", 1)])
def test_published_weights_reproduce_the_stored_scores(
    data_set: str, images: int, data_root: Path, dncnn_25: Path
) -> None:
    folder = next(folder for folder in find([ANCHORS]) if folder.run.mode == "gray")
    network = dncnn.Network(1).eval()
    fit(network, read_state(dncnn_25), dncnn_25)
    photographs = read_set(card(data_set), data_root, "gray")[:images]
    reproduce(network, folder, "awgn8-seed0", photographs, data_set)


@pytest.mark.parametrize(
    ("method", "weights", "data_set", "protocol"),
    [
        ("ffdnet", "ffdnet_color.pth", "CBSD68", "awgn8-seed0"),
        ("prenet", "prenet6_rain100l.pth", "Rain100L", "rain-y8-truncated"),
    ],
)
def test_published_colour_weights_reproduce_the_stored_score_of_an_image(
    method: str, weights: str, data_set: str, protocol: str, data_root: Path
) -> None:
    path = data_root / "weights" / weights
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    stored = [
        f for f in find([ANCHORS]) if f.run.method == method and any(e.protocol.id == protocol for e in f.evaluations())
    ]
    if not stored:
        pytest.skip(f"no scores of {method} are stored")
    network = methods.load_method(method).build_network(3).eval()
    fit(network, read_state(path), path)
    reproduce(network, stored[0], protocol, read_set(card(data_set), data_root, "colour")[:1], data_set)


def reproduce(
    network: nn.Module, folder: RunFolder, protocol: str, photographs: list[Photograph], data_set: str
) -> None:
    """Score these images again at the lowest stored noise level, and compare with the record."""
    found = [e for e in folder.evaluations() if (e.data_set, e.protocol.id) == (data_set, protocol)]
    stored = min(found, key=lambda e: e.sigma or 0)
    one_level = at_noise_level(network, stored.sigma, "mine")
    restore = evaluate.network(one_level, torch.device("cpu"), stored.protocol, "float32")
    conditions = evaluate.Conditions(data_set, folder.run.task, stored.sigma, stored.protocol, None)
    for score, expected in zip(evaluate.scores(restore, photographs, conditions), stored.scores, strict=False):
        assert score.image == expected.image
        assert score.psnr == pytest.approx(expected.psnr, abs=2e-3)  # another processor rounds a few pixels otherwise
        assert score.ssim == pytest.approx(expected.ssim, abs=1e-4)


def test_stored_anchors_are_within_two_hundredths_of_a_decibel_of_print_or_name_the_convention() -> None:
    found = anchors(find([ANCHORS]))
    images = {(a.figure.data_set, a.evaluation.protocol.id): len(a.evaluation.scores) for a in found}
    sizes = {"Set12": 12, "BSD68": 68, "CBSD68": 68, "Kodak24": 24, "McMaster": 18, "Rain100L": 100}
    assert {(name, noise) for name in ("Set12", "BSD68") for noise in PROTOCOLS} <= images.keys()
    assert all(count == sizes[name] for (name, _), count in images.items())
    for anchor in found:
        assert abs(anchor.difference) <= 0.02 or anchor.unlike_print
    assert all(f"{a.psnr_db:.3f}" in anchors_markdown(found) for a in found)


def test_an_anchor_scored_by_another_convention_than_print_is_marked_with_what_differs() -> None:
    [prenet] = [model for model in published() if model.method == "PReNet"]
    anchor = anchors(find([ANCHORS]))[0]
    texts = []
    for protocol in ("rain-y8-truncated", "rain-y8-ssim2d", "rain-y8-ssim2d-tile"):
        chosen = loading.load_suite("derain", overrides=[f"protocol={protocol}"]).protocol
        evaluation = anchor.evaluation.model_copy(update={"protocol": chosen, "stamp": chosen.stamp})
        texts.append(anchors_markdown([replace(anchor, model=prenet, evaluation=evaluation)]))
    assert "†" not in texts[0]
    assert "rain-y8-ssim2d.v1†" in texts[1]
    theirs = "rounding 8bit where print has 8bit-truncated, space y where print has y-unrounded"
    assert f"† Another convention than print: {theirs} (protocol rain-y8-truncated.v2).\n" in texts[1]
    assert f"{theirs}, tile 256 where print has 0 (protocol" in texts[2]


Invoke = Callable[..., Result]


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """The command line in this process, in a temporary folder that holds tiny.toml and some networks."""
    (tmp_path / "tiny.toml").write_text(TINY)
    for name, result in RESULTS.items():
        (tmp_path / f"{name}.py").write_text(NETWORK.format(result=result))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KITBENCH_DATA", raising=False)

    def invoke(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == code, done.output
        return done

    yield invoke
    torch.use_deterministic_algorithms(False)


NETWORK = '''"""mine: a whole network."""
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, channels, *, power: int = 1):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {result}
'''
RESULTS = {"good": "x * self.gain", "shape": "x[..., 1:]", "nan": "x / (0 * self.gain)", "raises": "x @ x"}


def zero_weights(channels: int) -> None:
    """Of a dncnn of two layers that predicts no noise, and so returns its input."""
    state = {key: torch.zeros_like(t) for key, t in dncnn.Network(channels, depth=2, width=4).state_dict().items()}
    safetensors.torch.save_file(state, "zero.safetensors")


SMALL = ("--set", "methods.dncnn.depth=2", "--set", "methods.dncnn.width=4")
TWO_MODES = ("--set", 'data.embedded.modes=["colour", "gray"]')


def test_a_network_that_changes_nothing_scores_as_the_input_does(in_process: Invoke, tmp_path: Path) -> None:
    zero_weights(1)
    common = ("--suite", "tiny.toml", *TWO_MODES, "--out", "out")
    done = in_process("eval", "--method", "dncnn", "--weights", "zero.safetensors", *SMALL, *common)
    assert "without colour: zero.safetensors does not fit" in done.output
    in_process("eval", "--method", "input", *common)
    table = rows(find([tmp_path / "out"]))
    gray = table[table["mode"] == "gray"].set_index("method")
    assert gray.loc["dncnn", "psnr_db"] == gray.loc["input", "psnr_db"]
    assert gray.loc["dncnn", "ssim"] == gray.loc["input", "ssim"]
    assert gray.loc["dncnn", "parameters"] == 9 * 4 + 4 + 9 * 4 + 1
    assert gray.loc["dncnn", "gmacs"] == pytest.approx(72 * 256 * 256 / 1e9)
    assert gray.loc["dncnn", "seeds"] == "-"
    assert list(table[table["mode"] == "colour"]["method"]) == ["input"]

    # The same again scores nothing anew; the run has what any other has, and nothing of a training.
    run = next(folder.path for folder in find([tmp_path / "out"]) if folder.run.method == "dncnn")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}
    assert {path.relative_to(run).parts[0] for path in before} == {"run.json", "eval"}
    in_process("eval", "--method", "dncnn", "--weights", "zero.safetensors", *SMALL, *common)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.json")} == before
    in_process("check", "out", "--against", "ref.json", "--update")
    in_process("check", "out", "--against", "ref.json")
    in_process("report", "out")
    assert "dncnn" in Path("report.html").read_text()
    done = in_process("reproduce", str(run), code=2)
    assert "was scored with given weights: score them again with `kitbench" in done.stderr


LEVEL = NETWORK.replace("forward(self, x)", "forward(self, x, sigma)").format(result="0 * x + sigma * self.gain")
"""Its result is the noise level everywhere, whatever the image."""


def test_one_run_scores_all_noise_levels_of_a_network_that_takes_them(in_process: Invoke, tmp_path: Path) -> None:
    Path("level.py").write_text(LEVEL)
    safetensors.torch.save_file({"gain": torch.ones(1)}, "one.safetensors")
    given = ("eval", "--method", "level.py", "--weights", "one.safetensors", "--out", "out")
    tiled = ("--set", "protocol=awgn8-tile", "--set", "protocol.lpips=none")
    for protocol in ((), tiled):
        in_process(*given, "--suite", "tiny.toml", "--set", "task.sigma_test=[15, 50]", *protocol)
    [folder] = find([tmp_path / "out"])
    photographs = read_set(card("skimage-test"), None, "colour")
    assert sorted((e.sigma or 0, e.protocol.tile) for e in folder.evaluations()) == [
        (15, 0),
        (15, 256),
        (50, 0),
        (50, 256),
    ]
    for evaluation in folder.evaluations():
        assert evaluation.sigma is not None
        for score, photo in zip(evaluation.scores, photographs, strict=True):
            error = photo.pixels.astype(float) - evaluation.sigma
            assert score.psnr == pytest.approx(10 * math.log10(255**2 / (error**2).mean()), abs=1e-9)
    cost = folder.run.cost
    assert cost is not None
    assert cost.parameters == 1
    done = in_process(*given, "--suite", "derain", "--out", "out2", code=2)
    assert "'level' needs the noise level (sigma), which only tasks of kind denoise state" in done.stderr
    assert not Path("out2").exists()


def test_a_reference_is_the_same_run_whoever_scored_it(in_process: Invoke, tmp_path: Path) -> None:
    in_process("eval", "--method", "input", "--suite", "tiny.toml", "--out", "out")
    resolved = loading.load_suite("tiny.toml")
    cell = Cell(resolved, "colour", "input", "input", None, {}, None, "cpu", None)
    assert [folder.run.key for folder in find([tmp_path / "out"])] == [cell.key]


def test_weights_and_settings_are_part_of_the_key_and_tell_rows_apart(in_process: Invoke, tmp_path: Path) -> None:
    for number in (0, 1):
        safetensors.torch.save_file({"gain": torch.full((1,), 1.0 - number)}, f"{number}.safetensors")
    for arguments in (["0.safetensors"], ["1.safetensors"], ["1.safetensors", "--set", "methods.good.power=2"]):
        in_process("eval", "--method", "good.py", "--weights", *arguments, "--suite", "tiny.toml", "--out", "out")
    table = rows(find([tmp_path / "out"]))
    assert [name.partition("@")[0] for name in sorted(table["method"])] == [
        "good (power 1, weights 0.safetensors", "good (power 1, weights 1.safetensors",
        "good (power 2, weights 1.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--method", "dncnn"], "needs its weights; name their file with --weights"),
        (["--method", "dncnn", "--weights", "none.pth"], "none.pth cannot be read"),
        (["--method", "dncnn", "--weights", "zero.safetensors"], "lacks model.10.bias, model.10.weight"),
        (["--method", "input", "--weights", "zero.safetensors"], "training-free and takes no weights"),
        (["--method", "kit", "--weights", "zero.safetensors"], "trained and scored by `kitbench run`"),
        (["--method", "dncn", "--weights", "zero.safetensors"], "did you mean 'dncnn'"),
        (["--method", "shape.py", "--weights", "one.safetensors"], "expected the shape of its input"),
        (["--method", "nan.py", "--weights", "one.safetensors"], "not finite"),
        (["--method", "raises.py", "--weights", "one.safetensors"], "raises.py' (input [1, 3, 61, 47]) failed: "),
        (
            ["--method", "good.py", "--weights", "one.safetensors", "--set", "methods.good.powre=2"],
            "did you mean 'power'",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_sentence(
    arguments: list[str], expected: str, in_process: Invoke
) -> None:
    zero_weights(3)
    safetensors.torch.save_file({"gain": torch.ones(1)}, "one.safetensors")
    done = in_process("eval", *arguments, "--suite", "tiny.toml", "--out", "out", code=2)
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_a_network_is_no_method_of_a_training_suite(in_process: Invoke) -> None:
    done = in_process("run", "--suite", "tiny.toml", "--method", "good.py", code=2)
    assert "a whole network; `kitbench eval` scores it" in done.stderr


def test_eval_as_a_user_types_it(kitbench: Kitbench) -> None:
    done = kitbench("eval", "--method", "input", "--suite", "tiny.toml", "--out", "out")
    assert "wrote out/denoise-colour-input-" in done.stdout
    done = kitbench("anchors", "out", code=2)
    assert "None of these runs has weights with a figure" in done.stderr
