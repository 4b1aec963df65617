"""The suites, recipes and protocols that ship with kitbench, as texts by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Literal


@cache
def builtin(kind: Literal["suites", "recipes", "protocols"]) -> Mapping[str, str]:
    """Texts of the shipped files of a kind, by name."""
    files = sorted(resources.files(f"kitbench.{kind}").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file.read_text("utf-8") for file in files if file.name.endswith(".toml")}


def suite_names() -> list[str]:
    """Names of the shipped suites."""
    return list(builtin("suites"))
