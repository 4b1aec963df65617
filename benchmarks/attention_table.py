"""What benchmarks/attention.py prints and draws of its stored figures, and nothing else: tables, aims, picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kitbench.errors import InputError

Row = dict[str, Any]
PASSES = {"forward": "forward", "training": "forward + backward", "backward": "backward"}
AIMS = {"forward": 0.70, "backward": 0.50}  # of the rate of fused window attention, bfloat16 on CUDA


def line(row: Row) -> str:
    """A row as it is printed while it is measured."""
    where = "C {dim} k {k} {pixels:5d} px {dtype:9s}{scope:9s}{mode:9s}{operator:16s}".format(**row)
    if row["status"] != "measured":
        return f"{where}{row['status']}: {row['reason']}"
    low, high = (1e3 * value for value in row["quartiles"])
    maps = "" if row["peak_maps"] is None else f"  {row['peak_maps']:7.1f} maps"
    ratios = [f"{row[f'time over {name}']:.2f} x {name}" for name in ("window", "window no bias")
              if f"time over {name}" in row]  # fmt: skip
    return f"{where}{1e3 * row['seconds']:9.3f} ms [{low:.3f}, {high:.3f}]{marks(row)}{maps}  {'  '.join(ratios)}"


def marks(row: Row) -> str:
    return (" ~" if row["noisy"] else "") + (" L" if row.get("launch_bound") else "")


def measured(rows: list[Row], scope: str) -> list[Row]:
    return [row for row in rows if row["status"] == "measured" and row["scope"] == scope]


def exponent(rows: list[Row], key: str) -> float:
    """Slope of log(value) over log(number of pixels) of rows of one operator and several sizes, by least squares."""
    points = [(2 * math.log(row["pixels"]), math.log(row[key])) for row in rows]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope: float = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return slope


def exponents(rows: list[Row]) -> list[Row]:
    """Growth of kit's time and memory from 256 px on."""
    found = []
    large = [r for r in measured(rows, "module") if r["operator"] == "kit" and r["pixels"] >= 256 and r["peak_bytes"]]
    for dtype, dim, k, mode in dict.fromkeys((r["dtype"], r["dim"], r["k"], r["mode"]) for r in large):
        mine = [r for r in large if (r["dtype"], r["dim"], r["k"], r["mode"]) == (dtype, dim, k, mode)]
        if len(mine) > 1:
            found.append(
                {"dtype": dtype, "dim": dim, "k": k, "mode": mode, "time": exponent(mine, "seconds"),
                 "memory": exponent(mine, "peak_bytes")}
            )  # fmt: skip
    return found


def failures(stored: dict[str, Any]) -> list[str]:
    """What failed, a line each."""
    rows = [row for row in stored["rows"] if row["status"] == "failed"]
    return [line(row) for row in rows] + ([f"device lost at {stored['lost']}"] if stored.get("lost") else [])


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several files of one machine as one.  Raises InputError where they are of several machines."""
    whole = parts[0]
    for part in parts[1:]:
        for key in ("device", "processor", "threads", "torch", "driver"):
            a, b = (one["machine"].get(key) for one in (whole, part))
            if a != b:
                raise InputError(f"The files are of several machines: {key} is {a} in one and {b} in another.")
        whole = whole | {key: whole[key] + part[key] for key in ("rows", "exponents", "gpu_states")}
        whole["product_macs_per_second"] = part["product_macs_per_second"] | whole["product_macs_per_second"]
        whole["lost"] = whole["lost"] or part["lost"]
    return whole


def markdown(stored: dict[str, Any]) -> str:
    """The tables: kit against window attention, the reference and the floor; bare operators; what failed; the aims."""
    where = stored["machine"]
    threads = f"{where['threads']} threads, " if where["device"] == "cpu" else f"driver {where['driver']}, "
    lines = [
        f"KiT against window attention with as many keys per query. {where['processor']}, {threads}"
        f"torch {where['torch']}, {where['date']}. Time is the median [quartiles]; a map is H W C float32. "
        f"~: the quartiles lie more than 20 % of the median apart, or fewer than three rounds were left. "
        f"L: launch-bound, the time includes waiting for the host."
    ]
    timed = [row for row in stored["rows"] if row["status"] == "measured"]
    noisy, bound = (sum(bool(row.get(key)) for row in timed) for key in ("noisy", "launch_bound"))
    lines += ["", f"Of {len(timed)} figures {noisy} are noisy (~) and {bound} launch-bound (L)."]
    for state in stored["gpu_states"][:1]:
        lines += ["", f"While training at {state['pixels']} px in {state['dtype']}: {told(state)}."]
    for dtype in dict.fromkeys(row["dtype"] for row in measured(stored["rows"], "module")):
        rate = stored["product_macs_per_second"][dtype]
        reached = f"products {rate / 1e9:.1f} GMAC/s, copies {stored['copy_bytes_per_second'] / 1e9:.1f} GB/s"
        lines += ["", f"In {dtype}; {reached}:", "", *kit_table(stored["rows"], dtype)]
        lines += family_table(stored["rows"], dtype)
    lines += operator_table(stored["rows"])
    if stored["exponents"]:
        lines += ["", "Growth of KiT from 256 px on, exponent in the number of pixels:", ""]
        lines += ["| type | C | k | pass | time | memory |", "|---" * 6 + "|"]
        lines += [
            f"| {e['dtype']} | {e['dim']} | {e['k']} | {PASSES[e['mode']]} | {e['time']:.2f} | {e['memory']:.2f} |"
            for e in stored["exponents"]
        ]
    for status, title in (("failed", "Failed"), ("not run", "Not run")):
        rows = [row for row in stored["rows"] if row["status"] == status]
        lines += ["", f"{title}:", ""] * bool(rows) + [f"- {' '.join(line(row).split())}" for row in rows]
    if stored["lost"]:
        lines += ["", f"The device was lost, and nothing measured after it: {stored['lost']}."]
    return "\n".join([*lines, "", aims(stored)])


def told(state: Row) -> str:
    """The state of a device in words."""
    if "reason" in state:
        return f"clocks and power unknown ({state['reason']})"
    return (
        f"{number(state['clocks.sm'])} of {number(state['clocks.max.sm'])} MHz, {number(state['power.draw'])} of "
        f"{number(state['power.limit'])} W, {number(state['temperature.gpu'])} degrees Celsius"
    )


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f}"


def milliseconds(row: Row | None) -> str:
    if row is None or row["status"] != "measured":
        return "not run" if row is None else row["status"]
    low, high = (1e3 * value for value in row["quartiles"])
    digits = 1 if row["seconds"] > 2e-3 else 3
    return f"{1e3 * row['seconds']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{marks(row)}"


def over(row: Row, key: str) -> str:
    return f"{row[key]:.2f}" if key in row else "not run"


def kit_table(rows: list[Row], dtype: str) -> list[str]:
    """Of whole modules: time and memory of kit."""
    found = {(r["dim"], r["k"], r["pixels"], r["mode"], r["operator"]): r for r in measured(rows, "module")
             if r["dtype"] == dtype}  # fmt: skip
    lines = [
        "| C | k | px | pass | ms | x window | x window, no bias | x reference | x floor | retrieval | peak, maps "
        "| memory x window | memory x window, no bias | memory x reference |",
        "|---" * 14 + "|",
    ]
    for (dim, k, pixels, mode, name), row in found.items():
        if name != "kit":
            continue
        slow = found.get((dim, k, pixels, mode, "reference"))
        searched = found.get((dim, k, pixels, mode, "retrieval"))
        with_memory = row["peak_bytes"] is not None
        cells = [
            str(dim), str(k), str(pixels), PASSES[mode], milliseconds(row),
            over(row, "time over window"), over(row, "time over window no bias"),
            f"{row['seconds'] / slow['seconds']:.2f}" if slow else "not run",
            f"{row['seconds'] / row['floor_seconds']:.2f}",
            f"{searched['seconds'] / row['seconds']:.0%}" if searched else "",
            *((
                f"{row['peak_maps']:.1f}", over(row, "memory over window"), over(row, "memory over window no bias"),
                f"{row['peak_bytes'] / slow['peak_bytes']:.2f}" if slow else "not run",
            ) if with_memory else [""] * 4),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def family_table(rows: list[Row], dtype: str) -> list[str]:
    """Of whole modules: the attentions of the suite `family`, against window attention with as many keys."""
    lines = []
    for row in measured(rows, "module"):
        if row["dtype"] != dtype or "keys" not in row:
            continue
        with_memory = row["peak_bytes"] is not None
        cells = [
            row["operator"], "none" if row["keys"] is None else str(row["keys"]), str(row["dim"]), str(row["k"]),
            str(row["pixels"]), PASSES[row["mode"]], milliseconds(row), over(row, "time over window"),
            over(row, "time over window no bias"), f"{row['peak_maps']:.1f}" if with_memory else "",
            over(row, "memory over window") if with_memory else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return []
    return [
        "",
        "The attentions of the suite `family`, against window attention with 64 k keys per query. Keys: what a query "
        "of theirs is compared with, as near to that as their settings come.",
        "",
        "| attention | keys | C | k | px | pass | ms | x window | x window, no bias | peak, maps | memory x window |",
        "|---" * 11 + "|",
        *lines,
    ]


def operator_table(rows: list[Row]) -> list[str]:
    """Of bare operators: kit against fused window attention, with and without cutting, and what the device can do."""
    found = {(r["dtype"], r["dim"], r["k"], r["pixels"], r["mode"], r["scope"], r["operator"]): r for r in rows}
    lines = []
    for (dtype, dim, k, pixels, mode, scope, name), row in found.items():
        if (scope, name, row["status"]) != ("operator", "kit", "measured"):
            continue
        case = (dtype, dim, k, pixels, mode)
        fused = found[(*case, "operator", "window no bias")]
        cut = found.get((*case, "cutting", "kit"), {})
        cells = [
            dtype, str(dim), str(k), str(pixels), mode, milliseconds(row),
            f"{milliseconds(fused)} {(fused['backend'] or '').partition('_')[0].lower()}",
            rate_share(row), rate_share(cut), over(row, "time over window"), over(row, "time over window cudnn"),
            f"{row['product_share']:.0%}", f"{row['copy_share']:.0%}", host_milliseconds(row),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return []
    return [
        "",
        "The bare operator on ready tables, against window attention without a bias by torch's fused kernel. With "
        "cutting: one map cut into patches before it and one joined behind it, for both. Products and copies: "
        "multiply-adds and least traffic over what the machine was measured to reach. Host: time to queue one call.",
        "",
        "| type | C | k | px | pass | kit, ms | fused window, ms | of its rate | of its rate, with cutting | x window "
        "| x window, cuDNN | of products | of copies | host, ms |",
        "|---" * 14 + "|",
        *lines,
    ]


def rate_share(row: Row) -> str:
    """The rate of kit as a share of that of fused window attention."""
    return f"{1 / row['time over window no bias']:.0%}" if "time over window no bias" in row else "not run"


def host_milliseconds(row: Row) -> str:
    return "" if row["host_seconds"] is None else f"{1e3 * row['host_seconds']:.3f}"


def aims(stored: dict[str, Any]) -> str:
    """What was aimed at, and what is reached."""
    return cuda_aims(stored["rows"]) if stored["machine"]["device"] == "cuda" else cpu_aims(stored["rows"])


def cuda_aims(rows: list[Row]) -> str:
    """In bfloat16, at the largest map of each shape, against the flash kernel; a doubtful figure decides nothing."""
    found = {
        (r["dim"], r["k"], r["scope"], r["mode"], r["pixels"], r["operator"]): r
        for r in rows
        if r["dtype"] == "bfloat16" and r["scope"] != "module"
    }
    largest: dict[tuple[int, int, str, str], int] = {}
    for *shape, pixels, name in found:
        if name == "kit":
            largest[*shape] = max(pixels, largest.get((*shape,), 0))
    if not largest:
        return "The aims speak of bfloat16, which was not measured."
    lines = [
        "Aimed at in bfloat16, of the rate of torch's flash kernel as window attention with as many keys and no bias: "
        + " and ".join(f"{least:.0%} {mode}" for mode, least in AIMS.items())
        + ", at the largest map of each shape:",
        "",
    ]
    for (dim, k, scope, mode), pixels in largest.items():
        row, fused = (found.get((dim, k, scope, mode, pixels, name), {}) for name in ("kit", "window no bias"))
        what = f"C {dim}, k {k}, {pixels} px, {mode}, {'with' if scope == 'cutting' else 'without'} cutting"
        if "time over window no bias" not in row or fused.get("backend") != "FLASH_ATTENTION":
            lines.append(f"- {what}: not measured against the flash kernel")
            continue
        share = 1 / row["time over window no bias"]
        verdict = "reached" if share >= AIMS[mode] else "not reached"
        for flag, doubt in (("launch_bound", "launch-bound"), ("noisy", "noisy")):
            if row[flag] or fused[flag]:
                verdict = f"undecided, a figure is {doubt}"
        lines.append(f"- {what}: {share:.0%}, {verdict}")
    return "\n".join(lines)


def cpu_aims(rows: list[Row]) -> str:
    """For one map, in float32."""
    found = {
        (r["mode"], r["operator"]): r
        for r in measured(rows, "module")
        if (r["dtype"], r["dim"], r["k"], r["pixels"]) == ("float32", 32, 4, 512)
    }
    wanted = [("training", "kit"), ("forward", "kit"), ("forward", "retrieval"), ("training", "reference")]
    if not all(key in found for key in wanted):
        return "The map that the aims speak of, 512 px, was not measured."
    kit, forward, searched, slow = (found[key] for key in wanted)
    return (
        f"Targets for C 32, k 4, 512 px, forward + backward with retrieval, and what was reached: at most 1.3 times "
        f"the time of window attention ({over(kit, 'time over window')} times that of kitbench's own operator with a "
        f"learned bias, {over(kit, 'time over window sdpa')} times that of scaled_dot_product_attention with one); at "
        f"most 1.3 times its memory ({over(kit, 'memory over window')}); a third of the memory of the readable "
        f"definition ({kit['peak_bytes'] / slow['peak_bytes']:.2f}); retrieval at most 15 % of the forward pass "
        f"({searched['seconds'] / forward['seconds']:.0%})."
    )


def picture(stored: dict[str, Any], path: Path) -> None:
    """Training time and peak memory of every operator against resolution, of the first shape and type measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in measured(stored["rows"], "module") if row["mode"] == "training"]
    if not rows:
        return
    dim, k, dtype = (rows[0][key] for key in ("dim", "k", "dtype"))
    rows = [row for row in rows if (row["dim"], row["k"], row["dtype"]) == (dim, k, dtype)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == name]
        sides = [row["pixels"] for row in mine]
        axes[0].plot(sides, [1e3 * row["seconds"] for row in mine], marker="o", label=name)
        axes[1].plot(sides, [row["peak_bytes"] / 2**20 for row in mine], marker="o", label=name)
    ticks = sorted({row["pixels"] for row in rows})
    for axis, label in zip(axes, ("forward + backward, ms", "peak memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="side of the map, px", ylabel=label)
        axis.set_xticks(ticks, [str(side) for side in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"C = {dim}, k = {k}: {64 * k} keys per query, {dtype}")
    figure.savefig(path, dpi=120)
