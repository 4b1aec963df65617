"""Write the figures into the README: each block between `<!-- made by: COMMAND -->` and `<!-- end -->` becomes what the
command prints. `python tools/readme.py` writes, `python tools/readme.py --check` exits with 1 where a block is stale.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- made by: (?P<command>.+?) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def printed(command: str) -> str:
    """What a command prints, run at the root of the checkout; `python` is this interpreter."""
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def renewed(text: str) -> str:
    """The README with every block made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{printed(block['command'])}\n\n{block[4]}", text)


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text("utf-8")
    new = renewed(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    path.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
