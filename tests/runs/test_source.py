"""Digests of the source: they change with what is computed, and with nothing else."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest

from kitbench.errors import RunError
from kitbench.model import methods
from kitbench.runs import source
from kitbench.runs.work import begin
from tests.conftest import ROOT
from tests.stored import store

TRAINED = [name for name, (kind, _) in methods.method_cards().items() if kind == "trained"]


def digest_of(text: str) -> object:
    return source.canonical(ast.parse(text))


@pytest.mark.parametrize(
    "other",
    ['"""Another docstring."""\ndef f(x):\n    return x + 1', "def f(x):  # a comment\n\n    return (x + 1)",
     'def f(x):\n    """Says what it does."""\n    return x + 1'],
)  # fmt: skip
def test_comments_docstrings_and_layout_do_not_count(other: str) -> None:
    assert digest_of(other) == digest_of("def f(x):\n    return x + 1")


@pytest.mark.parametrize(
    "other", ["def f(x):\n    return x + 2", "def f(x):\n    return x - 1", "def f(y):\n    return y + 1"]
)
def test_everything_else_counts(other: str) -> None:
    assert digest_of(other) != digest_of("def f(x):\n    return x + 1")


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources that may be edited, and is the one that is read."""
    for name in ("kitbench", "baselines"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(source, "PACKAGE", tmp_path / "kitbench")
    monkeypatch.setattr(source, "BASELINES", tmp_path / "baselines")
    caches = (source._path, source._tree, source._digest, source._reached)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def digests() -> dict[str, dict[str, str]]:
    for cache in (source._tree, source._digest, source._reached):
        cache.cache_clear()
    return {name: source.source_digests(name, trained=True) for name in TRAINED}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def changed(before: dict[str, dict[str, str]]) -> set[tuple[str, str]]:
    """Methods and parts whose digests are others now."""
    return {(name, part) for name, parts in digests().items() for part in parts if parts[part] != before[name][part]}


def test_a_constant_of_one_attention_changes_that_attention_alone(copied: Path) -> None:
    before = digests()
    edit(
        copied / "baselines" / "window.py",
        "layout.grid(height, width, self.window)",
        "layout.grid(height, width, self.window + 1)",
    )
    assert changed(before) == {("window", "attention"), ("sparse", "attention")}  # whose dense half is a window


def test_a_comment_changes_nothing(copied: Path) -> None:
    before = digests()
    for file in (copied / "baselines" / "window.py", copied / "kitbench" / "runs" / "train.py"):
        file.write_text(file.read_text() + "\n# a comment\n")
    assert not changed(before)


def test_what_only_describes_a_method_changes_nothing(copied: Path) -> None:
    before = digests()
    edit(copied / "baselines" / "local.py", "2 * self.size**2)", "2 * self.size**2 + 1)")
    assert not changed(before)
    edit(copied / "baselines" / "local.py", "def needed_macs", "def other_macs")
    assert changed(before) == {("local", "attention")}


def test_no_source_that_counts_calls_what_only_describes() -> None:
    modules = {*source.NETWORK, *source.DATA, *source.TRAINING, *source.SCORING}
    modules |= {module for name in TRAINED for module in source._reached(methods.shipped()[name])}
    for module in modules:
        tree = source._tree(module)
        inside = {id(node) for own in ast.walk(tree) if source._describes(own) for node in ast.walk(own)}
        others = [node for node in ast.walk(tree) if id(node) not in inside]
        used = {node.attr for node in others if isinstance(node, ast.Attribute)}
        used |= {node.value for node in others if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not used & set(source.DESCRIBING), module


def test_what_an_attention_imports_is_part_of_it(copied: Path) -> None:
    before = digests()
    file = copied / "kitbench" / "attention" / "layout.py"
    file.write_text(file.read_text() + "\nADDED = 1\n")
    reached = {name for name, part in changed(before) if part == "attention"}
    assert {"kit", "kit-random", "window", "local"} <= reached
    assert not reached & {"conv", "global"}


@pytest.mark.parametrize(
    ("file", "part"),
    [("runs/train.py", "training"), ("data/batches.py", "data"), ("model/backbone.py", "network"),
     ("scoring/metrics.py", "scoring")],
)  # fmt: skip
def test_the_common_parts_count_for_every_method(copied: Path, file: str, part: str) -> None:
    before = digests()
    path = copied / "kitbench" / file
    path.write_text(path.read_text() + "\nADDED = 1\n")
    assert changed(before) == {(name, part) for name in TRAINED}


def test_a_users_own_file_stands_for_itself() -> None:
    assert source.source_digests("ab" * 32, trained=True)["attention"] == "ab" * 32


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"source": {"training": "new", "network": "n", "scoring": "s"}}, "source of the training"),
        ({"source": {"training": "t", "network": "n", "scoring": "new"}}, None),
        ({"torch": "3"}, r"torch \(2\)"),
        ({}, None),
    ],
)
def test_a_training_does_not_go_on_with_other_code_or_another_torch(
    changes: dict[str, Any], what: str | None, tmp_path: Path
) -> None:
    """Else run.json would tell of the one, and the weights be of both. Without a checkpoint the record is made anew."""
    folder = store(tmp_path, "conv", 30.0)
    (folder.path / "training.json").unlink()
    begun = folder.run.model_copy(update={"source": {"training": "t", "network": "n", "scoring": "s"}})
    folder.write("run.json", begun)
    environment = begun.environment.model_copy(update={"versions": {"torch": changes.get("torch", "2")}})
    now = begun.model_copy(update={"source": changes.get("source", begun.source), "environment": environment})
    folder.checkpoint.touch()
    if what is None:
        begin(folder, now)
    else:
        with pytest.raises(RunError, match=f"was begun with another {what}.*delete the folder to train from the start"):
            begin(folder, now)
    assert folder.run == begun
    folder.checkpoint.unlink()
    begin(folder, now)
    assert folder.run == (begun if what is None else now)
