"""benchmarks/attention.py: run as small as it can be, with operators that fail, and its tables of figures of a GPU."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

SMALL = ("--dims", "32", "--k", "4", "--sizes", "32", "--rounds", "1")
MODULES = {"kit", "window", "window sdpa", "window no bias"}
FAMILY = {"channel", "overlap", "sparse", "nlsn", "centres", "categories", "graph"}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import attention

    return attention


@pytest.fixture
def operators(benchmark: ModuleType) -> ModuleType:
    """What the benchmark measures."""
    return sys.modules["attention_operators"]


@pytest.fixture
def rows(benchmark: ModuleType) -> ModuleType:
    """How it measures."""
    return sys.modules["attention_rows"]


def call(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command, run in this process, where faults can be put in."""
    monkeypatch.setattr(sys, "argv", ["attention.py", *arguments])
    try:
        benchmark.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_smallest_case_is_measured_stored_and_printed(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / "attention.py", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = run(*SMALL)
    stored = json.loads((tmp_path / "attention-cpu.json").read_text())
    assert (tmp_path / "attention-cpu.png").stat().st_size > 10_000
    assert stored["machine"]["device"] == "cpu"
    assert stored["machine"]["torch"] == torch.__version__
    assert list(stored["product_macs_per_second"]) == ["float32"]
    assert stored["copy_bytes_per_second"] > 0
    assert stored["gpu_states"] == []
    assert stored["lost"] is None
    found = {(row["scope"], row["mode"], row["operator"]): row for row in stored["rows"]}
    assert len(found) == len(stored["rows"])
    names: dict[tuple[str, str], set[str]] = {}
    for scope, mode, name in found:
        names.setdefault((scope, mode), set()).add(name)
    more = {"reference", "global sdpa"} | FAMILY
    cutting = {"kit", "window no bias", "cut and join"}
    assert names == {
        ("module", "forward"): MODULES | more | {"retrieval"},
        ("module", "training"): MODULES | more,
        ("module", "backward"): MODULES,
        ("operator", "forward"): MODULES,
        ("operator", "backward"): MODULES,
        ("cutting", "forward"): cutting,
        ("cutting", "backward"): cutting,
    }
    for (scope, mode, name), row in found.items():
        assert row["status"] == "measured", row
        assert (row["dim"], row["heads"], row["k"], row["pixels"], row["dtype"]) == (32, 1, 4, 32, "float32")
        low, high = row["quartiles"]
        assert 0 < low <= row["seconds"] <= high
        assert row["noisy"], "one round says nothing about noise"
        assert not row["launch_bound"]
        assert row["host_seconds"] is None
        assert row["floor_seconds"] > 0
        assert (row["peak_bytes"] is not None) == (scope == "module" and mode != "backward")
        if name.startswith(("kit", "window")):
            assert row["product_share"] > 0
            assert row["copy_share"] > 0
        assert row["time over window no bias"] > 0
    assert found["operator", "forward", "window no bias"]["backend"] == "FLASH_ATTENTION"
    # A bias that is trained takes the path that holds all logits.
    assert found["operator", "forward", "window sdpa"]["backend"] == "FLASH_ATTENTION"
    assert found["operator", "backward", "window sdpa"]["backend"] == "MATH"
    assert found["operator", "forward", "kit"]["backend"] is None
    again = run("--markdown", "--json", "attention-cpu.json")
    assert again in printed
    assert [line.split(" | ")[3] for line in again.splitlines() if line.startswith("| 32 | 4 | 32 |")] == [
        "forward", "forward + backward", "backward"
    ]  # fmt: skip
    assert_family(found, again)


def assert_family(found: dict[tuple[str, str, str], dict[str, Any]], printed: str) -> None:
    """The attentions of the suite `family` have rows with their number of keys, and lines in a table of their own."""
    assert {name for (_, _, name), row in found.items() if "keys" in row} == FAMILY
    keys = {name: found["module", "training", name]["keys"] for name in FAMILY}
    assert keys.pop("channel") is None
    assert all(240 <= number <= 272 for number in keys.values()), keys
    lines = re.findall(r"^\| (\w+) \| (?:\d+|none) \| 32 \| 4 \| 32 \| forward \|", printed, re.MULTILINE)
    assert sorted(lines) == sorted(FAMILY)


@pytest.mark.parametrize("wanted", [256, 512, 1024])
@pytest.mark.parametrize("pixels", [64, 512])
def test_the_family_is_measured_near_the_keys_of_the_window(benchmark: ModuleType, wanted: int, pixels: int) -> None:
    family = sys.modules["attention_family"]
    assert set(family.NAMES) == FAMILY
    found = {name: family.build(name, 32, 1, wanted, pixels)[1] for name in family.NAMES}
    assert found.pop("channel") is None
    assert all(abs(keys / wanted - 1) < 0.16 for keys in found.values()), found


def test_the_registered_and_the_fused_windows_are_one_function(operators: ModuleType) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 512, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 256, 256, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(q)
    forms = (operators.fused_windows, operators.registered_windows, operators.indexed_windows)
    outs = [form(q, k, v, bias) for form in forms]
    gradients = [torch.autograd.grad(out, (q, k, v, bias), upstream) for out in outs]
    for out, gradient in zip(outs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(out, outs[0])
        torch.testing.assert_close(gradient, gradients[0])


def test_an_operator_that_fails_leaves_a_row_that_says_why_and_the_others_go_on(
    benchmark: ModuleType, operators: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(*tables: object) -> None:
        raise RuntimeError("out of resource: shared memory, Required: 263168\nand more lines")

    calls = 0
    real = operators.kit.Attention.forward

    def late(self: object, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # the first passes prepare it, the fourth is a timed one
            raise ArithmeticError("lost on the way")
        return real(self, x)

    monkeypatch.setattr(operators, "registered_windows", refuse)
    monkeypatch.setattr(operators.kit.Attention, "forward", late)
    path = tmp_path / "found.json"
    assert call(benchmark, monkeypatch, *SMALL, "--dtypes", "bfloat16", "--json", str(path)) == 3
    rows = json.loads(path.read_text())["rows"]
    failed = {(row["scope"], row["mode"], row["operator"]): row["reason"] for row in rows if row["status"] == "failed"}
    shared = "RuntimeError: out of resource: shared memory, Required: 263168"
    windows = {("module", mode, "window"): shared for mode in ("forward", "training", "backward")}
    windows |= {("operator", mode, "window"): shared for mode in ("forward", "backward")}
    assert failed == windows | {("module", "forward", "kit"): "ArithmeticError: lost on the way"}
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    timed = [row for row in rows if row["status"] == "measured"]
    assert len(timed) == len(rows) - len(failed)
    assert not any("time over window" in row for row in timed)
    assert all("time over window sdpa" in row for row in timed if row["scope"] == "module")
    said = capsys.readouterr()
    assert f"- C 32 k 4 32 px bfloat16 operator forward window failed: {shared}" in said.out
    assert said.err.count("failed: ") == len(failed)


def test_after_an_error_that_the_device_does_not_survive_nothing_more_is_measured(
    benchmark: ModuleType, rows: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def gone(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(rows.Lost, match="kit: RuntimeError: illegal"):
        rows.why("kit", RuntimeError("illegal"), torch.device("cuda"))
    done = []

    def lost(case: object, *others: object) -> None:
        done.append(case)
        raise rows.Lost("kit: illegal")

    monkeypatch.setattr(benchmark, "measure_case", lost)
    path = tmp_path / "found.json"
    assert call(benchmark, monkeypatch, "--sizes", "32", "--rounds", "1", "--json", str(path)) == 3
    assert len(done) == 1
    assert "kit: illegal" in json.loads(path.read_text())["lost"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--dtypes", "tf32"), "mode of CUDA's tensor cores"),
        (("--dtypes", "float16"), "float32, tf32, bfloat16"),
        (("--dims", "48"), "multiples of 32"),
        (("--k", "6"), "multiples of 4"),
        (("--sizes", "40"), "multiples of 16"),
        (("--sizes", "48", "--k", "8"), "in groups of 2"),
        (("--rounds", "0"), "1 or more"),
        (("--json", "a.json", "b.json"), "one --json"),
        (("--markdown", "--json", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    assert call(benchmark, monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


def made_up(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """A file as a GPU would leave it, of bare operators; `change` is applied to each row."""
    rows = []
    for scope, mode, operator in (
        (scope, mode, operator)
        for scope in ("operator", "cutting")
        for mode in ("forward", "backward")
        for operator in ("kit", "window no bias")
    ):
        row = {
            "dim": 32, "k": 4, "pixels": 1024, "dtype": "bfloat16", "heads": 1, "scope": scope, "mode": mode,
            "operator": operator, "backend": None if operator == "kit" else "FLASH_ATTENTION", "status": "measured",
            "seconds": 1e-3, "quartiles": [1e-3, 1e-3], "noisy": False, "rounds": 9, "dropped": 0,
            "launch_bound": False, "host_seconds": 2e-5, "peak_bytes": None, "peak_maps": None, "floor_seconds": 5e-4,
            "product_share": 0.5, "copy_share": 0.25,
            "time over window no bias": {"forward": 1.25, "backward": 2.5}[mode] if operator == "kit" else 1.0,
        }  # fmt: skip
        change(row)
        rows.append(row)
    return {
        "machine": {
            "date": "2026-01-01", "device": "cuda", "processor": "A GPU", "threads": 1, "torch": "2.11",
            "driver": "580", "triton": "3.6",
        },
        "product_macs_per_second": {"bfloat16": 4e14}, "copy_bytes_per_second": 3e12,
        "gpu_states": [{
            "dim": 32, "k": 4, "pixels": 1024, "dtype": "bfloat16", "clocks.sm": 1980.0, "clocks.max.sm": 1980.0,
            "power.draw": None, "power.limit": 700.0, "temperature.gpu": 50.0,
        }],
        "rows": rows, "exponents": [], "lost": None,
    }  # fmt: skip


@pytest.fixture
def printed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """What --markdown prints of made-up files."""

    def run(*files: dict[str, Any], code: int = 0) -> str:
        paths = [tmp_path / f"{number}.json" for number in range(len(files))]
        for path, file in zip(paths, files, strict=True):
            path.write_text(json.dumps(file))
        assert call(benchmark, monkeypatch, "--markdown", "--json", *map(str, paths)) == code
        said = capsys.readouterr()
        return said.out + said.err

    return run


def test_the_aims_of_a_gpu_are_judged_by_the_stored_rows(printed: Callable[..., str]) -> None:
    def cut_slower(row: dict[str, Any]) -> None:
        if (row["scope"], row["mode"], row["operator"]) == ("cutting", "forward", "kit"):
            row["time over window no bias"] = 1.5
            row["launch_bound"] = True
        if (row["scope"], row["mode"], row["operator"]) == ("cutting", "backward", "window no bias"):
            row["noisy"] = True

    lines = printed(made_up(cut_slower)).splitlines()
    assert "- C 32, k 4, 1024 px, forward, without cutting: 80%, reached" in lines
    assert "- C 32, k 4, 1024 px, backward, without cutting: 40%, not reached" in lines
    assert "- C 32, k 4, 1024 px, forward, with cutting: 67%, undecided, a figure is launch-bound" in lines
    assert "- C 32, k 4, 1024 px, backward, with cutting: 40%, undecided, a figure is noisy" in lines
    assert "Of 8 figures 1 are noisy (~) and 1 launch-bound (L)." in lines
    [row] = [line for line in lines if line.startswith("| bfloat16 | 32 | 4 | 1024 | forward |")]
    assert "| 80% | 67% |" in row
    assert row.endswith("| 50% | 25% | 0.020 |")
    assert any("1980 of 1980 MHz, unknown of 700 W, 50 degrees" in line for line in lines)


def test_against_another_kernel_than_flash_no_aim_is_called_reached(printed: Callable[..., str]) -> None:
    def slower_kernel(row: dict[str, Any]) -> None:
        row["backend"] = row["backend"] and "EFFICIENT_ATTENTION"

    text = printed(made_up(slower_kernel))
    assert text.count("not measured against the flash kernel") == 4
    assert ", reached" not in text


def test_what_failed_and_was_not_run_is_listed(printed: Callable[..., str]) -> None:
    def fail(row: dict[str, Any]) -> None:
        if row["operator"] == "kit":
            row |= {"status": "failed", "reason": "out of resource"}
            del row["time over window no bias"]
        if row["mode"] == "backward":
            row |= {"status": "not run", "reason": "no room"}

    text = printed(made_up(fail) | {"lost": "kit: illegal"})
    assert "- C 32 k 4 1024 px bfloat16 operator forward kit failed: out of resource" in text
    assert text.count("not run: no room") == 4
    assert "The device was lost, and nothing measured after it: kit: illegal." in text
    assert "not reached" not in text


def test_parts_of_one_machine_are_printed_together_and_of_two_machines_refused(printed: Callable[..., str]) -> None:
    one = made_up(lambda row: None)
    two = copy.deepcopy(one)
    for row in two["rows"]:
        row["dim"] = 64
    text = printed(one, two)
    assert text.count("| bfloat16 | 32 | 4 | 1024 |") == text.count("| bfloat16 | 64 | 4 | 1024 |") == 2
    two["machine"]["processor"] = "Another GPU"
    assert "several machines" in printed(one, two, code=2)
