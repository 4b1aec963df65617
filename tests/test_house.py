"""The structure of the package: which room may import which, no circles, and nothing too large to read.

Every import statement counts, wherever it stands: also those inside functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

TOP = "kitbench"
MAIN = "kitbench.__main__"
ROOMS: dict[str, set[str]] = {
    TOP: set(),  # errors, host, seeds, text
    "spec": set(),
    "store": {"spec"},
    "verdict.scaling": {"store"},
    "verdict": {"spec", "store", "verdict.scaling"},
    "verdict.page": {"store", "verdict", "verdict.scaling"},
    "data": {"spec"},
    "attention": set(),
    "baselines": {"attention"},
    "model": {"spec", "attention", "baselines"},
    "system": {"spec", "store"},
    "scoring": {"spec", "store", "data", "model"},
    "cost": set(),
    "cost.sweep": {"spec", "store", "model", "system", "cost"},
    "runs": {"spec", "store", "data", "model", "system", "scoring", "cost"},
    "launch": {"spec", "store", "system", "runs"},
    "apply": {"spec", "store", "data", "attention", "model", "scoring", "system", "runs", "verdict"},
    "api": {"spec", "store", "model", "scoring", "runs", "verdict"},
    "cli": {
        "spec", "store", "verdict.scaling", "verdict", "verdict.page", "data", "model", "system", "cost.sweep", "runs",
        "launch", "apply",
    },
    MAIN: {"cli"},
}  # fmt: skip
"""Each room with the rooms that it may import, besides itself and the top floor. Only rooms that stand above it here,
so that all arrows go one way."""

TREES = ("kitbench", "baselines", "benchmarks", "tools", "tests")
FILES_AT_TOP, LINES, FUNCTION, PARAMETERS = 6, 400, 60, 6
OPERATORS = {
    "kitbench/attention/operator.py patch_attention": "the operator",
    "kitbench/attention/reference.py patch_attention": "its definition",
    "kitbench/attention/triton_launch.py forward": "its kernel",
    "kitbench/attention/triton_launch.py backward": "its kernel",
    "kitbench/attention/triton_launch.py problem": "its arguments",
    "benchmarks/kernels.py record.forward": "stands in for the kernel's launch",
    "kitbench/cost/formulas.py _convolution_backward": "torch's own operator",
}
"""Functions whose parameters are those of an operator, without a decorator that says so."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in (("kitbench", ROOT / "kitbench"), ("kitbench.baselines", ROOT / "baselines")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def imported(name: str) -> set[str]:
    """What a module imports anywhere in its text: modules of the package, and names of others."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            of = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = of & modules().keys()
            found |= inside if inside == of else inside | {str(node.module)}
    return found


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports."""
    return imported(name) & modules().keys()


def room(name: str) -> str:
    """The room of a module: the deepest folder that is listed, or the top floor."""
    if name == MAIN:
        return MAIN
    parts = name.removeprefix(TOP).strip(".").split(".")
    folders = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    return next((folder for folder in folders if folder in ROOMS), TOP)


def test_every_folder_of_code_is_a_listed_room() -> None:
    data = {"suites", "recipes", "protocols", "published", "store/schemas"}  # packages that hold no code
    folders = {path.parent.relative_to(ROOT / "kitbench").as_posix() for path in (ROOT / "kitbench").rglob("*.py")}
    listed = {name.replace(".", "/") for name in ROOMS} - {"kitbench", "kitbench/__main__", "baselines"}
    assert folders - data - {"."} == listed


def test_no_module_imports_itself_by_way_of_others() -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(imports(name)):
                visit(other, (*way, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_the_arrows_between_rooms_go_one_way() -> None:
    order = list(ROOMS)
    for name, known in ROOMS.items():
        assert known <= set(order[: order.index(name)]), f"{name} may import only rooms that stand above it in the list"
    strays = [
        f"{name} imports {other}: {room(name)} may not know {room(other)}"
        for name in modules()
        for other in imports(name)
        if room(other) not in {room(name), TOP, *ROOMS[room(name)]}
    ]
    assert not strays, "\n".join(sorted(strays))


def test_the_verdict_reaches_no_room_that_runs_networks_or_reads_images() -> None:
    reached, left = set(), [name for name in modules() if room(name).startswith("verdict")]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += imports(name)
    assert {room(name) for name in reached} <= {TOP, "spec", "store", "verdict", "verdict.scaling", "verdict.page"}
    assert not {name for name in reached if any(other.split(".")[0] == "torch" for other in imported(name))}


def test_few_files_lie_on_the_top_floor() -> None:
    assert len(list((ROOT / "kitbench").glob("*.py"))) <= FILES_AT_TOP


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function below a node with its qualified name."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        name = f"{owner}.{child.name}".lstrip(".") if named else owner  # type: ignore[attr-defined]
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, child
        yield from functions(child, name)


def may_have_many_parameters(place: str, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Attention constructors, operators with their kernels and formulas, and commands.

    A command's parameters are its options, declared one by one: `**options` would lose their types.
    """
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    exempt = ("custom_op", "register_fake", "register_flop_formula", "triton.jit", "click.command")
    return place.endswith("Attention.__init__") or place in OPERATORS or any(word in decorators for word in exempt)


def too_large() -> Iterator[str]:
    for path in sorted(path for tree in TREES for path in (ROOT / tree).rglob("*.py")):
        file, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        if text.count("\n") > LINES:
            yield f"{file}: file"
        for name, function in functions(ast.parse(text)):
            place, arguments = f"{file} {name}", function.args
            if (function.end_lineno or 0) - function.lineno + 1 > FUNCTION:
                yield f"{place}: function"
            named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            count = sum(a.arg not in ("self", "cls") for a in named)
            # Tests state every default of the runs that they make.
            if count > PARAMETERS and not file.startswith("tests/") and not may_have_many_parameters(place, function):
                yield f"{place}: parameters"


def test_files_functions_and_parameter_lists_can_be_taken_in_at_a_glance() -> None:
    found = list(too_large())
    assert not found, f"more than {LINES} lines, {FUNCTION} lines or {PARAMETERS} parameters"


@pytest.mark.parametrize("name", sorted(name for name in OPERATORS))
def test_the_listed_operators_exist(name: str) -> None:
    file, function = name.split(" ")
    assert function in {found for found, _ in functions(ast.parse((ROOT / file).read_text("utf-8")))}
