"""Time and peak memory of the attention operators, against window attention with as many keys per query, and against
the floor.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/attention.py   # measures: attention.json, attention.png
    python benchmarks/attention.py --device cuda --dtypes bfloat16 --dims 32 --json a.json    # a part of it, on a GPU
    python benchmarks/attention.py --markdown                # prints the table of the stored JSON
    python benchmarks/attention.py --markdown --json a.json b.json     # of several parts from one machine

One image of 64 to 1024 px (bfloat16 on CUDA: 2048), C = 32 (1 head) and 64 (2 heads), 8 x 8 patches, k = 4 and 8.  All
operators of a case are timed in shuffled, interleaved rounds; ratios are medians of the rounds' ratios.

    kit             k-NN patch attention with LSH retrieval (kitbench/attention/kit.py)
    reference       the same through the readable definition (kitbench/attention/reference.py)
    window          window attention with 64 k keys per query and a learned bias, through the same registered operator
    window sdpa     the same through scaled_dot_product_attention, which on the CPU holds all logits while it trains the
                    bias
    window no bias  the same without a bias: torch's fused kernel forward and backward, the fastest there is
    window cudnn    the same by cuDNN's kernel, on CUDA where it takes the tables
    global sdpa     every position attends every position, through the fused kernel; it and the reference in float32
    channel, overlap, sparse (a sparse block), nlsn, centres, categories, graph: the attentions of the suite `family` up
                    to 512 px, forward and training, with about 64 k keys per query (attention_family.py)
    retrieval       the search of kit alone
    cut and join    a map cut into the patches of kit and joined again

What runs (scope):  module, the whole attention with projections, retrieval, cutting and joining; operator, the bare
operator on ready tables of queries, keys and values; cutting, the operator with one map to cut before it and one to
join behind it, as in the module.  Passes: forward without gradients; training, forward with backward for the input and
all parameters; backward alone, of a forward pass made before.  Which of torch's kernels runs is forced, so that no
other can, and stored as 'backend'.

Types: float32; tf32, the same with products of float32 on CUDA's tensor cores in TensorFloat-32; bfloat16, modules
under autocast with float32 weights and input, as the training loop runs them, bare operators on bfloat16 tables.

The floor is the closed form of kit over the measured rate of matrix products of the type, plus the least traffic over
the measured rate of copies: for the module 10 maps forward and 18 backward, for the operator 4 and 8, with cutting 4
more each.  Backward counts twice the projections and 2.5 times the attention.

An operator that fails gets a row that says why, and the others go on.  Exit codes: 0; 2, bad options; 3, an operator
failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from attention_operators import DTYPES, Case, precision
from attention_rows import Lost, measure_case, rates
from attention_table import exponents, failures, markdown, merged, picture

from kitbench.errors import InputError
from kitbench.system.environment import choose_device, device_name, environment

HERE = Path(__file__).parent
ROUNDS = {64: 7, 128: 5, 256: 5, 512: 5, 1024: 3}
CUDA_ROUNDS = 9


def machine(device: torch.device) -> dict[str, Any]:
    model = device_name(device) if device.type == "cuda" else platform.processor()
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.type,
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "spin_count": os.environ.get("GOMP_SPINCOUNT", "default"),
    }
    if device.type == "cuda":
        has, known = torch.cuda.get_device_properties(device), environment(device)
        found |= {
            "driver": known.driver,
            "commit": known.commit,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
            "multiprocessors": has.multi_processor_count,
            "memory_bytes": has.total_memory,
        }
    return found


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(device: torch.device, cases: list[Case], rounds: int | None, path: Path) -> dict[str, Any]:
    """Measure, keeping in `path` what there is after every case."""
    products, copies = rates(device, list(dict.fromkeys(case.dtype for case in cases)), rounds or 9)
    for dtype, rate in products.items():
        print(f"products in {dtype} {rate / 1e9:.1f} GMAC/s", flush=True)
    print(f"copies {copies / 1e9:.1f} GB/s", flush=True)
    stored: dict[str, Any] = {
        "machine": machine(device),
        "product_macs_per_second": products,
        "copy_bytes_per_second": copies,
        "gpu_states": [],
        "rows": [],
        "exponents": [],
        "lost": None,
    }
    for case in cases:
        wanted = rounds or (CUDA_ROUNDS if device.type == "cuda" else ROUNDS.get(case.pixels, 3))
        try:
            with precision(case.dtype):
                measure_case(case, wanted, device, products[case.dtype], copies, stored)
        except Lost as error:
            stored["lost"] = f"{asdict(case)}: {error}"
            print(f"the device was lost, and nothing more can be measured: {stored['lost']}", file=sys.stderr)
        stored["exponents"] = exponents(stored["rows"])
        path.write_text(json.dumps(stored, indent=1) + "\n")
        if stored["lost"]:
            break
    return stored


def numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def chosen_cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """The cases asked for.  Raises InputError for one that cannot be."""
    dtypes = options.dtypes or (list(DTYPES) if device.type == "cuda" else ["float32"])
    cases = []
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"--dtypes has {dtype}; give some of {', '.join(DTYPES)}.")
        if dtype == "tf32" and device.type != "cuda":
            raise InputError("--dtypes has tf32, which is a mode of CUDA's tensor cores; on the CPU give float32.")
        largest = [2048] if device.type == "cuda" and dtype == "bfloat16" else []
        sizes = options.sizes or [*ROUNDS, *largest]
        cases += [Case(dim, k, pixels, dtype) for dim in options.dims for k in options.k for pixels in sizes]
    for case in cases:
        if case.dim < 32 or case.dim % 32:
            raise InputError(f"--dims has {case.dim}; heads are 32 wide, so give multiples of 32.")
        if case.k < 4 or case.k % 4:
            raise InputError(f"--k has {case.k}; a window of 16 x 16 is as 4 neighbours, so give multiples of 4.")
        if case.pixels < 32 or case.pixels % 16 or (case.pixels // 16) ** 2 % (case.k // 4):
            raise InputError(
                f"--sizes has {case.pixels}; give multiples of 16 px, 32 px or more, that windows of 16 x 16 cover "
                f"in groups of {case.k // 4}."
            )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the stored JSON and measure nothing"
    )
    parser.add_argument(
        "--json", type=Path, nargs="+",
        help="where the figures are kept, and the picture beside it; by default attention.json beside this file for "
        "all cases of the CPU, attention-DEVICE.json in the current folder for others",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--dtypes", type=lambda text: text.split(","), help="of float32, tf32 and bfloat16; CPU: float32"
    )
    parser.add_argument("--dims", type=numbers, default=[32, 64], help="channels, 32 to a head")
    parser.add_argument("--k", type=numbers, default=[4, 8], help="neighbours")
    parser.add_argument("--sizes", type=numbers, help="sides of the map, pixels")
    parser.add_argument("--rounds", type=int, help="timed rounds a case, by default as many as the size allows; 1 is a "
                        "look at whether all of it runs, with samples of one call")  # fmt: skip
    options = parser.parse_args()
    try:
        if options.markdown:
            paths = options.json or [HERE / "attention.json"]
            stored = merged([json.loads(path.read_text()) for path in paths])
        else:
            device = choose_device(options.device)
            cases = chosen_cases(options, device)
    except (InputError, OSError, json.JSONDecodeError) as error:
        parser.error(str(error))
    if options.markdown:
        print(markdown(stored))
        return
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}; give 1 or more")
    if options.json and len(options.json) > 1:
        parser.error("several files are read by --markdown only; give one --json to write to")
    whole_cpu = device.type == "cpu" and not options.rounds and cases == chosen_cases(parser.parse_args([]), device)
    default = HERE / "attention.json" if whole_cpu else Path(f"attention-{device.type}.json")
    path = options.json[0] if options.json else default
    stored = measure(device, cases, options.rounds, path)
    picture(stored, path.with_suffix(".png"))
    print(f"\n{markdown(stored)}")
    failed = failures(stored)
    if failed:
        print("\n".join(["", "failed:", *failed]), file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
