"""What is about to be run, said before it begins."""

from __future__ import annotations

import torch
from rich.console import Console

from kitbench.runs.cell import Cell
from kitbench.runs.prepare import Job
from kitbench.runs.probe import Probe
from kitbench.system.environment import device_name
from kitbench.text import duration


def announce(job: Job, todo: list[Cell], probes: dict[str, Probe], console: Console) -> None:
    """Say what is about to be done, and how long it may take."""
    suite, recipe = job.suite, job.suite.recipe

    def say(label: str, text: str) -> None:
        console.print(f"[bold]{label:<10}[/bold]{text}", highlight=False, soft_wrap=True)

    say("suite", f"{suite.name}, preset {suite.preset}: {suite.title}")
    sigmas = ", ".join(f"{sigma:g}" for sigma in suite.task.conditions if sigma is not None)
    for mode, sets in job.sets.items():
        train, test = (", ".join(f"{n} ({len(p)})" for n, p in part.items()) for part in (sets.train, sets.test))
        say("data", f"{mode}: train on {train}; test on {test}" + (f" at sigma {sigmas}" if sigmas else ""))
    for name, why in job.absent.items():
        say("", f"without {name}: {why}")
    width, blocks = suite.backbone.width, list(suite.backbone.blocks)
    levels = ", ".join(map(str, sorted(set(suite.backbone.attention_levels))))
    say("backbone", f"width {width}, blocks {blocks}, attention at levels {levels} of {len(blocks)}")
    steps = f"{recipe.steps} steps of {recipe.batch} crops of {recipe.crop} px, {recipe.precision}"
    say("recipe", f"{recipe.name}: {steps}; {recipe.card.time}")
    for protocol in {protocol.stamp: protocol for protocol in job.protocols.values()}.values():
        say("protocol", f"{protocol.stamp}: {protocol.summary}")
    for net, note in job.lpips_notes.items():
        say("lpips", f"{net} is n/a: {note}")
    shared = f", {job.world.size} processes" if job.world.size > 1 else ""
    at_a_time = f", {len(job.pieces[0])} crops at a time on each" if len(job.pieces) > 1 else ""
    say("device", f"{device_name(job.device)}, {torch.get_num_threads()} threads{shared}{at_a_time}")
    if job.device.type == "cuda" and suite.preset == "quick":
        say("", "this machine has a CUDA device: --preset full runs the paper's recipe as we read it")
    stored = len(job.cells) - len(todo)
    if stored:
        say("stored", f"{stored} of {len(job.cells)} runs are complete in {job.options.out} and are not run again")
    seconds = 0.0
    for name, probe in probes.items():
        cost, mine = probe.cost, [cell for cell in todo if cell.method == name]
        pixels = sum(
            photo.shape[0] * photo.shape[1] * len(suite.task.conditions)
            for cell in mine for photos in job.sets[cell.mode].test.values() for photo in photos
        )  # fmt: skip
        training = sum(not (job.options.out / cell.folder / "training.json").is_file() for cell in mine)
        expected = training * probe.step_seconds * recipe.steps + pixels * probe.image_seconds
        seconds += expected
        macs = cost.macs if cost.macs is not None else cost.macs_counted
        mark = f"; {cost.macs_note}" if cost.macs_note else ""
        say(
            "method",
            f"{name}: {cost.parameters:,} parameters ({cost.attention_parameters:,} in the attention), "
            f"{(macs or 0) / 1e9:.2f} GMACs at {cost.resolution} px{mark}, about {duration(expected)}",
        )
    if todo:
        say("expected", f"about {duration(seconds)} for {len(todo)} runs")
