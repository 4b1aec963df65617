"""What is about to be run and how long it may take, said before it begins."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape

from kitbench.errors import InputError
from kitbench.runs.cell import Cell
from kitbench.runs.prepare import PreparedSuite
from kitbench.runs.probe import Probe
from kitbench.runs.train import validation_steps
from kitbench.scoring.validation import validation_pixels
from kitbench.spec.suite import Recipe
from kitbench.store.folder import without_imported
from kitbench.store.records import Cost
from kitbench.system.environment import device_name
from kitbench.text import counted, duration

IMAGE_SECONDS = 0.03
"""What scoring a restored image takes beside restoring it: measures and crops."""
FEWEST_WINDOWS, USUAL_WINDOWS = 8, 24
"""How often the window of the averaged weights fits into a training: from where on they are not said to lag, and how
often in the recipe `standard`."""


@dataclass(frozen=True)
class Expected:
    """Seconds that a cell's work is expected to take."""

    training: float
    scoring: float
    saved_steps: int = 0
    """Steps that were done before, which `training` leaves out."""

    @property
    def seconds(self) -> float:
        return self.training + self.scoring


def expected(prepared: PreparedSuite, cell: Cell, probe: Probe | None) -> Expected:
    """What is left to do of a cell, by what its method's steps, validations and images take; training-free methods are
    quick.
    """
    photos = [photo for name, _ in prepared.missing_units(cell) for photo in prepared.sets[cell.mode].test[name]]
    pixels = sum(photo.shape[0] * photo.shape[1] for photo in photos)
    scoring = len(photos) * IMAGE_SECONDS + (probe.pixel_seconds * pixels if probe else 0.0)
    if probe is None or prepared.folder(cell).trained:
        return Expected(0.0, scoring)
    recipe, saved = prepared.suite.recipe, prepared.folder(cell).saved_steps or 0
    validations = sum(step > saved for step in validation_steps(recipe))
    validated = validations * validation_pixels(prepared.sets[cell.mode].validation) * probe.pixel_seconds
    return Expected(probe.step_seconds * max(0, recipe.steps - saved) + validated, scoring, saved)


def makespan(seconds: Sequence[float], slots: int) -> float:
    """How long so many workers take for these pieces of work, the longest first."""
    busy = [0.0] * slots
    for each in sorted(seconds, reverse=True):
        heapq.heappush(busy, heapq.heappop(busy) + each)
    return max(busy)


def announce(
    prepared: PreparedSuite,
    work: Mapping[Cell, Expected],
    probes: Mapping[str, Probe],
    devices: Sequence[str],
    console: Console,
) -> None:
    """Say what is about to be done, by a worker on each of the devices, and how long it may take."""
    slots = len(devices)

    def say(label: str, text: str) -> None:
        console.print(f"[bold]{label:<10}[/bold]{text}", highlight=False, soft_wrap=True)

    suite, recipe = prepared.suite, prepared.suite.recipe
    say("suite", f"{suite.name}, preset {suite.preset}: {suite.title}")
    for label, text in _setting(prepared, devices):
        say(label, text)
    stored = [prepared.folder(cell) for cell in prepared.cells if cell not in work]
    if stored:
        _, imported = without_imported(stored)
        where = f"complete in {prepared.options.out} and are not run again" + (f" ({imported})" if imported else "")
        say("stored", escape(f"{len(stored)} of {len(prepared.cells)} runs are {where}"))
    for name, probe in probes.items():
        mine = [expected.seconds for cell, expected in work.items() if cell.method == name]
        say("method", f"{name}: {cost_text(probe.cost)}, about {duration(sum(mine))}" + " of one worker" * (slots > 1))
    if work:
        seconds = makespan([expected.seconds for expected in work.values()], slots)
        at_a_time = f", {slots} at a time" if slots > 1 else ""
        runs = f"{counted(len(work), 'run')} of {counted(recipe.steps, 'step')}"
        say("expected", f"about {duration(seconds)} for {runs}{at_a_time}")


def _setting(prepared: PreparedSuite, devices: Sequence[str]) -> list[tuple[str, str]]:
    """Data, network, recipe, protocols and device, a line each."""
    suite, recipe = prepared.suite, prepared.suite.recipe
    lines = []
    sigmas = ", ".join(f"{sigma:g}" for sigma in suite.task.conditions if sigma is not None)
    for mode, sets in prepared.sets.items():
        train, test = (", ".join(f"{n} ({len(p)})" for n, p in part.items()) for part in (sets.train, sets.test))
        lines.append(("data", f"{mode}: train on {train}; test on {test}" + (f" at sigma {sigmas}" if sigmas else "")))
    lines += [("", f"without {name}: {why}") for name, why in prepared.absent.items()]
    width, blocks = suite.backbone.width, list(suite.backbone.blocks)
    levels = ", ".join(map(str, sorted(set(suite.backbone.attention_levels))))
    lines.append(("backbone", f"width {width}, blocks {blocks}, attention at levels {levels} of {len(blocks)}"))
    steps = f"{counted(recipe.steps, 'step')} of {counted(recipe.batch, 'crop')} of {recipe.crop} px"
    lines.append(("recipe", f"{recipe.name}: {steps}, {recipe.precision}; {recipe.card.time}"))
    if recipe.ema:
        window = min(round(1 / (1 - recipe.ema)), recipe.steps)
        if window * FEWEST_WINDOWS > recipe.steps:
            lines.append(("", _lag(recipe, window)))
    if recipe.init is not None:
        lines.append(("init", f"training starts from the weights of {recipe.init}"))
    for protocol in {protocol.stamp: protocol for protocol in prepared.protocols.values()}.values():
        lines.append(("protocol", f"{protocol.stamp}: {protocol.summary}"))
    for net, note in prepared.lpips_notes.items():
        if not _said_before(prepared, net):
            lines.append(("lpips", f"{net} is n/a, said once: {note} On this command line: --lpips-weights FILE."))
    world, pieces = prepared.world, prepared.pieces
    shared = f", {world.size} processes" if world.size > 1 else ""
    at_a_time = f", {counted(len(pieces[0]), 'crop')} at a time on each" if len(pieces) > 1 else ""
    threads = torch.get_num_threads()
    slots, numbered = len(devices), ", ".join(dict.fromkeys(name for name in devices if name.startswith("cuda:")))
    workers = f", {slots} worker processes" if slots > 1 else ""
    each = f"{counted(threads, 'thread')}{' each' * (slots > 1)}"
    name = device_name(prepared.device) + (f" ({numbered})" if numbered else "")
    lines.append(("device", f"{name}{workers}, {each}{shared}{at_a_time}"))
    if prepared.device.type == "cuda" and suite.preset == "quick":
        lines.append(("", "this machine has a CUDA device: --preset full runs the paper's recipe as we read it"))
    return lines


def _lag(recipe: Recipe, window: int) -> str:
    """That the average of the weights, of which about the last `window` steps are a part, covers too much."""
    scaled = round(max(0.0, 1 - USUAL_WINDOWS / recipe.steps), 4)
    return (
        f"recipe.ema {recipe.ema:g} averages the weights over about the last {window} of {recipe.steps} steps: they "
        f"lag behind, and score lower. For so short a training take --set recipe.ema={scaled:g}"
    )


def _said_before(prepared: PreparedSuite, net: str) -> bool:
    """Whether a stored run of the suite was scored without this network of LPIPS."""
    for cell in prepared.cells:
        with suppress(InputError):  # a damaged record is reported when the cell's turn comes
            evaluations = prepared.folder(cell).evaluations()
            if any(one.lpips_note is not None and one.protocol.lpips == net for one in evaluations):
                return True
    return False


def cost_text(cost: Cost) -> str:
    """Parameters and multiply-adds of a method, for people."""
    macs = cost.stated_macs
    needed = "" if cost.macs_needed is None else f" (its definition needs {cost.macs_needed / 1e9:.2f})"
    mark = f"; {cost.macs_note}" if cost.macs_note else ""
    return (
        f"{cost.parameters:,} parameters ({cost.attention_parameters:,} in the attention), "
        f"{'n/a' if macs is None else f'{macs / 1e9:.2f}'} GMACs at {cost.resolution} px{needed}{mark}"
    )
