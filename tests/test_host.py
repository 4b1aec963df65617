"""Free memory of the machine, on control groups that are made up."""

from __future__ import annotations

import pytest

from kitbench.host import _left_by_cgroups


@pytest.mark.parametrize(
    ("top", "line", "names"),
    [
        ("", "0::/slurm/job_7/step_0", ("memory.max", "memory.current", "inactive_file")),
        ("memory", "4:memory:/slurm/job_7/step_0",
         ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)  # fmt: skip
def test_free_memory_is_what_every_group_of_the_process_leaves(top, line, names, tmp_path):
    """The limit of a job of Slurm stands in a group above the process's own; what it has used of it is not free."""
    limit, used, cache = names
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{line}\n")
    for place, most, now in (("slurm", "max", 99), ("slurm/job_7", "1000", 700), ("slurm/job_7/step_0", "max", 500)):
        folder = tmp_path / "cgroup" / top / place
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text(f"{now}\n")
        (folder / "memory.stat").write_text(f"anon 10\n{cache} 200\n")
    assert min(_left_by_cgroups(tmp_path / "own", tmp_path / "cgroup")) == 500
    assert min(_left_by_cgroups(tmp_path / "none", tmp_path / "cgroup")) == 2**63
