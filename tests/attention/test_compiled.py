"""The Triton kernels compiled for GPUs that are not here: a test that fails where a launch would.

The kernels of the recipe for GPUs (bfloat16) are compiled for sm_80 and sm_90 each time. All others are held to the
stored figures of benchmarks/kernels.json, which are those of the kernels' present source; a change of the source asks
for `python benchmarks/kernels.py` again.
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


@pytest.mark.slow
@pytest.mark.timeout(900)  # of two minutes of one core each, where others use it too
@pytest.mark.parametrize("sm", [80, 90])
def test_the_kernels_of_the_recipe_for_gpus_fit_and_spill_nothing(sm: int, tmp_path: Path) -> None:
    rows = run_kernels(tmp_path, "--sm", str(sm), "--kinds", "bfloat16", "--processes", "1")["rows"]
    assert {row["kernel"] for row in rows} == {"forward", "dq", "dkv", "combine"}
    assert all(row["tensor_cores"] for row in rows if row["kernel"] != "combine" and row["shape"]["width"] >= 16)
    assert not too_much(rows)


def test_stored_figures_of_all_variants_fit() -> None:
    assert {(row["kind"], row["sm"]) for row in STORED["rows"]} == {
        (kind, sm) for kind in ("float32", "tf32", "bfloat16") for sm in (80, 90)
    }
    assert not too_much(STORED["rows"])


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
