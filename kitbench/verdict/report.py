"""`kitbench report`: one self-contained HTML file of stored runs, which works from disk, offline, and prints.

Verdict first, then tables, pictures, settings, environment, and how to reproduce each number. The page itself is
report.html (a Jinja template); everything in it is embedded.
"""

from __future__ import annotations

import base64
import json
import math
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from kitbench.store import Run, RunFolder
from kitbench.verdict import pictures, published
from kitbench.verdict.claims import Block, blocks, claims, compare_methods
from kitbench.verdict.compare import Column, Compared, adjusted, heading, pooled
from kitbench.verdict.table import (
    Entry,
    caption_of,
    entries,
    labels,
    named,
    notes_of,
    number,
    ranked,
    rows,
    slowed,
    split,
)

if TYPE_CHECKING:
    from kitbench.cost.scale import Sweep

CROP_BYTES = 5_000_000
"""Pictures of crops that a report holds at most; what is left out is told."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and what it is sorted by."""

    text: str
    key: float | str
    rank: int = 0
    """1 best, 2 second."""


@dataclass(frozen=True)
class Grid:
    """A sortable table."""

    caption: str
    header: list[str]
    lines: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A figure, embedded."""

    title: str
    source: str
    wide: bool = False


@dataclass(frozen=True)
class Panel:
    """One method's crop of an image."""

    method: str
    psnr: str
    run: str
    image: str
    error: str | None


@dataclass(frozen=True)
class Gallery:
    """The crops of one image under one condition."""

    title: str
    whole: str
    place: tuple[float, float, float, float]
    panels: list[Panel]


def report(runs: Sequence[RunFolder], sweeps: Sequence[Sweep], protocol: str | None = None) -> str:
    """The whole page. Raises InputError where the runs cannot stand in one table."""
    found = entries(runs, protocol)
    table = rows(runs, protocol)
    folders = {folder.run.key: folder for folder in runs}
    sections = [_section(block, run, table, found, folders) for block, run in split(table, found)]
    judged = claims(runs, sweeps, protocol)
    galleries, left_out = _galleries(found, folders)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("kitbench", "verdict"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    return template.render(
        title=", ".join(dict.fromkeys(entry.run.suite for entry in found)),
        protocol=found[0].evaluation.protocol,
        stamp=found[0].evaluation.stamp,
        sections=sections,
        claims=judged,
        galleries=galleries,
        left_out=left_out,
        error_full=pictures.ERROR_FULL,
        scaling=[_scaling(sweep) for sweep in sweeps],
        published=Grid(
            published.HEADING, published.HEADER, [[_cell(c) for c in line] for line in published.lines()],
            [published.CAUTION],
        ),
        settings=_settings(found),
        reproduce=_reproduce(found, folders),
        environments=_environments(found),
    ) + "\n"  # fmt: skip


def _section(
    block: pd.DataFrame, run: Run, table: pd.DataFrame, found: Sequence[Entry], folders: dict[str, RunFolder]
) -> dict[str, Any]:
    """Tables and figures of what may be compared."""
    mine = [e for e in found if e.run.comparison == run.comparison and e.run.mode == run.mode]
    trained = next(iter(blocks(mine)), None)
    compared = _against_best(trained) if trained else []
    return {
        "title": caption_of(run),
        "verdict": _verdict(block, trained, compared),
        "table": _table(block, caption_of(run)),
        "differences": _differences([c for c, _ in compared]),
        "ablation": _ablation(trained),
        "pictures": _pictures(block, trained, compared, folders),
    }


def _cell(text: str, key: float | str | None = None, rank: int = 0) -> Cell:
    return Cell(text, text if key is None else key, rank)


def _amount(value: Any, digits: int) -> Cell:
    return Cell(number(value, digits), -math.inf if value is None or pd.isna(value) else float(value))


def _table(block: pd.DataFrame, caption: str) -> Grid:
    columns: list[Column] = list(dict.fromkeys(zip(block["data_set"], block["condition"], strict=True)))
    metrics = [("psnr_db", "PSNR dB", 2, True), ("ssim", "SSIM", 4, True)]
    metrics += [("lpips", "LPIPS", 4, False)] if block["lpips"].notna().any() else []
    resolution = block["resolution"].dropna()
    at = f" at {resolution.iloc[0]:.0f} px" if len(resolution) else ""
    header = ["Method", *(f"{heading(column)} {m[1]}" for column in columns for m in metrics)]
    header += ["Parameters", f"GMACs{at}", "Peak memory of a step, MiB", "s a step", "Seeds", "Runs"]
    lines = []
    for method, own in block.groupby("method", sort=False):
        line = [_cell(named(str(method), own["form"].iloc[0]))]
        for column in columns:
            match = own[(own["data_set"] == column[0]) & (own["condition"] == column[1])]
            for metric, _, digits, higher in metrics:
                line.append(_score(block, match, column, metric, digits, higher))
        first = own.iloc[0]
        peak = first["train_peak_bytes"]
        macs, step = _amount(first["gmacs"], 2), _amount(None if slowed(first) else first["seconds_per_step"], 3)
        mark = "†" if isinstance(first["gmacs_note"], str) else ""
        line += [
            _amount(first["parameters"], 0),
            Cell(macs.text + mark, macs.key),
            _amount(None if pd.isna(peak) else peak / 2**20, 1),
            Cell(step.text + ("‡" if slowed(first) else ""), step.key),
            _cell(str(first["seeds"])),
            _cell(" ".join(dict.fromkeys(",".join(own["runs"]).split(",")))),
        ]
        lines.append(line)
    return Grid(caption, header, lines, notes_of(block))


def _score(block: pd.DataFrame, match: pd.DataFrame, column: Column, metric: str, digits: int, higher: bool) -> Cell:
    if not len(match):
        return _amount(None, digits)
    row = match.iloc[0]
    text = number(row[metric], digits)
    best, second = ranked(block, column, metric, digits, higher)
    spread = row.get(metric.removesuffix("_db") + "_pm_seeds")
    behind = "" if spread is None or pd.isna(spread) else f" ± {spread:.{digits}f}"
    star = "*" if metric == "psnr_db" and row["within_noise"] == 1 else ""
    return Cell(
        text + behind + star, _amount(row[metric], digits).key, 1 if text == best else 2 if text == second else 0
    )


def _against_best(block: Block) -> list[tuple[Compared, Any]]:
    """Every method against the one with the best mean over all images, worst last, with its differences."""
    trial = next(iter(block.methods))
    to_trial = {m: pooled(columns, block.methods[trial]) for m, columns in block.methods.items()}
    means = {m: float(d.mean()) for m, d in to_trial.items() if d is not None}
    if not means:
        return []
    best = max(means, key=means.__getitem__)
    pairs = [
        (compare_methods(block, m, best), pooled(block.methods[m], block.methods[best])) for m in means if m != best
    ]
    known = [(c, d) for c, d in pairs if c is not None and d is not None]
    fixed = adjusted([c for c, _ in known])
    return sorted(zip(fixed, [d for _, d in known], strict=True), key=lambda pair: -pair[0].found.mean)


def _verdict(block: pd.DataFrame, trained: Block | None, compared: Sequence[tuple[Compared, Any]]) -> list[str]:
    """What may be concluded about quality, in sentences."""
    if trained is None or not compared:
        return ["One trained method at most: there is nothing to compare."]
    best = compared[0][0].b
    worse = [c.a for c, _ in compared if c.decided]
    level = [c.a for c, _ in compared if not c.decided and c.p_holm is not None]
    untold = [c for c, _ in compared if c.p_holm is None]
    told_all = [f"Over all test images, {best} has the highest mean PSNR of the trained methods."]
    means = block.groupby("method")["psnr_db"].mean()
    above = [m for m in means.index if m not in trained.methods and means[m] > means[best]]
    if above:
        told_all.append(f"{', '.join(above)}, without any training, is above it: these runs were trained too little.")
    if worse:
        told_all.append(f"It is better than {', '.join(worse)}, by more than noise.")
    if level:
        told_all.append(f"Its difference to {', '.join(level)} is within noise: these runs do not rank them.")
    if untold:
        told_all.append(f"Nothing is decided about {', '.join(c.a for c in untold)}: {untold[0].found.note}.")
    smallest = [c.found.detectable for c, _ in compared if c.found.detectable is not None]
    if smallest:
        told_all.append(f"So many seeds and images could have shown differences of {max(smallest):.3f} dB.")
    notes = dict.fromkeys(c.found.note for c, _ in compared if c.found.note and c.p_holm is not None)
    return told_all + [f"{note[0].upper()}{note[1:]}." for note in notes if note]


def _differences(compared: Sequence[Compared]) -> Grid | None:
    if not compared:
        return None
    header = [
        "Difference",
        "Mean, dB",
        "95 % interval",
        "on these images alone",
        "p (Holm)",
        "Shows, dB",
        "Seeds",
        "Images",
        "Runs",
    ]
    lines = []
    for c in compared:
        f = c.found
        intervals = [
            _cell("no interval" if i is None else f"[{i.low:+.3f}, {i.high:+.3f}]")
            for i in (f.interval, f.interval_seeds)
        ]
        lines.append(
            [
                _cell(f"{c.a} - {c.b}"), Cell(f"{f.mean:+.3f}", f.mean), *intervals,
                Cell("n/a" if c.p_holm is None else f"{c.p_holm:.3g}", math.inf if c.p_holm is None else c.p_holm),
                Cell("n/a" if f.detectable is None else f"{f.detectable:.3f}", f.detectable or math.inf),
                _cell(str(f.seeds), f.seeds), _cell(str(f.images), f.images), _cell(" ".join(c.runs)),
            ]
        )  # fmt: skip
    notes = [
        "Paired by seed and image; an image's mean over its conditions. Interval: hierarchical bootstrap over seeds "
        "and images, expanded to Student's t. p: the larger of a permutation test and the test over seeds and images.",
        "Shows: the true difference that so many seeds and images find in 4 cases of 5.",
        *dict.fromkeys(c.found.note + "." for c in compared if c.found.note),
    ]
    return Grid("Differences to the best", header, lines, notes)


def _ablation(block: Block | None) -> Grid | None:
    """What each choice of our reading of KiT is worth: every variant of kit against kit."""
    if block is None or "kit" not in block.methods:
        return None
    variants = [m for m in block.methods if m.startswith("kit-")]
    compared = [c for c in (compare_methods(block, m, "kit") for m in variants) if c is not None]
    if not compared:
        return None
    grid = _differences(adjusted(compared))
    assert grid is not None
    return Grid("What each choice of our reading of KiT is worth", grid.header, grid.lines, grid.notes)


def _pictures(
    block: pd.DataFrame, trained: Block | None, compared: list[tuple[Compared, Any]], folders: dict[str, RunFolder]
) -> list[Picture]:
    if trained is None:
        return []
    methods = list(trained.methods)
    records = block.to_dict("records")
    columns = {(row["data_set"], row["condition"]): _from_25(row["sigma"]) for row in records}
    column = min(columns, key=columns.__getitem__)
    here = {row["method"]: row for row in records if (row["data_set"], row["condition"]) == column}
    name = heading(column)
    shown = []
    for field_name, scale, label in (
        ("gmacs", 1.0, "GMACs of one image"),
        ("train_peak_bytes", 2.0**20, "peak memory of a training step, MiB"),
    ):
        points = {
            m: (float(here[m][field_name]) / scale, float(here[m]["psnr_db"]))
            for m in methods
            if m in here and pd.notna(here[m][field_name]) and math.isfinite(here[m]["psnr_db"])
        }
        if points:
            svg = pictures.pareto(points, label, name)
            shown.append(Picture(f"PSNR on {name} against {label}", _svg(svg)))
    logs = {m: _folders(trained, m, folders) for m in methods}
    drawn = pictures.curves(logs)
    if drawn is not None:
        shown.append(
            Picture("Training curves: mean over seeds, smoothed over 5 % of the steps", _svg(drawn), wide=True)
        )
    if compared:
        title = "Differences to the best, image by image; bar: 95 % interval over seeds and images"
        shown.append(Picture(title, _svg(pictures.differences(compared)), wide=True))
    return shown


def _from_25(sigma: float | None) -> float:
    """How far a noise level is from the one that is shown first; 0 where a task has none."""
    return 0.0 if sigma is None or math.isnan(sigma) else abs(sigma - 25)


def _folders(block: Block, method: str, folders: dict[str, RunFolder]) -> list[RunFolder]:
    keys = dict.fromkeys(e.run.key for group in block.methods[method].values() for e in group)
    return [folders[key] for key in keys]


def _svg(data: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(data).decode()


def _png(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _galleries(found: Sequence[Entry], folders: dict[str, RunFolder]) -> tuple[list[Gallery], int]:
    """Crops of the images that the runs kept, by the lowest seed of each method, as far as the page has room."""
    names = labels(found)
    groups: dict[tuple[Any, ...], dict[str, tuple[Path, Entry, int]]] = {}
    for entry in sorted(found, key=lambda e: (bool(e.run.comparison), names[e.run.key, e.run.method], e.run.seed or 0)):
        evaluation = entry.evaluation
        for place in range(len(evaluation.scores)):
            path = folders[entry.run.key].crop_path(evaluation.data_set, evaluation.sigma, evaluation.stamp, place)
            if not path.is_file():
                break
            key = (_from_25(evaluation.sigma), entry.run.mode, evaluation.data_set, place)
            name = f"{names[entry.run.key, entry.run.method]}"
            groups.setdefault(key, {}).setdefault(name, (path, entry, place))
    galleries, size, left_out = [], 0, 0
    for _, methods in sorted(groups.items(), key=lambda item: item[0]):
        if size > CROP_BYTES:
            left_out += 1
            continue
        gallery = _gallery(methods)
        size += sum(len(p.image) + len(p.error or "") for p in gallery.panels)
        galleries.append(gallery)
    return galleries, left_out


def _gallery(methods: dict[str, tuple[Path, Entry, int]]) -> Gallery:
    cut = {name: pictures.crop(path) for name, (path, _, _) in methods.items()}
    first = next(iter(cut.values()))
    _, entry, place = next(iter(methods.values()))
    panels = [Panel("input", "", "", _png(first.degraded), None)] if "input" not in methods else []
    for name, (_, own, _) in sorted(methods.items(), key=lambda item: item[0] != "input"):
        psnr = own.evaluation.scores[place].psnr
        told_psnr = "exact" if psnr is None else f"{psnr:.2f} dB"
        panels.append(Panel(name, told_psnr, own.run.key[:10], _png(cut[name].restored), _png(cut[name].error)))
    panels.append(Panel("ground truth", "", "", _png(first.clean), None))
    evaluation = entry.evaluation
    image = f"{evaluation.scores[place].image} {evaluation.condition}".strip()
    title = f"{evaluation.data_set}: {image} ({entry.run.mode})"
    return Gallery(title, _png(first.whole), first.place, panels)


def _scaling(sweep: Sweep) -> Picture:
    from kitbench.cost.plot import draw

    with tempfile.TemporaryDirectory() as folder:
        draw(sweep, Path(folder))
        svg = (Path(folder) / "scale.svg").read_bytes()
    title = f"Cost against resolution: {sweep.scope}, {sweep.dim} channels, on {sweep.device} (sweep {sweep.key[:10]})"
    return Picture(title, _svg(svg), wide=True)


def _settings(found: Sequence[Entry]) -> list[dict[str, str]]:
    """What decided the numbers of each method: shared parts once a comparison, then the method's own settings."""
    shown: dict[str, dict[str, str]] = {}
    for entry in found:
        run = entry.run
        if run.recipe is not None and run.backbone is not None and run.comparison not in shown:
            shared = {
                "task": run.task.model_dump(mode="json"),
                "backbone": run.backbone.model_dump(mode="json"),
                "recipe": run.recipe.model_dump(mode="json"),
                "training sets": run.train_sets,
            }
            shown[run.comparison] = {"title": caption_of(run), "text": json.dumps(shared, indent=1, ensure_ascii=False)}
    names = labels(found)
    own = {names[e.run.key, e.run.method]: dict(e.run.settings) for e in found if e.run.settings}
    methods = {"title": "Settings of the attentions", "text": json.dumps(dict(sorted(own.items())), indent=1)}
    protocol = found[0].evaluation.protocol.model_dump(mode="json")
    last = {
        "title": f"Protocol {found[0].evaluation.stamp}",
        "text": json.dumps(protocol, indent=1, ensure_ascii=False),
    }
    return [*(shown[key] for key in sorted(shown)), methods, last]


def _reproduce(found: Sequence[Entry], folders: dict[str, RunFolder]) -> list[dict[str, str]]:
    """A line a run: its key, folder, the command and commit that made it, and the checksum of its weights."""
    lines = {}
    for entry in sorted(found, key=lambda e: (e.run.method, e.run.seed or 0, e.run.key)):
        environment = entry.run.environment
        lines[entry.run.key] = {
            "key": entry.run.key[:10],
            "folder": folders[entry.run.key].path.name,
            "command": "python -m " + shlex.join(environment.command),
            "commit": environment.commit or f"kitbench {environment.kitbench}",
            "weights": entry.training.weights_sha256[:16] if entry.training else "",
        }
    return list(lines.values())


def _environments(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """Where the runs were made: one entry for all that share a machine and versions."""
    shown: dict[str, dict[str, Any]] = {}
    for entry in sorted(found, key=lambda e: e.run.key):
        e = entry.run.environment
        facts = {
            "host": e.host, "device": e.device, "driver": e.driver or "none", "threads": e.threads, "python": e.python,
            **e.versions, **{key: value for key, value in e.flags.items() if value is not None},
        }  # fmt: skip
        one = shown.setdefault(json.dumps(facts, sort_keys=True), {"facts": facts, "runs": {}})
        one["runs"][entry.run.key[:10]] = None
    return [{"facts": one["facts"], "runs": list(one["runs"])} for _, one in sorted(shown.items())]
