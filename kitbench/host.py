"""How much memory this process may still take on the machine."""

from __future__ import annotations

from pathlib import Path

import psutil


def free_host_bytes() -> int:
    """Free memory of the machine in bytes, at most what the control groups (cgroups) of this process leave."""
    return min(psutil.virtual_memory().available, *_left_by_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


_CGROUP_FILES = (("memory.max", "memory.current", "inactive_file"),
                 ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip
"""Of version 2 and of version 1: the limit, what is used, and the line of memory.stat with what of it is only cache."""


def _left_by_cgroups(own: Path, root: Path) -> list[int]:
    """Bytes that each memory control group of this process leaves, from its own up to the topmost that is mounted.

    own: the file that names the groups. root: where they are mounted; version 1 has a folder for memory in it.
    """
    left = [2**63]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, (limit, used, cache) = (root / "memory", _CGROUP_FILES[1]) if controllers else (root, _CGROUP_FILES[0])
        group = top / place.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            if (folder / limit).is_file() and (text := (folder / limit).read_text().strip()).isdigit():
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - int(stat.get(cache, 0))
                left.append(max(0, int(text) - taken))
    return left
