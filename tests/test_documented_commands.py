"""Every command in the documentation is one that its program takes, and the cheap ones run."""

from __future__ import annotations

import argparse
import configparser
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pytest

from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.model.methods import method_cards
from kitbench.spec import loading, shipped
from tests.conftest import ROOT, run_kitbench
from tests.pages import DOCUMENTED, TEXTS, fenced, outside_fences

REFERENCE = ROOT / "results" / "reference"


@dataclass(frozen=True)
class Line:
    """A command as a page shows it, by its words; `VARIABLE=value` before it is left out."""

    page: str
    words: tuple[str, ...]
    in_text: bool = False
    """In running text, where a command may be named without its arguments."""

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def split(page: str, text: str, in_text: bool = False) -> Iterator[Line]:
    """The commands of a shell line; comments, redirections and variables left out."""
    words = shlex.split(text, comments=True)
    while words:
        end = next((place for place, word in enumerate(words) if word in ("&&", ";", "|")), len(words))
        command = [word for word in words[:end] if not re.fullmatch(r"[A-Z_]+=.*", word)]
        words = words[end + 1 :]
        if ">" in command:
            command = command[: command.index(">")]
        if command:
            yield Line(page, tuple(command), in_text)


KNOWN = ("python -m kitbench", "kitbench ", "python benchmarks/", "python tools/", "tools/gpu.sh", "torchrun", "tox -e")


def lines() -> Iterator[Line]:
    """Every command in the pages: of fences, of prompts in consoles, and of code in running text."""
    for page in DOCUMENTED:
        for text in fenced(page, "sh"):
            for line in text.replace("\\\n", " ").splitlines():
                yield from split(page, line)
        for text in fenced(page, "console"):
            for line in text.splitlines():
                if line.startswith("$ "):
                    yield from split(page, line.removeprefix("$ "))
        for code in re.findall(r"`([^`\n]+)`", outside_fences(TEXTS[page])):
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", code)
            if command.startswith(KNOWN):
                yield from split(page, command, in_text=True)


LINES = list(dict.fromkeys(lines()))


def leaf(group: click.Command, words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and its arguments."""
    while isinstance(group, click.Group):
        assert words, f"{group.name} takes a command"
        found = group.commands.get(words[0])
        assert found is not None, f"there is no command {words[0]!r}"
        group, words = found, words[1:]
    return group, words


def parse_kitbench(words: list[str], in_text: bool = False) -> None:
    """By click's own parsing; settings of `run` by the suite that they change."""
    command, arguments = leaf(cli, words)
    if in_text and not arguments:
        return
    given = command.make_context(command.name, list(arguments)).params
    chosen = given.get("suite")
    if command.name == "run" and chosen in shipped.suite_names() and "mine.py" not in given["method"]:
        seeds = [int(seed) for seed in (given["seeds"] or "").split(",") if seed]
        kinds = {name: kind for name, (kind, _) in method_cards().items()}
        loading.load_suite(chosen, given["preset"], given["overrides"], given["method"], seeds, kinds)


class Parsed(Exception):
    """The arguments of a script were accepted."""


def parse_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the script's own argparse, without what comes after it; a script without one takes no arguments."""
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    if "argparse" not in script.read_text("utf-8"):
        assert len(words) == 1 or "sys.argv" in script.read_text("utf-8"), f"{words[0]} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *_: Any) -> Any:
        parse(parser, words[1:])
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [str(script), *words[1:]])
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def parse_pip(words: list[str]) -> None:
    """pip's arguments: files that exist, extras that are declared, packages that constraints.txt pins."""
    rest = [word for word in words if word not in ("-q", "--no-deps")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert rest.pop(0) == "install"
    while rest:
        word = rest.pop(0)
        if word == "-c":
            assert (ROOT / rest.pop(0)).is_file()
        elif word == "-e":
            project = re.fullmatch(r"\.(?:\[([a-z]+)\])?", rest.pop(0))
            assert project is not None
            assert project[1] is None or project[1] in extras
        else:
            assert any(pin == word or pin.startswith(f"{word}==") for pin in pinned), (
                f"{word} is not in constraints.txt"
            )


def parse_tox(words: list[str]) -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "tox.ini")
    assert words[0] == "-e"
    assert f"testenv:{words[1]}" in settings.sections()


def parse_torchrun(words: list[str]) -> None:
    torchrun: Any = importlib.import_module("torch.distributed.run")
    given = torchrun.parse_args(words)
    assert given.module
    assert given.training_script == "kitbench"
    parse_kitbench(given.training_script_args)


AS_THEY_ARE = {"python3 -m venv .venv", ". .venv/bin/activate", "python -m pytest -n 2", "echo '$?'"}
"""Lines without a parser of their own."""


def parse(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails, raises or exits where the command is not one that its program takes."""
    words = list(line.words)
    if shlex.join(words) in AS_THEY_ARE:
        return
    if words[:3] == ["python", "-m", "kitbench"]:
        parse_kitbench(words[3:], line.in_text)
    elif words[0] == "kitbench":
        parse_kitbench(words[1:], line.in_text)
    elif words[0] == "python" and words[1].startswith(("benchmarks/", "tools/")):
        parse_script(words[1:], monkeypatch)
    elif words[0] == "pip":
        parse_pip(words[1:])
    elif words[0] == "tox":
        parse_tox(words[1:])
    elif words[0] == "torchrun":
        parse_torchrun(words[1:])
    elif words[0] == "tools/gpu.sh":
        command = ["bash", str(ROOT / words[0]), *words[1:], "--dry-run"]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "done.txt").touch()  # what `--done` and `--wheels` name must be there
            (Path(folder) / "WHEELS").mkdir()
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        pytest.fail(f"nothing parses {line}")


@pytest.mark.parametrize("line", LINES, ids=str)
def test_every_command_in_the_documentation_is_one_that_the_program_takes(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse(line if line.page != "docs/messages.md" else without_the_mistake(line), monkeypatch)


def without_the_mistake(line: Line) -> Line:
    """Two commands on the page of messages are wrong on purpose."""
    right = {"denois": "denoise", "recipe.step=2000": "recipe.steps=2000"}
    return replace(line, words=tuple(right.get(word, word) for word in line.words))


@pytest.mark.parametrize(
    "command",
    [
        "python -m kitbench runn --suite denoise",
        "python -m kitbench run --sweet denoise",
        "python -m kitbench run --suite denoise --set recipe.step=2",
        "python -m kitbench run --suite denoise --launcher nodes",
        "python benchmarks/loop.py --strech 3",
        "python benchmarks/metrics.py --markdown",
        "python benchmarks/none.py",
        "tools/gpu.sh OUT --dry",
        "torchrun --processes 4 -m kitbench run --suite denoise",
        "tox -e regression",
        "pip install -c constraint.txt -e .",
        "pip install -e '.[gpu]'",
        "make docs",
    ],
)
def test_a_wrong_command_would_be_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = split("", command)
    with pytest.raises((click.UsageError, InputError, AssertionError, SystemExit, pytest.fail.Exception)):
        parse(line, monkeypatch)


READS_ONLY = {
    "table",
    "report",
    "claims",
    "curves",
    "check",
    "diff",
    "anchors",
    "status",
    "list",
    "restore",
    "explain",
    "data",
}
"""Commands that train nothing: they are run for real."""
CHEAP = [
    line
    for line in LINES
    if line.words[:3] == ("python", "-m", "kitbench")
    and line.words[3] in READS_ONLY
    and (len(line.words) > 4 or line.words[3] == "list")  # else it is only named
    and line.words[3:5] != ("data", "fetch")
    and not any("reference/" in word for word in line.words)  # tests/test_readme.py runs those
    and line.page not in ("docs/messages.md", "docs/own-pictures.md")  # tests/test_own_pictures.py runs the latter
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages suppose it: two runs in results/, a sweep, a reference, a picture, a data folder."""
    folder = tmp_path_factory.mktemp("documented")
    run_kitbench(
        folder, "run", "--suite", "denoise", "--preset", "smoke", "--method", "kit", "--set", "recipe.steps=4",
    )  # fmt: skip
    [other] = (REFERENCE / "denoise-smoke-cpu").glob("denoise-colour-kit-s1-*")
    shutil.copytree(other, folder / "results" / other.name)
    shutil.copytree(REFERENCE / "anchors", folder / "anchors")
    shutil.copytree(REFERENCE / "scale-cpu", folder / "results" / "scale")
    shutil.copy(next(folder.glob("results/*/crops/*.png")), folder / "photo.png")
    run_kitbench(folder, "check", "results", "--against", "reference.json", "--update")
    (folder / "data").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("words", sorted({line.words[3:] for line in CHEAP}), ids=shlex.join)
def test_the_cheap_commands_do_what_the_pages_say(words: tuple[str, ...], place: Path) -> None:
    first, second = sorted(path.parent.name for path in place.glob("results/denoise-colour-kit-s*/run.json"))
    standing_for = {
        "results/RUN": f"results/{first}", "results/RUN2": f"results/{second}", "DIR": "data", "FILE": "reference.json",
        "X,Y": "9,9",
    }  # fmt: skip
    if words[0] == "anchors":
        standing_for["results"] = "anchors"
    no_set = words[:2] == ("data", "check") and "DIR" in words  # what tests/data/test_audit.py has
    run_kitbench(place, *(standing_for.get(word, word) for word in words), code=2 if no_set else 0)
