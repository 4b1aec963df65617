"""Time and peak memory of the attention operators, against window attention with as many keys a query, and against the
floor.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/attention.py   # measures: attention.json, attention.png
    python benchmarks/attention.py --device cuda --json gpu.json   # the same on a GPU
    python benchmarks/attention.py --markdown                # prints the table of the stored JSON

One image of 64 to 1024 px, C = 32 (1 head) and 64 (2 heads), float32, 8 x 8 patches, k = 4 and 8; whole modules, with
projections and retrieval; forward without gradients, and forward with backward for the input and all parameters.  All
operators of a case are timed in shuffled, interleaved rounds; ratios are medians of the rounds' ratios.

    kit             k-NN patch attention with LSH retrieval (kitbench/attention/kit.py)
    reference       the same through the readable definition (kitbench/attention/reference.py)
    window          window attention with 64 k keys a query and a learned bias, through the same registered operator
    window sdpa     the same through scaled_dot_product_attention, which holds all logits while it trains the bias
    window no bias  the same without a bias: the fused kernel forward and backward, the fastest there is
    global sdpa     every position attends every position, through the fused kernel
    retrieval       the search of kit alone

The floor of kit is its closed form over the measured rate of matrix products, and 10 maps of traffic forward (28 with
backward) over the measured rate of copies.  Backward counts twice the projections and 2.5 times the attention.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
import torch.nn.functional as F
from kitbench.baselines import global_
from torch import Tensor, nn

from kitbench.attention import kit, layout, reference
from kitbench.attention.operator import patch_attention
from kitbench.cost import memory, timing
from kitbench.system.environment import choose_device, device_name

HERE = Path(__file__).parent
ROUNDS = {64: 7, 128: 5, 256: 5, 512: 5, 1024: 3}
SECONDS = 40  # at most, for the rounds of one case and pass
CASES = [(dim, k) for dim in (32, 64) for k in (4, 8)]
REFERENCE_UP_TO = 512
GLOBAL_UP_TO = 128
Row = dict[str, Any]


class Window(nn.Module):
    """Windows of 16 x 16, or two side by side for 512 keys: baselines/window.py without shift or padding."""

    def __init__(self, dim: int, heads: int, keys: int, form: str) -> None:
        super().__init__()
        self.heads, self.keys, self.form = heads, keys, form
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        index = layout.relative_index(16)
        if keys == 512:
            span = int(index.max()) + 1  # the left window and the right one see each other through tables of their own
            index = torch.cat([torch.cat([index, index + span], 1), torch.cat([index + 2 * span, index], 1)])
        self.bias = layout.PositionBias(index, int(index.max()) + 1, heads) if form != "no bias" else None

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        windows = layout.cut(x, 16).reshape(-1, self.keys, channels)
        q, k, v = (table.unflatten(-1, (self.heads, -1)) for table in layout.project(self.qkv, windows))
        if self.form == "registered" and self.bias is not None:
            out = patch_attention(q, k, v, None, self.bias())
        else:
            mask = None if self.bias is None else self.bias()[None]
            q, k, v = (table.transpose(1, 2) for table in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return self.proj(layout.join(out.reshape(1, -1, 256, channels), 16, height, width))


class ReadableKit(kit.Attention):
    """KiT through the readable reference."""

    def forward(self, x: Tensor) -> Tensor:
        with mock.patch.object(kit, "patch_attention", reference.patch_attention):
            return super().forward(x)


def operators(dim: int, k: int, pixels: int) -> dict[str, nn.Module]:
    heads, keys = dim // 32, 64 * k
    built: dict[str, nn.Module] = {"kit": kit.Attention(dim, heads, k=k)}
    for name, form in (("window", "registered"), ("window sdpa", "sdpa"), ("window no bias", "no bias")):
        built[name] = Window(dim, heads, keys, form)
    if pixels <= REFERENCE_UP_TO:
        built["reference"] = ReadableKit(dim, heads, k=k)
    if pixels <= GLOBAL_UP_TO:
        built["global sdpa"] = global_.Attention(dim, heads)
    return built


def forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return module(x)

    return call


def training(module: nn.Module, x: Tensor) -> Callable[[], object]:
    leaf, upstream = x.clone().requires_grad_(), torch.randn_like(x)
    inputs = [leaf, *module.parameters()]
    return lambda: torch.autograd.grad(module(leaf), inputs, upstream)


def search(module: nn.Module, x: Tensor) -> Callable[[], object]:
    assert isinstance(module, kit.Attention)
    patches = layout.cut(x, module.patch)
    return lambda: module.neighbours(patches, None)


def rates(device: torch.device) -> tuple[float, float]:
    """Multiply-adds a second of a product of 2048^2 matrices; bytes a second that a copy of 256 MiB moves."""
    a, b, c = torch.randn(3, 2048, 2048, device=device)
    source = torch.randn(1 << 26, device=device)
    target = torch.empty_like(source)
    product = timing.sampler(lambda: torch.mm(a, b, out=c), device)
    copy = timing.sampler(lambda: target.copy_(source), device)
    found = timing.compare({"product": product, "copy": copy}, rounds=9)
    return 2048**3 / found["product"].median, 2 * source.nbytes / found["copy"].median


def floors(dim: int, k: int, pixels: int, product_rate: float, copy_rate: float) -> dict[str, float]:
    area, image = pixels**2, 4 * pixels**2 * dim
    module = kit.Attention(dim, dim // 32, k=k)
    total = module.macs(pixels, pixels)
    attention = 2 * area * 64 * min(k, area // 64) * dim
    backward = 2 * 4 * area * dim**2 + attention * 5 // 2
    return {
        "forward": total / product_rate + 10 * image / copy_rate,
        "training": (total + backward) / product_rate + 28 * image / copy_rate,
    }


def measure_case(
    dim: int, k: int, pixels: int, rounds: int, device: torch.device, product_rate: float, copy_rate: float
) -> list[Row]:
    torch.manual_seed(0)
    coarse = torch.randn(1, dim, pixels // 8, pixels // 8)
    x = (F.interpolate(coarse, (pixels, pixels), mode="bilinear") + 0.3 * torch.randn(1, dim, pixels, pixels)).permute(
        0, 2, 3, 1
    )
    x = F.layer_norm(x, (dim,)).contiguous().to(device)
    built = {name: module.to(device) for name, module in operators(dim, k, pixels).items()}
    floor = floors(dim, k, pixels, product_rate, copy_rate)
    rows = []
    for mode, make in (("forward", forward), ("training", training)):
        calls = {name: make(module, x) for name, module in built.items()}
        if mode == "forward":
            calls["retrieval"] = search(built["kit"], x)
        for call in calls.values():
            call()
        peaks = {name: memory.peak_bytes(call, device) for name, call in calls.items()}
        times = timing.compare({name: timing.sampler(call, device) for name, call in calls.items()}, rounds, SECONDS)
        for name, timed in times.items():
            row = {
                "dim": dim,
                "heads": dim // 32,
                "k": k,
                "pixels": pixels,
                "mode": mode,
                "operator": name,
                "seconds": timed.median,
                "quartiles": timed.quartiles,
                "rounds": len(timed.samples),
                "dropped": timed.dropped,
                "peak_bytes": peaks[name],
                "peak_maps": peaks[name] / (4 * pixels**2 * dim),
                "floor_seconds": floor[mode],
            }
            for other in ("window", "window sdpa", "window no bias"):
                row[f"time over {other}"] = timing.ratio(timed, times[other])
                row[f"memory over {other}"] = peaks[name] / peaks[other]
            rows.append(row)
            print(f"C {dim} k {k} {pixels:5d} px {mode:9s}{name:16s}{timed.median * 1e3:9.1f} ms "
                  f"[{timed.quartiles[0] * 1e3:.1f}, {timed.quartiles[1] * 1e3:.1f}]  {row['peak_maps']:7.1f} maps  "
                  f"{row['time over window']:.2f} x window  {row['time over window no bias']:.2f} x window no bias",
                  flush=True)  # fmt: skip
    return rows


def exponent(rows: list[Row], key: str, dim: int, k: int, mode: str) -> float:
    """Slope of log(value) over log(number of pixels) of kit, by least squares over 256, 512 and 1024 px."""
    points = [
        (2 * math.log(row["pixels"]), math.log(row[key]))
        for row in rows
        if (row["operator"], row["dim"], row["k"], row["mode"]) == ("kit", dim, k, mode) and row["pixels"] >= 256
    ]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def machine(device: torch.device) -> dict[str, Any]:
    model = device_name(device) if device.type == "cuda" else platform.processor()
    info = Path("/proc/cpuinfo")
    if device.type == "cpu" and info.exists():
        model = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model
        )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "spin_count": os.environ.get("GOMP_SPINCOUNT", "default"),
    }


def measure(device: torch.device, rounds: dict[int, int]) -> dict[str, Any]:
    product_rate, copy_rate = rates(device)
    print(f"products {product_rate / 1e9:.1f} GMAC/s, copies {copy_rate / 1e9:.1f} GB/s", flush=True)
    rows = [
        row
        for case in CASES
        for pixels, wanted in rounds.items()
        for row in measure_case(*case, pixels, wanted, device, product_rate, copy_rate)
    ]
    exponents = [
        {"dim": dim, "k": k, "mode": mode, "time": exponent(rows, "seconds", dim, k, mode),
         "memory": exponent(rows, "peak_bytes", dim, k, mode)}
        for dim in (32, 64) for k in (4, 8) for mode in ("forward", "training")
        if sum(side >= 256 for side in rounds) > 1
    ]  # fmt: skip
    return {
        "machine": machine(device),
        "product_macs_per_second": product_rate,
        "copy_bytes_per_second": copy_rate,
        "rows": rows,
        "exponents": exponents,
    }


def markdown(stored: dict[str, Any]) -> str:
    """The table of kit: time and memory against window attention, the reference and the floor."""
    found = {(r["dim"], r["k"], r["pixels"], r["mode"], r["operator"]): r for r in stored["rows"]}
    where = stored["machine"]
    lines = [
        f"KiT against window attention with as many keys a query. {where['processor']}, {where['threads']} threads, "
        f"torch {where['torch']}, {where['date']}. Time is the median [quartiles]; a map is H W C float32.",
        "",
        "| C | k | px | pass | ms | x window | x window, no bias | x reference | x floor | retrieval | peak, maps "
        "| memory x window | memory x window, no bias | memory x reference |",
        "|---" * 14 + "|",
    ]
    for (dim, k, pixels, mode, name), row in found.items():
        if name != "kit":
            continue
        low, high = (1e3 * value for value in row["quartiles"])
        slow = found.get((dim, k, pixels, mode, "reference"))
        searched = found.get((dim, k, pixels, mode, "retrieval"))
        cells = [
            str(dim), str(k), str(pixels), "forward" if mode == "forward" else "forward + backward",
            f"{1e3 * row['seconds']:.1f} [{low:.1f}, {high:.1f}]",
            f"{row['time over window']:.2f}", f"{row['time over window no bias']:.2f}",
            f"{row['seconds'] / slow['seconds']:.2f}" if slow else "not run",
            f"{row['seconds'] / row['floor_seconds']:.2f}",
            f"{searched['seconds'] / row['seconds']:.0%}" if searched else "",
            f"{row['peak_maps']:.1f}",
            f"{row['memory over window']:.2f}", f"{row['memory over window no bias']:.2f}",
            f"{row['peak_bytes'] / slow['peak_bytes']:.2f}" if slow else "not run",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Growth of KiT from 256 to 1024 px, exponent in the number of pixels:", ""]
    lines += ["| C | k | pass | time | memory |", "|---" * 5 + "|"]
    lines += [
        f"| {e['dim']} | {e['k']} | {e['mode']} | {e['time']:.2f} | {e['memory']:.2f} |" for e in stored["exponents"]
    ]
    return "\n".join([*lines, "", aims(found)])


def aims(found: dict[tuple[int, int, int, str, str], Row]) -> str:
    """What was aimed at, for one map, and what is reached."""
    at = (32, 4, 512)
    if (*at, "training", "kit") not in found:
        return "The map that the aims speak of, 512 px, was not measured."
    kit, forward = found[(*at, "training", "kit")], found[(*at, "forward", "kit")]
    searched, slow = found[(*at, "forward", "retrieval")], found[(*at, "training", "reference")]
    return (
        f"Aimed at, for C 32, k 4, 512 px, forward + backward with retrieval: at most 1.3 times the time of window "
        f"attention "
        f"(reached: {kit['time over window']:.2f} of kitbench's own operator with a learned bias, "
        f"{kit['time over window sdpa']:.2f} of scaled_dot_product_attention with one), at most 1.3 times its memory "
        f"({kit['memory over window']:.2f}), a third of the readable reference's memory "
        f"({kit['peak_bytes'] / slow['peak_bytes']:.2f}), and retrieval at most 15 % of the forward pass "
        f"({searched['seconds'] / forward['seconds']:.0%})."
    )


def picture(stored: dict[str, Any], path: Path) -> None:
    """Training time and peak memory of every operator against resolution, C = 32, k = 4."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    rows = [r for r in stored["rows"] if (r["dim"], r["k"], r["mode"]) == (32, 4, "training")]
    for name in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == name]
        sides = [row["pixels"] for row in mine]
        axes[0].plot(sides, [1e3 * row["seconds"] for row in mine], marker="o", label=name)
        axes[1].plot(sides, [row["peak_bytes"] / 2**20 for row in mine], marker="o", label=name)
    for axis, label in zip(axes, ("forward + backward, ms", "peak memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="side of the map, px", ylabel=label)
        axis.set_xticks(list(ROUNDS), [str(side) for side in ROUNDS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("C = 32, k = 4: 256 keys a query")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the stored JSON and measure nothing"
    )
    parser.add_argument("--json", type=Path, default=HERE / "attention.json", help="where the figures are kept")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", default=",".join(map(str, ROUNDS)), help="sides of the map, pixels")
    parser.add_argument("--rounds", type=int, help="timed rounds a case; by default as many as the size allows")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())))
        return
    sizes = [int(side) for side in options.sizes.split(",")]
    stored = measure(choose_device(options.device), {side: options.rounds or ROUNDS.get(side, 3) for side in sizes})
    options.json.write_text(json.dumps(stored, indent=1) + "\n")
    picture(stored, options.json.with_suffix(".png"))
    print(markdown(stored))


if __name__ == "__main__":
    main()
