"""Write the figures into README.md and results/README.md, from stored runs.

Each block between `<!-- made by: COMMAND -->` and `<!-- end -->` becomes what the command prints.
`python tools/readme.py` writes, `python tools/readme.py --check` exits with 1 where a block is stale.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]
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
    stale = False
    for path in PAGES:
        old = path.read_text("utf-8")
        new = renewed(old)
        stale |= old != new
        if "--check" not in sys.argv[1:]:
            path.write_text(new, "utf-8")
    return int(stale and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
