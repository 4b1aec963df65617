"""The Triton kernels compiled for GPUs that are not here: a test that fails where a launch would.

All variants are held to the stored figures of benchmarks/kernels.json, which are those of the kernels' present source;
a change of the source asks for `python benchmarks/kernels.py` again. Of each kernel, GPU and kind of numbers, the variant
that takes most is compiled each time, and must fit and take the shared memory that is stored.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the triton package", allow_module_level=True)

STORED: dict[str, Any] = json.loads((ROOT / "benchmarks" / "kernels.json").read_text("utf-8"))
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a program: CUDA C++ programming guide, technical specifications
FRAME = 24  # bytes of stack that ptxas gives to kernels that are far from the limit of registers, too


def run_kernels(folder: Path, *arguments: str) -> dict[str, Any]:
    """benchmarks/kernels.py in a process of its own: this one may hold Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernels.py", *arguments, "--json", folder / "found.json"],
        cwd=ROOT, capture_output=True, text=True, timeout=850,
        env=os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text("utf-8"))
    return found


def too_much(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row
        for row in rows
        if row["shared"] > SHARED_LIMIT[row["sm"]] or (row["kind"] == "bfloat16" and row["spilled"] > FRAME)
    ]


def fixed(row: dict[str, Any]) -> str:
    """A row without its registers, which differ from process to process: Triton iterates over sets."""
    return json.dumps({key: value for key, value in row.items() if key not in ("registers", "spilled")})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_takes_most_fits_and_takes_the_shared_memory_that_is_stored(tmp_path: Path) -> None:
    found = run_kernels(tmp_path, "--heaviest", "--processes", "1")
    groups = {(row["kernel"], row["sm"], row["kind"]) for row in STORED["rows"]}
    assert {(row["kernel"], row["sm"], row["kind"]) for row in found["rows"]} == groups
    assert not too_much(found["rows"])
    assert all(row["tensor_cores"] for row in found["rows"] if row["kind"] == "bfloat16" and row["kernel"] != "combine")
    if found["triton"] == STORED["triton"]:  # another compiler may take more or less
        assert {fixed(row) for row in found["rows"]} <= {fixed(row) for row in STORED["rows"]}


def test_stored_figures_of_all_variants_fit() -> None:
    assert {(row["kind"], row["sm"]) for row in STORED["rows"]} == {
        (kind, sm) for kind in ("float32", "tf32", "bfloat16") for sm in (80, 90)
    }
    assert not too_much(STORED["rows"])
    bf16 = [row for row in STORED["rows"] if row["kind"] == "bfloat16" and row["shape"]["width"] >= 16]
    assert all(row["tensor_cores"] for row in bf16 if row["kernel"] != "combine")


def test_stored_figures_are_of_the_present_kernels_and_of_every_variant(tmp_path: Path) -> None:
    found = run_kernels(tmp_path, "--list")
    assert STORED["source"] == found["source"], "run `python benchmarks/kernels.py`"
    stored = {(json.dumps(r["shape"]), r["kind"], r["sm"], r["kernel"]) for r in STORED["rows"]}
    wanted = {
        (json.dumps(v["shape"]), v["kind"], v["sm"], kernel.strip("_").removesuffix("_kernel"))
        for v in found["variants"]
        for kernel in v["kernels"]
    }
    assert stored == wanted, "run `python benchmarks/kernels.py`"
