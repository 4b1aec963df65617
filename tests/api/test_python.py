"""kitbench from Python: layers, metrics on arrays, tables of runs, and the examples of docs/python.md."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import kitbench
from kitbench.errors import InputError, RunError
from kitbench.model.methods import load_method
from kitbench.spec.suite import Suite
from kitbench.store.folder import find
from kitbench.store.records import Origin
from kitbench.system.environment import command_line
from kitbench.verdict.rows import rows
from tests.pages import fenced
from tests.stored import store


def test_importing_kitbench_imports_nothing_slow_and_its_functions_are_offered() -> None:
    code = (
        "import sys, kitbench; slow = {'torch', 'numpy', 'pandas', 'pydantic', 'rich'} & set(sys.modules); "
        "assert not slow, slow; print(dir(kitbench))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("attention", "psnr", "ssim", "results", "run", "InputError"):
        assert f"'{name}'" in done.stdout
        assert hasattr(kitbench, name)
    with pytest.raises(AttributeError, match="no attribute 'resluts'; it offers attention, psnr"):
        _ = kitbench.resluts


# Layers


@pytest.mark.parametrize("name", ["kit", "window", "local"])
def test_a_layer_is_the_attention_of_the_suite(name: str) -> None:
    torch.manual_seed(0)
    layer = kitbench.attention(name, dim=32, heads=2)
    torch.manual_seed(0)
    loaded = load_method(name)
    same = loaded.build(32, 2, False, **loaded.resolve({}))
    x = torch.randn(1, 17, 12, 32)
    assert torch.equal(layer(x), same(x))
    assert layer.state_dict().keys() == same.state_dict().keys()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert torch.equal(again(x), layer(x))
        with pytest.raises(InputError, match="channels last"):
            again(x[..., :8])


def test_a_package_that_is_imported_first_can_still_be_called() -> None:
    import kitbench.attention.layout

    assert isinstance(kitbench.attention("conv", dim=8, heads=1), torch.nn.Module)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        (
            (2, 32, 16, 24),
            r"found \[2, 32, 16, 24\]; the channels are in second place, so give x.permute\(0, 2, 3, 1\)",
        ),
        (
            (2, 16, 24, 8),
            r"takes tokens \[B, H, W, 32\] \(channels last\), found \[2, 16, 24, 8\]; give a tensor whose last",
        ),
        ((16, 24, 32), r"found \[16, 24, 32\]"),
        ((0, 16, 24, 32), r"was given an empty tensor \[0, 16, 24, 32\]"),
    ],
)
def test_another_layout_is_refused_with_what_to_do(shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        kitbench.attention("window", dim=32, heads=2)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("kitt", {}, "did you mean 'kit'"),
        ("nlm", {}, "is no attention layer"),
        ("kit", {"kk": 3}, "has no setting 'kk'"),
        ("kit", {"heads": 5}, "cannot be built"),
        ("kit", {"dim": 0}, "dim is 0; give a whole number that is 1 or more"),
        ("kit", {"heads": 1.5}, "heads is 1.5; give a whole number"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(name: str, options: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        kitbench.attention(name, **{"dim": 32, "heads": 2, **options})


@pytest.mark.parametrize("name", ["kit", "conv"])
def test_an_input_of_another_dtype_is_refused_unless_autocast_converts_it(name: str) -> None:
    layer, x = kitbench.attention(name, 32, 2), torch.randn(1, 16, 24, 32)
    with pytest.raises(
        InputError, match=r"was given torch.float64, its weights are torch.float32; convert one of them"
    ):
        layer(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).isfinite().all()


# Metrics


def pair(shape: tuple[int, ...] = (24, 20, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, shape, dtype=np.uint8)
    return np.clip(clean + rng.integers(-20, 20, shape), 0, 255).astype(np.uint8), clean


def test_the_same_images_have_the_same_score_in_every_range() -> None:
    a, b = pair()
    mse = np.mean((a.astype(float) - b.astype(float)) ** 2)
    expected = 10 * math.log10(255**2 / mse)
    for kind in (np.float32, np.float64):
        assert kitbench.psnr((a / 255).astype(kind), (b / 255).astype(kind)) == pytest.approx(expected, abs=1e-4)
        assert kitbench.psnr(a.astype(kind), b.astype(kind), data_range=255) == pytest.approx(expected)
    assert kitbench.psnr(a, b) == pytest.approx(expected)
    assert kitbench.ssim(a / 255, b / 255) == pytest.approx(kitbench.ssim(a, b), abs=1e-9)
    assert kitbench.ssim(a.astype(float), b.astype(float), data_range=255) == pytest.approx(
        kitbench.ssim(a, b), abs=1e-9
    )
    assert kitbench.psnr(np.full((4, 4), 0.6), np.full((4, 4), 0.5)) == pytest.approx(20)
    assert kitbench.psnr(a, a) == math.inf


FLOAT = np.full((12, 12, 3), 0.5)


@pytest.mark.parametrize("metric", ["psnr", "ssim"])
@pytest.mark.parametrize(
    ("a", "b", "options", "sentence"),
    [
        (200 * FLOAT, 200 * FLOAT, {}, "must be in 0..1, found 100 to 100: .* give data_range=255"),
        (FLOAT - 1, FLOAT, {}, r"must be in 0..1, found -0.5 to 0.5: clip them as your protocol says\.$"),
        (FLOAT, FLOAT, {"data_range": 255}, r"data_range is 255, but all values are in 0..1 \(at most 0.5\)"),
        (600 * FLOAT, FLOAT, {"data_range": 255}, "must be in 0..255, found 0.5 to 300"),
        (FLOAT, FLOAT * np.nan, {}, "NaN or infinity"),
        (FLOAT, FLOAT, {"data_range": 2}, "1 or 255; found 2"),
        (*pair(), {"data_range": 1}, "uint8 images are in 0..255"),
        (pair()[0], FLOAT, {}, "must be alike"),
        (FLOAT, FLOAT[:11], {}, "must be alike"),
        (FLOAT.transpose(2, 0, 1), FLOAT.transpose(2, 0, 1), {}, "channels last, found"),
        (FLOAT[None], FLOAT[None], {}, "one image at a time"),
        (FLOAT[:0], FLOAT[:0], {}, r"is empty, found \[0, 12, 3\]"),
        (FLOAT > 0, FLOAT > 0, {}, "found bool"),
        (torch.ones(12, 12, requires_grad=True), FLOAT, {}, r"of type Tensor cannot be read as an array .*detach\(\)"),
        ([[1.0], [1.0, 2.0]], FLOAT, {}, "of type list cannot be read as an array"),
    ],
)
def test_a_range_or_shape_that_is_not_stated_is_refused(metric, a, b, options, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        getattr(kitbench, metric)(a, b, **options)


# Tables


def test_a_table_has_a_row_for_each_run_set_and_condition_and_each_image(tmp_path: Path) -> None:
    for seed in (0, 1):
        for sigma in (15, 25):
            store(tmp_path, "kit", np.linspace(28, 31, 5) + seed, seed, sigma=sigma, lpips=0.25)
    store(tmp_path, "nlm", [27.0, 28.0], seed=None)
    store(tmp_path, "nlm", [26.0], seed=None, protocol="awgn8-seed0")
    table = kitbench.results(tmp_path)
    assert len(table) == 2 * 2 + 2
    printed = rows(find([tmp_path]), "awgn8").set_index(["method", "sigma"])["psnr_db"]
    found = table[table["protocol"] == "awgn8.v1"].groupby(["method", "sigma"])["psnr_db"].mean()
    assert found.to_dict() == pytest.approx(printed.to_dict())
    kit = table[table["method"] == "kit"].iloc[0]
    assert (kit["parameters"], kit["gmacs"], kit["step_seconds"], kit["lpips"], kit["seed"]) == (
        1234,
        2.5,
        0.5,
        0.25,
        0,
    )
    assert table[table["method"] == "nlm"]["seed"].isna().all()
    images = kitbench.results([tmp_path], protocol="awgn8", per_image=True)
    assert len(images) == 2 * 2 * 5 + 2
    means = images.groupby(["run", "sigma"])["psnr_db"].mean()
    expected = table[table["protocol"] == "awgn8.v1"].set_index(["run", "sigma"])["psnr_db"]
    assert means.to_dict() == pytest.approx(expected.to_dict())


def test_an_imported_run_says_in_the_table_who_made_it(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.0)
    store(tmp_path, "conv", 30.0)
    folder.write("origin.json", Origin(key=folder.run.key, by="Jane Doe", archive_sha256="0", imported="2026"))
    table = kitbench.results(tmp_path).set_index("method")
    assert table.loc["kit", "run_by"] == "Jane Doe"
    assert table["run_by"].isna().to_dict() == {"conv": True, "kit": False}


def test_a_table_of_nothing_says_what_there_is(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0)
    with pytest.raises(InputError, match=r"no evaluation under protocol 'derain8'; found protocols: awgn8\.v1"):
        kitbench.results(tmp_path, protocol="derain8")
    with pytest.raises(InputError, match="is not a folder"):
        kitbench.results(tmp_path / "gone")
    for paths in (3, [3], None):
        with pytest.raises(InputError, match="; give the path of a folder of runs, or a list of paths"):
            kitbench.results(paths)  # type: ignore[arg-type]


def test_a_run_that_is_not_understood_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for options, sentence in (
        ({"settings": {"recipe.step": 3}}, "unknown key"),
        ({"methods": ["kitt"]}, "has no method 'kitt'"),
        ({"job": 2}, "run has no option job; known: data, device"),
        ({"methods": "conv"}, r"methods is the text 'conv'; give a list, as in methods=\['conv'\]"),
        ({"methods": []}, "methods is empty; leave it out to run those of the suite"),
        ({"seeds": ()}, "seeds is empty; leave it out"),
        ({"settings": "recipe.steps=3"}, r"settings is 'recipe.steps=3'; give changed keys"),
        ({"out": None}, "out is None; give the path of a folder"),
        ({"seeds": 3}, r"seeds is 3; give a list, as in seeds=\[3\]"),
        ({"jobs": 0}, "jobs is 0; give a whole number that is 1 or more"),
        ({"jobs": "2"}, "jobs is '2'; give a whole number"),
        ({"workers": -1}, "workers is -1; give a whole number that is 0 or more"),
        ({"workers": 1.5}, "workers is 1.5; give a whole number"),
        ({"micro_batch": 0}, "micro_batch is 0; give a whole number that is 1 or more"),
        ({"settings": {"recipe.steps": np.int64(0)}}, "recipe.steps is 0"),
        ({"settings": {"recipe.lr": np.ones(2)}}, r"settings\['recipe.lr'\] is .*; give text, a number, True or"),
        ({"settings": {"recipe": {"steps": 3}}}, r"settings\['recipe'\] is {'steps': 3}; give text"),
        ({"settings": {"recipe.init": None}}, r"settings\['recipe.init'\] is None; give text"),
    ):
        with pytest.raises(InputError, match=sentence):
            kitbench.run("denoise", **{"preset": "smoke", "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_suite_file_may_be_a_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"suite file .*mine.toml cannot be read"):
        kitbench.run(tmp_path / "mine.toml")


def test_a_run_in_another_thread_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1, "mine") as threads, pytest.raises(InputError, match="in the thread 'mine_0', where it"):
        threads.submit(kitbench.run, "denoise", preset="smoke", out=tmp_path / "out").result()
    assert not (tmp_path / "out").exists()


def test_a_run_takes_what_the_command_takes_and_records_the_command_that_makes_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any shipped method, and options without which the command would make another run."""

    def told(suite: Suite, options: object, console: object) -> None:
        raise RunError(f"{list(suite.methods)} {suite.references} {command_line()}")

    monkeypatch.setattr("kitbench.runs.queue.run_suite", told)
    with pytest.raises(RunError) as stopped:
        kitbench.run(
            "denoise", preset="smoke", methods=["neighbourhood", "nlm"], seeds=[3], out=tmp_path / "o", data=tmp_path,
            micro_batch=1, gpus=None,
        )  # fmt: skip
    assert str(stopped.value) == (
        "['neighbourhood'] ('nlm',) python -m kitbench run --suite denoise --preset smoke --method neighbourhood "
        f"--method nlm --seeds 3 --out {tmp_path}/o --data {tmp_path} --micro-batch 1"
    )


def test_the_examples_of_the_page_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = list(fenced("docs/python.md", "python"))
    assert len(examples) == 4
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), list(sys.argv))
    names: dict[str, object] = {}
    for example in examples:
        state = torch.get_rng_state() if "kitbench.run" in example else None
        exec(compile(example, "docs/python.md", "exec"), names)
        assert state is None or torch.equal(state, torch.get_rng_state())
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), list(sys.argv)) == before
    runs = find([tmp_path / "results"])
    assert sorted(folder.run.seed for folder in runs) == [0, 1]
    assert " ".join(runs[0].run.environment.command).startswith(
        "kitbench run --suite denoise --preset smoke --method conv"
    )
    assert len(names["table"]) == 2
    assert len(names["images"]) == sum(len(e.scores) for folder in runs for e in folder.evaluations())
