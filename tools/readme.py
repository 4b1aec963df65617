"""Write what commands print into the Markdown pages: figures from stored runs, and the program's messages.

    python tools/readme.py                      all pages
    python tools/readme.py docs/messages.md     these pages
    python tools/readme.py --check              writes nothing; exit code 1 where a block is out of date

Each block between `<!-- made by: COMMAND -->` and `<!-- end -->` becomes what the command prints.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "benchmarks", "results")
PAGES = [ROOT / "README.md", *(page for name in FOLDERS for page in sorted((ROOT / name).glob("*.md")))]
BLOCK = re.compile(r"(<!-- made by: (?P<command>.+?) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def printed(command: str) -> str:
    """What a command prints, run at the root of the checkout; `python` is this interpreter."""
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def renewed(text: str) -> str:
    """A page with every block made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{printed(block['command'])}\n\n{block[4]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="by default all pages with such blocks")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a block is out of date")
    options = parser.parse_args()
    stale = []
    for path in options.pages or PAGES:
        old = path.read_text("utf-8")
        new = renewed(old)
        if new == old:
            continue
        stale.append(path)
        if not options.check:
            path.write_text(new, "utf-8")
    for path in stale:
        print(f"{'out of date' if options.check else 'wrote'}: {path}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
