"""The documentation is true: every link leads somewhere, every key, method and file that it names exists."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kitbench.data.cards import cards
from kitbench.model import methods
from kitbench.spec import loading, shipped
from kitbench.spec import suite as suites
from tests.conftest import ROOT
from tests.pages import DOCUMENTED, PAGES, TEXTS, fenced, outside_fences
from tools import messages, readme


def test_the_readmes_test_command_is_one_line_that_ci_finds() -> None:
    [command] = [line for line in TEXTS["README.md"].splitlines() if "python -m pytest" in line]
    assert command.endswith("python -m pytest -n 2")
    assert "-e '.[test]'" in command
    assert "-c constraints.txt" in command


# Messages


@pytest.mark.parametrize("name", list(messages.CASES))
def test_every_message_has_its_place_on_the_page(name: str) -> None:
    blocks = [block["command"] for block in readme.BLOCK.finditer(TEXTS["docs/messages.md"])]
    assert blocks.count(f"python tools/messages.py {name}") == 1  # that it is what is printed: tests/test_readme.py


# Links


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", outside_fences(path.read_text("utf-8")), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return frozenset(found)


LINKS = [
    (page, target)
    for page, text in TEXTS.items()
    for target in re.findall(r"!?\[[^]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", outside_fences(text)))
]


@pytest.mark.parametrize(("page", "target"), [(p, t) for p, t in LINKS if not t.startswith("https://")])
def test_every_relative_link_and_anchor_leads_somewhere(page: str, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (ROOT / page).parent / name if name else ROOT / page
    assert path.exists(), f"{page} links to {target}"
    assert path.resolve().is_relative_to(ROOT.resolve())
    assert not anchor or anchor in anchors(path), f"{page} links to {target}: no such heading"


def test_every_link_elsewhere_is_https() -> None:
    assert [target for _, target in LINKS if ":" in target and not target.startswith("https://")] == []


def linked(*pages: str) -> set[str]:
    """The files that these pages link to."""
    paths = (((ROOT / page).parent / target.partition("#")[0]).resolve() for page, target in LINKS if page in pages)
    return {path.relative_to(ROOT.resolve()).as_posix() for path in paths if path.is_relative_to(ROOT.resolve())}


def test_every_page_is_two_links_from_the_readme_at_most() -> None:
    first = linked("README.md")
    assert {path.relative_to(ROOT).as_posix() for path in PAGES} <= first | linked(*first) | {"README.md"}


def test_every_file_that_a_page_names_exists() -> None:
    named = {
        (page, name)
        for page in DOCUMENTED
        for name in re.findall(r"`((?:kitbench|baselines|benchmarks|datasets|tools|\.github)/[\w./-]+)`", TEXTS[page])
    }
    assert [(page, name) for page, name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].encode()) <= 10_240


# Tables of keys


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    below = TEXTS[page].partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in below.splitlines() if row.startswith("|")]
    assert len(cells) > 2, f"{page} has no table below {heading!r}"
    return cells[2:]


def written(value: object) -> str:
    """A default as the pages write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("page", "heading", "model"),
    [
        ("docs/suites.md", "Recipe", suites.Recipe),
        ("docs/suites.md", "Backbone", suites.Backbone),
        ("docs/protocols.md", "The keys of a protocol", suites.Protocol),
    ],
)
def test_the_pages_list_every_key_with_its_default(page: str, heading: str, model: Any) -> None:
    expected = [
        [name, "" if field.is_required() else written(field.default)] for name, field in model.model_fields.items()
    ]
    assert [row[:2] for row in table(page, heading)] == expected


def test_the_page_of_methods_lists_every_setting_with_its_default() -> None:
    expected = {
        (name, setting, written(default))
        for name in methods.shipped()
        if name != "kit-unshifted" and (loaded := methods.load_method(name)).restore is None
        for setting, default in loaded.resolve({}).items()
    }
    assert {(row[0], row[1], row[2]) for row in table("docs/methods.md", "Settings")} == expected


def test_the_pages_name_every_method_protocol_suite_and_data_set() -> None:
    assert {row[0].strip("`") for row in table_of_methods()} == set(methods.shipped())
    text = TEXTS["docs/protocols.md"]
    assert [protocol.id for protocol in loading.protocols() if f"`{protocol.id}`" not in text] == []
    assert [name for name in shipped.suite_names() if f"| `{name}` |" not in TEXTS["docs/suites.md"]] == []
    assert [name for name in cards() if not re.search(rf"(?<![\w-]){name}(?![\w-])", TEXTS["docs/data.md"])] == []


def table_of_methods() -> list[list[str]]:
    rows = [row for row in TEXTS["docs/methods.md"].partition("\n## ")[0].splitlines() if row.startswith("| `")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_suite_on_the_page_of_suites_is_one_that_kitbench_reads(tmp_path: Path) -> None:
    [text] = fenced("docs/suites.md", "toml")
    (tmp_path / "mine.toml").write_text(text)
    loaded = loading.load_suite(str(tmp_path / "mine.toml"))
    assert list(loaded.methods) == ["kit", "kit-k2", "kit-k8"]
    assert loaded.recipe.lr == 2e-3
    assert {loaded.methods[name].settings.get("k") for name in loaded.methods} == {None, 2, 8}


def test_the_protocol_on_the_page_of_protocols_is_one_that_kitbench_reads(tmp_path: Path) -> None:
    [text] = fenced("docs/protocols.md", "toml")
    (tmp_path / "mine.toml").write_text(text)
    protocol = loading.load_suite("denoise", overrides=[f"protocol={tmp_path / 'mine.toml'}"]).protocol
    assert (protocol.stamp.partition("+")[0], protocol.border) == ("mine.v1", 4)


# Files beside the pages


def test_the_citation_names_this_version_and_the_paper() -> None:
    yaml = pytest.importorskip("yaml")
    citation = SimpleNamespace(**{
        key.replace("-", "_"): value for key, value in yaml.safe_load((ROOT / "CITATION.cff").read_text()).items()
    })  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation.cff_version == "1.2.0"
    assert citation.title == project["name"]
    assert str(citation.version) == project["version"]
    assert citation.license == project["license"]
    assert citation.message
    assert [author["name"].lower() for author in citation.authors] == [a["name"].lower() for a in project["authors"]]
    [paper] = citation.references
    assert paper["doi"] == "10.1109/CVPR52688.2022.00218"
    assert [author["family-names"] for author in paper["authors"]] == ["Lee", "Choi", "Sohn", "Min"]


def test_the_hooks_need_no_network() -> None:
    yaml = pytest.importorskip("yaml")
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = [hook for repository in repositories for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert [hook["entry"].split()[:3] for hook in hooks] == [
        ["python", "-m", "ruff"],
        ["python", "-m", "ruff"],
        ["python", "-m", "mypy"],
    ]
