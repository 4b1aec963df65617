"""Digests of the source that decides a run's numbers: of syntax trees, so that comments and docstrings do not count."""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from importlib import resources
from pathlib import Path

import kitbench
from kitbench.model.methods import shipped

PACKAGE = Path(kitbench.__file__).parent
BASELINES = Path(str(resources.files("kitbench.baselines")))
NETWORK = ("kitbench.model.backbone", "kitbench.seeds")
DATA = (
    "kitbench.data.batches", "kitbench.data.degrade", "kitbench.data.images", "kitbench.data.photograph",
    "kitbench.data.pixels", "kitbench.spec.tasks",
)  # fmt: skip
TRAINING = ("kitbench.runs.train", "kitbench.runs.checkpoint")
SCORING = (
    "kitbench.scoring.evaluate", "kitbench.scoring.metrics", "kitbench.scoring.tiles", "kitbench.scoring.lpips",
    "kitbench.data.degrade", "kitbench.data.images", "kitbench.data.pixels",
)  # fmt: skip
ATTENTION_ROOMS = ("kitbench.attention", "kitbench.baselines")
DESCRIBING = ("needed_macs", "attended")
"""Methods that only say what a network costs or attends: no number of a run depends on them."""


def source_digests(attention: str, trained: bool) -> dict[str, str]:
    """Digest of each part of the source that a run's numbers depend on.

    attention: the name of a shipped method, or the digest of a user's own file, which then stands for itself. Parts of
    the training are left out for what is not trained.
    """
    module = shipped().get(attention)
    digests = {"attention": attention if module is None else _digest(_reached(module))}
    if trained:
        digests |= {"network": _digest(NETWORK), "data": _digest(DATA), "training": _digest(TRAINING)}
    return digests | scoring_digest()


def scoring_digest() -> dict[str, str]:
    """Of what turns a restored image into a score."""
    return {"scoring": _digest(SCORING)}


@cache
def _reached(module: str) -> tuple[str, ...]:
    """A module of an attention, and those of the attention's rooms that it imports, directly or not."""
    found, left = set(), [module]
    while left:
        name = left.pop()
        if name in found or not name.startswith(ATTENTION_ROOMS):
            continue
        found.add(name)
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.Import):
                left += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                left += [
                    name for name in (node.module, *named) if name.startswith(ATTENTION_ROOMS) and _path(name).is_file()
                ]
    return tuple(sorted(found))


@cache
def _path(name: str) -> Path:
    """The file of a module of this package, found without importing anything."""
    package, _, rest = name.removeprefix("kitbench.").partition(".")
    root = BASELINES if package == "baselines" else PACKAGE / package
    file = root.joinpath(*rest.split(".")) if rest else root
    return file / "__init__.py" if file.is_dir() else file.with_name(f"{file.name}.py")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text("utf-8"))


@cache
def _digest(modules: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps({name: canonical(_tree(name)) for name in modules}).encode()).hexdigest()


def canonical(node: object) -> object:
    """A syntax tree as JSON values: without places, docstrings, the methods DESCRIBING, and what is empty.

    Empty fields differ between releases of Python, which must not change a digest.
    """
    if isinstance(node, ast.AST):
        fields = {name: canonical(value) for name, value in ast.iter_fields(node) if name != "kind"}
        return [type(node).__name__, {name: value for name, value in fields.items() if value not in (None, [])}]
    if isinstance(node, list):
        return [canonical(item) for item in node if not _stands_alone(item) and not _describes(item)]
    return node if isinstance(node, str | int | float | bool | None) else repr(node)


def _stands_alone(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _describes(node: object) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name in DESCRIBING
