"""Write the checksums of a set into its card, from files that are known to be right.

    python tools/checksums.py NAME DATA_FOLDER

The card's `checksum` says of what: decoded pixels, or file bytes. Run it once, on a set from its authors.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from kitbench.data.cards import card
from kitbench.data.images import decode
from kitbench.data.locate import files_of_set, locate
from kitbench.data.pixels import pixel_sha256


def main(name: str, root: Path) -> None:
    chosen = card(name)
    folder = locate(chosen, root)
    if folder is None or chosen.checksum == "none":
        raise SystemExit(f"{name} is not in {root}, or its card asks for no checksums")
    sums = {}
    for path in sorted({path for entry in files_of_set(chosen, folder) for path in entry.paths}):
        relative = path.relative_to(folder)
        if chosen.checksum == "pixels":
            sums[relative.with_suffix("").as_posix()] = pixel_sha256(decode(path))
        else:
            sums[relative.as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    toml = next(
        file
        for file in (Path(__file__).parent.parent / "datasets").glob("*.toml")
        if f'\nname = "{name}"\n' in "\n" + file.read_text("utf-8")
    )
    head, _, tail = toml.read_text("utf-8").partition("\n[sha256]\n")
    rest = tail[tail.index("\n[") :] if "\n[" in tail else ""
    lines = "".join(f'"{key}" = "{value}"\n' for key, value in sums.items())
    toml.write_text(f"{head.rstrip()}\n{rest.rstrip()}\n\n[sha256]\n{lines}".replace("\n\n\n", "\n\n"), "utf-8")
    print(f"{toml}: {len(sums)} checksums")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
