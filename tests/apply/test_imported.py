"""What commands do with imported runs: nothing is written into them, and what is said of one's own runs leaves them out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from PIL import Image

from kitbench.apply.exchange import import_runs
from kitbench.apply.reproduce import compare_runs
from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.runs import queue
from kitbench.runs.prepare import PreparedScoring
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Origin
from tests.conftest import TINY
from tests.stored import retrained, rewrite, store, store_whole

BY = "Mallory"
NETWORK = '''
"""A network of one number."""
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self, channels, *, depth: int = 1):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.gain * x
'''
Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """A command in this process, in a folder with tiny.toml and `results`: conv run here, kit and the input imported."""
    (tmp_path / "tiny.toml").write_text(TINY)
    for folder in find([tiny_runs]):
        place = "results" if folder.run.method == "conv" else "theirs"
        shutil.copytree(folder.path, tmp_path / place / folder.path.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KITBENCH_DATA", raising=False)

    def call(*arguments: object, code: int = 0) -> Result:
        done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert done.exit_code == code, done.output
        if code:
            assert done.stderr.count("\n") == 1
        return done

    call("export", "theirs", "--out", "x.zip", "--by", BY)
    call("import", "x.zip", "--out", "results")
    yield call
    torch.use_deterministic_algorithms(False)


def of(method: str) -> Path:
    return next(Path("results").glob(f"*-{method}-*"))


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("results").rglob("*") if path.is_file()}


RUN = ("run", "--suite", "tiny.toml", "--seeds", "0,1", "--jobs", "1")


def test_a_run_that_finds_all_stored_says_whose_it_is(invoke: Invoke) -> None:
    before = contents()
    said = " ".join(invoke(*RUN).output.split())
    assert f"5 of 5 runs are complete in results and are not run again (3 imported, run by {BY})" in said
    assert contents() == before


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("methods", [(), ("--method", "conv")])
def test_a_run_that_would_add_scores_to_imported_runs_is_refused(
    methods: tuple[str, ...], dry: tuple[str, ...], invoke: Invoke
) -> None:
    before = contents()
    said = invoke(*RUN, *methods, "--set", "task.sigma_test=[25,40]", *dry, code=2).stderr
    assert f"was imported (run by {BY}) and has no scores on skimage-test σ40 under awgn8.v1" in said
    assert "make your own in another --out" in said
    assert contents() == before


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_is_imported_while_a_command_is_at_work_is_no_failure(
    jobs: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(of("conv"), Path("later") / of("conv").name)

    def announce(*given: object, whole: Callable[..., object] = queue.announce) -> None:
        whole(*given)
        assert len(import_runs(Path("x.zip"), Path("later")).done) == 3

    monkeypatch.setattr(queue, "announce", announce)
    said = invoke("run", "--suite", "tiny.toml", "--seeds", "0,1", "--jobs", jobs, "--out", "later").output
    assert said.count("was imported meanwhile") == 3
    assert {folder.run.method for folder in find([Path("later")])} == {"conv", "kit", "input"}


def test_lpips_is_not_added_to_an_imported_run(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does its absence keep one's own runs from going on."""
    for path in of("input").glob("eval/*.json"):
        rewrite(path, lambda raw: raw.update(lpips_note="no weights here"))
    before = contents()

    def missing(
        self: PreparedScoring, *given: object, whole: Callable[..., object] = PreparedScoring.missing
    ) -> object:
        self.lpips.setdefault("none", None)  # type: ignore[arg-type]
        return whole(self, *given)

    monkeypatch.setattr(PreparedScoring, "missing", missing)
    invoke(*RUN)
    assert contents() == before


def test_without_weights_a_run_is_not_to_be_finished_but_trained_elsewhere(invoke: Invoke) -> None:
    before, run = contents(), of("kit")
    Image.new("RGB", (64, 64)).save("picture.png")
    for words in (
        ("eval", "--run", run, "--test-set", "skimage-gray"),
        ("pools", run, "--tile", "32,64"),
        ("restore", "picture.png", "--run", run),
        ("explain", "picture.png", "--run", run, "--at", "1,1"),
        ("run", "--suite", "tiny.toml", "--method", "conv", "--seeds", "3", "--set", f"recipe.init={run}"),
    ):
        said = invoke(*words, code=2).stderr
        assert f"was imported without weights (run by {BY}); train it into another --out" in said, words
    assert contents() == before


def test_an_imported_reference_is_not_scored_on_other_sets(invoke: Invoke) -> None:
    before, run = contents(), of("input")
    said = invoke("eval", "--run", run, "--test-set", "skimage-train", code=2).stderr
    assert f"was imported (run by {BY}) and has no scores on skimage-train σ25" in said
    invoke("eval", "--run", run, "--test-set", "skimage-test")  # all there: it is shown
    assert contents() == before


def test_an_imported_run_cannot_be_locked_and_so_not_be_worked_on(invoke: Invoke) -> None:
    """Whatever command is about to write, and whenever the import came."""
    folder = RunFolder(of("kit"))
    with pytest.raises(InputError, match=r"was imported \(run by Mallory\), and nothing is added"), folder.lock():
        pass
    assert not (folder.path / ".lock").exists()


def test_a_network_with_given_weights_and_methods_of_ones_own_are_exchanged(invoke: Invoke) -> None:
    """What decides their keys is none of a trained run's."""
    Path("net.py").write_text(NETWORK)
    Path("same.py").write_text('"""Changes nothing."""\n\n\ndef restore(image, sigma):\n    return image\n')
    safetensors.torch.save_file({"gain": torch.ones(1)}, "w.safetensors")
    into = ("--suite", "tiny.toml", "--out", "given")
    invoke("eval", "--method", "net.py", "--weights", "w.safetensors", "--set", "methods.net.depth=2", *into)
    invoke("eval", "--method", "same.py", *into)
    invoke("export", "given", "--out", "given.zip", "--by", BY)
    assert "2 runs imported" in invoke("import", "given.zip", "--out", "results").output


def test_a_check_is_of_ones_own_runs(tmp_path: Path) -> None:
    def call(*words: str, code: int = 0) -> Result:
        done = CliRunner().invoke(cli, ["check", *words, "--against", str(tmp_path / "reference.json")])
        assert done.exit_code == code, done.output
        return done

    own, theirs = str(tmp_path / "own"), str(tmp_path / "theirs")
    store(tmp_path / "own", "conv", 30.0)
    worse = store(tmp_path / "theirs", "kit", 30.0)
    left_out = f"left out 1 imported, run by {BY}"
    assert "left out" not in call(own, theirs, "--update").output
    worse.write("origin.json", Origin(key=worse.run.key, by=BY, archive_sha256="0", imported="2026"))
    assert left_out in call(own, theirs, "--update").output
    said = call(own, theirs).output
    assert left_out in said
    assert '"method": "kit"' not in (tmp_path / "reference.json").read_text()
    junit = tmp_path / "junit.xml"
    said = call(theirs, "--junit", str(junit), code=2).stderr
    assert f"No run of your own is here, only 1 imported, run by {BY}" in said
    assert "No run of your own" in junit.read_text()


def test_imported_seeds_do_not_widen_the_spread_of_a_reproduction(tmp_path: Path) -> None:
    """A seed at 60 dB would allow any change."""
    own = [store_whole(tmp_path / "own", "kit", seed, 30.0 + 0.1 * seed) for seed in (0, 1)]
    forged = store_whole(tmp_path / "own", "kit", 2, 60.0)
    made = retrained(store_whole(tmp_path / "made", "kit", 0, 31.0))
    assert compare_runs(own[0], made, [own[1], forged]).verdict == "within the seed spread"
    forged.write("origin.json", Origin(key=forged.run.key, by=BY, archive_sha256="0", imported="2026"))
    outcome = compare_runs(own[0], made, [own[1], forged])
    assert outcome.verdict == "different"
    assert "over 2 seeds" in outcome.why
    outcome = compare_runs(forged, retrained(store_whole(tmp_path / "made", "kit", 2, 59.0)), [])
    assert "because no run that was made here shows a spread" in outcome.why
