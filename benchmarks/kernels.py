"""What the Triton kernels take of a GPU that is not here: shared memory, registers, spills, from the compiled code.

    python benchmarks/kernels.py                # compiles what is not stored yet into kernels.json; all takes minutes
    python benchmarks/kernels.py --heaviest     # compiles, of each kernel, what took most, and nothing else
    python benchmarks/kernels.py --markdown     # prints the table of the stored JSON
    python benchmarks/kernels.py --list         # writes which variants there are, and compiles none

Needs triton, and no GPU. The variants are what the shipped suites, the sweep and the operator benchmark launch,
found by building their attentions and recording their launches, and the widths up to 128 that an author may choose.
A launch needs its shared memory within the limit of the GPU (163 KiB on sm_80, 227 KiB on sm_90) and at most 255
registers a thread; what does not fit the registers spills to memory, which is slow.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from triton.backends.compiler import GPUTarget

from kitbench.attention import operator, triton_kernels, triton_launch
from kitbench.model import methods
from kitbench.spec import loading, shipped

HERE = Path(__file__).parent
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a program may have: CUDA C++ programming guide, table of limits
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PATCHES = 16  # of the tables that variants are compiled for; no kernel depends on it
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """What decides which variant of the kernels a call launches, apart from the numbers' kind."""

    queries: int
    keys: int
    width: int
    neighbours: int
    """0: each patch itself."""
    labels: bool
    ordered: bool


@dataclass(frozen=True)
class Variant:
    """`kernels` as they are compiled for `shape` of tables of `kind` (float32, tf32 or bfloat16) on `sm`."""

    shape: Shape
    kind: str
    sm: int
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """Of one kernel: bytes of shared memory a program, registers a thread, bytes a thread spilled to memory."""

    kernel: str
    shape: Shape
    kind: str
    sm: int
    tile: str
    warps: int
    stages: int
    shared: int
    registers: int
    spilled: int
    tensor_cores: bool


class Device:
    """Stands in for the GPU that Triton compiles for."""

    def __init__(self, sm: int) -> None:
        self.target = GPUTarget("cuda", sm, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def record(call: Callable[[], object]) -> list[Shape]:
    """The shapes with which `call` launches kernels; none of them runs, and so its results mean nothing."""
    found: list[Shape] = []

    def forward(
        q: Tensor, k: Tensor, v: Tensor, neighbours: Tensor | None, bias: Tensor, query_label: Tensor | None,
        key_label: Tensor | None, order: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        count = 0 if neighbours is None else neighbours.shape[1]
        labels, ordered = query_label is not None, order is not None and neighbours is not None
        found.append(Shape(q.shape[1], k.shape[1], q.shape[3], count, labels, ordered))
        lse = torch.zeros(q.shape[0], 1, q.shape[2], q.shape[1])
        return torch.zeros(q.shape), lse

    def by_index(q: Tensor, weights: Tensor | None) -> bool:
        return weights is None and q.shape[3] <= operator.MAX_WIDTH

    launching = mock.patch.object(triton_launch, "forward", forward)
    with mock.patch.object(operator, "by_index", by_index), launching, torch.no_grad():
        call()
    return found


@cache
def shapes_of_suites() -> tuple[Shape, ...]:
    """What the methods of all shipped suites launch in all presets, on maps with padding and without."""
    found: dict[Shape, None] = {}
    for name in shipped.suite_names():
        for preset in loading.read_toml(name, "suites", Path())["presets"]:
            chosen = loading.load_suite(name, preset)
            width = chosen.backbone.head_dim
            for label, method in chosen.methods.items():
                loaded = methods.load_method(method.attention, label)
                if loaded.attention is None:
                    continue
                settings = loaded.resolve(method.settings)
                for shift in (False, True):
                    attention = loaded.build(width, 1, shift, **settings)
                    for side in (40, 33):
                        found |= dict.fromkeys(record(partial(attention, torch.randn(1, side, side, width))))
    return tuple(found)


def shapes_of_benchmarks() -> list[Shape]:
    """What the operator benchmark and the tests on a GPU (tests/attention/test_triton.py) launch beyond that."""
    windows = [Shape(256, 256, 32, count, False, False) for count in (0, 2)]
    kit = [Shape(64, 64, 32, k, False, ordered) for k in (4, 8) for ordered in (False, True)]
    wide = [
        shape
        for width in (16, 32, 64, 128)
        for shape in (
            Shape(64, 64, width, 4, False, True),
            Shape(256, 256, width, 4, False, True),
            Shape(64, 196, width, 0, True, False),
        )
    ]
    # Widths that are no power of two, numbers of queries and keys that fill no tile, one neighbour.
    odd = [
        Shape(9, 25, 5, 3, True, True),
        Shape(16, 100, 8, 2, True, False),
        Shape(4, 4, 32, 1, False, True),
        Shape(1, 3, 16, 3, False, False),
        Shape(100, 36, 24, 2, True, False),
        Shape(81, 81, 64, 0, True, False),
        Shape(7, 130, 48, 3, False, True),
        Shape(65, 65, 128, 2, False, False),
    ]
    return [*windows, *kit, *wide, *odd]


def variants(sms: tuple[int, ...] = (80, 90), kinds: tuple[str, ...] = tuple(DTYPES)) -> list[Variant]:
    """Everything that can be launched, each kernel with the same constants once.

    Suites with heads of fewer than 32 numbers are for CPUs and exact; they launch kernels in float32 only.
    """
    seen: set[tuple[object, ...]] = set()
    found = []
    for shape, suites in [*((s, True) for s in shapes_of_suites()), *((s, False) for s in shapes_of_benchmarks())]:
        for kind in kinds if shape.width >= 32 or not suites else {"float32"} & set(kinds):
            new = constants_of(shape, kind)
            kernels = tuple(name for name, constants in new.items() if (kind, name, constants) not in seen)
            seen.update((kind, name, new[name]) for name in kernels)
            found += [Variant(shape, kind, sm, kernels) for sm in sms if kernels]
    return found


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def call(shape: Shape, kind: str) -> None:
    """Launch forward and backward on small tables of this shape."""
    q = torch.zeros(PATCHES, shape.queries, 2, shape.width, dtype=DTYPES[kind])
    k = torch.zeros(PATCHES, shape.keys, 2, shape.width, dtype=DTYPES[kind])
    neighbours = torch.zeros(PATCHES, shape.neighbours, dtype=torch.long) if shape.neighbours else None
    labels = [torch.zeros(PATCHES, n, dtype=torch.bool) if shape.labels else None for n in (shape.queries, shape.keys)]
    order = torch.arange(PATCHES) if shape.ordered else None
    bias = torch.zeros(2, shape.queries, shape.keys)
    with tf32(kind == "tf32"):
        out, lse = triton_launch.forward(q, k, k, neighbours, bias, labels[0], labels[1], order)
        triton_launch.backward(q, q, k, k, out, lse, neighbours, bias, labels[0], labels[1], order)


def constants_of(shape: Shape, kind: str) -> dict[str, tuple[tuple[str, object], ...]]:
    """By kernel, what it is compiled for."""
    found: dict[str, tuple[tuple[str, object], ...]] = {}

    def note(kernel: Any, *_: object, **constants: object) -> None:
        found[kernel.__name__] = tuple(sorted(constants.items()))

    with mock.patch.object(triton_launch, "launch", note):
        call(shape, kind)
    return found


def compiled(variant: Variant) -> list[Compiled]:
    """Compile the kernels of a variant, and read what they take."""
    triton.runtime.driver.set_active(Device(variant.sm))
    found: list[Compiled] = []

    def build(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if kernel.__name__ not in variant.kernels:
            return
        binary = kernel.warmup(*arguments, grid=grid, **constants)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [str(CUOBJDUMP), "-res-usage", "-sass", file.name]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = re.search(r"REG:(\d+) STACK:(\d+)", printed)
        assert usage is not None, printed[:1000]
        spilled = int(usage[2]) if re.search(r"\bSTL\b", printed) else 0  # a frame alone is no spill
        found.append(
            Compiled(
                kernel.__name__.strip("_").removesuffix("_kernel"), variant.shape, variant.kind, variant.sm,
                f"{constants['BT']} x {constants['BS']}" if "BT" in constants else "", constants.get("num_warps", 4),
                constants.get("num_stages", 3), binary.metadata.shared, int(usage[1]), spilled,
                "mma" in binary.asm["ptx"],
            )
        )  # fmt: skip

    with mock.patch.object(triton_launch, "launch", build):
        call(variant.shape, variant.kind)
    return found


def source_sha256() -> str:
    """Digest of the kernels' source without comments and docstrings."""
    digest = hashlib.sha256()
    for module in (triton_kernels, triton_launch):
        tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                said = [
                    child
                    for child in node.body
                    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                ]
                node.body = [child for child in node.body if child not in said] or [ast.Pass()]
        digest.update(ast.unparse(tree).encode())  # unlike a dump of the tree the same in every Python
    return digest.hexdigest()


def heaviest(rows: list[dict[str, Any]]) -> list[Variant]:
    """Of each kernel, GPU and kind of numbers, the variant that took most of the registers and of the shared memory."""
    most: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in rows:
        group = row["kernel"], row["sm"], row["kind"]
        most[group] = max(row, most.get(group, row), key=lambda r: (r["spilled"], r["registers"], r["shared"]))
    return [Variant(Shape(**r["shape"]), r["kind"], r["sm"], (f"_{r['kernel']}_kernel",)) for r in most.values()]


def missing(todo: list[Variant], rows: list[dict[str, Any]]) -> list[Variant]:
    """What of `todo` is not among the rows."""
    stored = {(Shape(**row["shape"]), row["kind"], row["sm"], f"_{row['kernel']}_kernel") for row in rows}
    left = (
        replace(one, kernels=tuple(k for k in one.kernels if (one.shape, one.kind, one.sm, k) not in stored))
        for one in todo
    )
    return [one for one in left if one.kernels]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The most that each kernel takes over the variants of a width, and how many variants there are."""
    groups: dict[tuple[str, str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["kind"], row["shape"]["width"], row["sm"]), []).append(row)
    lines = [
        (kernel, kind, width, f"sm_{sm}", len(some), ", ".join(sorted({r["tile"] for r in some})),
         ", ".join(sorted({str(r["warps"]) for r in some})), f"{max(r['shared'] for r in some) / 1024:.1f}",
         max(r["registers"] for r in some), max(r["spilled"] for r in some))
        for (kernel, kind, width, sm), some in sorted(groups.items())
    ]  # fmt: skip
    head = ("kernel", "numbers", "width", "GPU", "variants", "tiles", "warps", "shared memory, KiB", "registers",
            "spilled, bytes")  # fmt: skip
    return tabulate(lines, head, "github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print the table of the stored JSON, compile nothing")
    parser.add_argument("--list", action="store_true", help="write which variants there are, and compile none")
    parser.add_argument("--sm", default="80,90", help="compute capabilities to compile for, without the point")
    parser.add_argument("--kinds", default=",".join(DTYPES), help="kinds of numbers: float32, tf32, bfloat16")
    parser.add_argument("--heaviest", action="store_true", help="compile of each kernel what took most, as stored")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile side by side")
    parser.add_argument("--json", type=Path, default=HERE / "kernels.json", help="where the figures are kept")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())["rows"]))
        return
    todo = variants(tuple(int(sm) for sm in options.sm.split(",")), tuple(options.kinds.split(",")))
    head = {"triton": triton.__version__, "torch": torch.__version__, "source": source_sha256()}
    if options.list:
        options.json.write_text(json.dumps(head | {"variants": [asdict(variant) for variant in todo]}, indent=1) + "\n")
        return
    stored = json.loads((HERE / "kernels.json").read_text())
    rows: list[dict[str, Any]] = []
    if options.heaviest:
        todo = heaviest(stored["rows"])
    elif {key: stored[key] for key in head} == head:
        wanted = {(one.shape, one.kind, one.sm, kernel) for one in todo for kernel in one.kernels}
        rows = [
            row
            for row in stored["rows"]
            if (Shape(**row["shape"]), row["kind"], row["sm"], f"_{row['kernel']}_kernel") in wanted
        ]
        todo = missing(todo, rows)
    # Spawned: a fork of a process whose threads have computed may hang.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        for done, found in enumerate(pool.map(compiled, todo), 1):
            rows += [asdict(row) for row in found]
            print(f"{done} of {len(todo)}: {todo[done - 1]}", flush=True)
    options.json.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
