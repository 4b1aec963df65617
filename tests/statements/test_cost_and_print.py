"""What the pages say of cost, and of published weights."""

from __future__ import annotations

import json
from statistics import median

from kitbench.store.folder import find
from kitbench.store.sweeps import Sweep
from kitbench.verdict.anchors import anchors
from kitbench.verdict.scaling.fit import exponent
from tests.statements.stored import CAMERA, GRAY, RAIN, REACH, REFERENCE, RESULTS, SEEDS, SHAKE, says, step_ratios


def test_how_near_published_weights_come_to_print() -> None:
    found = anchors(find([REFERENCE / "anchors"]))
    largest = max(abs(anchor.difference) for anchor in found)
    for page in (RESULTS, "docs/protocols.md"):
        says(page, f"within {largest:.3f} dB")


def test_the_size_of_the_networks_beside_a_published_one() -> None:
    [published] = {run.run.cost.parameters for run in find([REFERENCE / "anchors"]) if run.run.method == "ffdnet"}
    sizes = [run.training.cost.parameters for run in find([REFERENCE / SEEDS]) if run.training is not None]
    says("README.md", f"({published / 1e6:.2f} million parameters; these networks at most {max(sizes) / 1e6:.2f})")


def test_the_cost_of_kit_in_time() -> None:
    folders = (SEEDS, GRAY, RAIN, SHAKE, CAMERA, REACH, "reach-quick-cpu")
    ratios = [median(step_ratios(folder, "kit", "window")) for folder in folders]
    says(RESULTS, f"takes {min(ratios):.1f} to {max(ratios):.1f} times that of windows")
    points = json.loads((REFERENCE / "scale-cpu" / "scale.json").read_text())["points"]
    time = {(p["method"], p["what"], p["size"]): p["seconds"] for p in points if p["seconds"] and not p["noisy"]}
    alone = [seconds / time["window", *rest] for (name, *rest), seconds in time.items() if name == "kit"]
    says(RESULTS, f"with four times the keys of windows, {min(alone):.0f} to {max(alone):.1f} times")


def test_the_time_of_global_attention_grows_with_the_square_of_the_pixels() -> None:
    sweep = Sweep.model_validate_json((REFERENCE / "scale-global-cpu" / "scale.json").read_bytes())
    points = [point for point in sweep.points if point.seconds is not None and not point.noisy]
    found = exponent(points, lambda point: point.seconds)
    assert found is not None
    assert found.half_width is not None
    sides = sorted(point.size for point in points)
    says(
        RESULTS,
        f"its time from {sides[0]} to {sides[-1]} px (exponent {found.value:.2f} ± {found.half_width:.2f})",
    )


def test_what_a_whole_network_needs_for_a_megapixel() -> None:
    sweep = Sweep.model_validate_json((REFERENCE / "scale-model-cpu" / "scale.json").read_text())
    points = {(p.method, p.what): p for p in sweep.points if p.size == 1024}
    restoring, training = ([p for (_, at), p in points.items() if at == what] for what in ("infer", "train"))
    assert len(restoring) == len(training) == 5
    [needed] = {round(p.bytes / 2**20) for p in restoring}
    steps = sorted(p.bytes / 2**30 for p in training)
    seconds = {name: p.seconds for (name, what), p in points.items() if what == "infer"}
    assert seconds["global"] is None
    says(
        RESULTS,
        f"Restoring an image of 1024 x 1024 px needs {needed} MiB with any of them, a training step on one "
        f"{steps[0]:.1f} to {steps[-1]:.1f} GiB",
        f"image takes {seconds['conv']:.1f} s with `conv`, {seconds['window']:.1f} s with windows, "
        f"{seconds['kit']:.1f} s with KiT, {seconds['local']:.1f} s with local attention, and with global attention minutes",
    )
