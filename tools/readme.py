"""Write what commands print into the Markdown pages: figures from stored runs, and the program's messages.

    python tools/readme.py                      all pages
    python tools/readme.py docs/messages.md     these pages
    python tools/readme.py --check              writes nothing; exit code 1 where a block is out of date

Each block between `<!-- made by: COMMAND -->` and `<!-- end -->` becomes what the command prints. Each
`<!-- figures by: COMMAND -->` writes the figures that the page shows into results/figures.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "benchmarks", "results")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in sorted((ROOT / name).glob("*.md")))]
BLOCK = re.compile(r"(<!-- made by: (?P<command>.+?) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)
FIGURES = re.compile(r"<!-- figures by: (?P<command>.+?) -->")
DRAWN = ROOT / "results" / "figures"
NAMES = re.compile(r'(?<=["#])[a-z]{0,2}[0-9a-f]{10}(?=[")])')
"""Identifiers that matplotlib makes of what they name."""
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
SHOWN = re.compile(r"\]\((?:results/)?figures/([^)]+)\)")
"""Figures that a page shows."""


def printed(command: str) -> str:
    """What a command prints, run at the root of the checkout; `python` is this interpreter."""
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def renewed(text: str) -> str:
    """A page with every block made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{printed(block['command'])}\n\n{block[4]}", text)


def drawn(text: str) -> dict[str, str]:
    """By name, the SVG of each figure that a page shows, drawn anew from stored runs."""
    shown = set(SHOWN.findall(text))
    figures: dict[str, str] = {}
    for block in FIGURES.finditer(text):
        with tempfile.TemporaryDirectory() as folder:
            printed(f"{block['command']} --out {shlex.quote(folder)}")
            figures |= {path.name: path.read_text("utf-8") for path in Path(folder).iterdir() if path.name in shown}
    return figures


def alike(svg: str, other: str) -> bool:
    """Whether two figures look the same: their numbers may differ by rounding, and so the names in the file."""
    one, two = (NAMES.sub("", text) for text in (svg, other))
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (one, two)]
    return NUMBER.sub("0", one) == NUMBER.sub("0", two) and all(
        math.isclose(a, b, abs_tol=0.01) for a, b in zip(*numbers, strict=True)
    )


def stale(figures: Mapping[str, str]) -> dict[Path, str]:
    """Those of these figures, drawn anew, whose files are missing or look otherwise."""
    files = {DRAWN / name: svg for name, svg in figures.items()}
    return {path: svg for path, svg in files.items() if not (path.is_file() and alike(path.read_text("utf-8"), svg))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="by default all pages with such blocks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a block is out of date")
    options = parser.parse_args()
    out_of_date = []
    for path in options.pages or PAGES:
        old = path.read_text("utf-8")
        new = {path: renewed(old)} | stale(drawn(old))
        for file, text in new.items():
            if text == (file.read_text("utf-8") if file.is_file() else None):
                continue
            out_of_date.append(file)
            if not options.check:
                file.parent.mkdir(exist_ok=True)
                file.write_text(text, "utf-8")
    for path in out_of_date:
        print(f"{'out of date' if options.check else 'wrote'}: {path}")
    return int(options.check and bool(out_of_date))


if __name__ == "__main__":
    sys.exit(main())
