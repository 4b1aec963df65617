"""The pages of the documentation as texts, by their path in the checkout."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.conftest import ROOT
from tools import readme

PAGES = sorted({*readme.PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"})
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PAGES}
DOCUMENTED = [name for name in TEXTS if name not in ("CHANGELOG.md", "CONTRIBUTING.md")]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)


def outside_fences(text: str) -> str:
    return FENCE.sub("", text)


def fenced(page: str, *languages: str) -> Iterator[str]:
    yield from (fence["text"] for fence in FENCE.finditer(TEXTS[page]) if fence["language"] in languages)
