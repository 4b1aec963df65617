"""The six statements: decided where the stored numbers decide them, and only there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.spec import loading
from kitbench.store.sweeps import Point, Sweep
from kitbench.verdict.claims import FULL_STEPS, OPEN, Claim, claims, load
from tests.conftest import Kitbench
from tests.stored import ENVIRONMENT, store


def runs(
    out: Path, gains: dict[str, float], seeds=range(5), steps: int | None = None, notes: dict | None = None, **stored
) -> Path:
    """Methods that differ by known decibels on 12 images, with a spread of 0.02 dB."""
    for number, (method, gain) in enumerate(gains.items()):
        for seed in seeds:
            noise = 0.02 * np.random.default_rng((seed, number)).standard_normal(12)
            told = notes if method == "kit" else None
            store(out, method, 30 + np.linspace(-3, 3, 12) + gain + noise, seed, steps=steps, notes=told, **stored)
    return out


def sweep(out: Path, exponents: dict[str, float], sizes=(64, 128, 256, 512), status: str = "measured") -> Path:
    points = []
    for method, exponent in exponents.items():
        for size in sizes:
            grown = (size / 64) ** (2 * exponent) * (1 + 0.001 * (size % 3))
            took = {"peak_bytes": round(1e8 * grown), "seconds": grown} if status == "measured" else {}
            point = Point(
                method=method, what="infer", size=size, status=status, macs=round(1e8 * grown), macs_closed=None,
                comparisons=0, exponentials=0, gathered_bytes=0, raw_bytes=1, predicted_bytes=1, **took,
            )  # fmt: skip
            points.append(point)
    record = Sweep(
        key="abcdef0123456789", scope="attention", dim=32, heads=1, device="cpu", threads=1, memory_limit=1, budget=1,
        methods={m: (m, {}) for m in exponents}, environment=ENVIRONMENT, points=tuple(points),
    )  # fmt: skip
    out.mkdir(parents=True)
    (out / "scale.json").write_text(record.model_dump_json())
    return out


def judge(*paths: Path) -> dict[int, Claim]:
    return {claim.number: claim for claim in claims(*load(paths))}


GOOD = {"kit": 0.5, "window": 0.3, "local": 0.2, "global": 0.0, "kit-random": 0.1}
RECALL = {"encoder.0": {"recall": 0.7, "chance": 0.1}, "bottom": {"recall": 0.9, "chance": 0.3}}


def test_claims_that_the_numbers_support_are_supported_with_figure_interval_and_runs(tmp_path: Path) -> None:
    runs(tmp_path / "runs", GOOD, notes=RECALL)
    sweep(tmp_path / "scale", {"kit": 1.0, "window": 1.0, "global": 2.0})
    found = judge(tmp_path / "runs", tmp_path / "scale")
    assert {n: c.verdict for n, c in found.items()} == {
        1: "supported", 2: "supported", 3: OPEN, 4: "supported", 5: OPEN, 6: "supported"
    }  # fmt: skip
    [reach] = found[2].parts
    assert "kit - local: +0.3" in reach.evidence
    assert re.search(r"95 % interval \[\+0\.\d+, \+0\.\d+\]", reach.evidence)
    assert len(reach.runs) == 10
    assert reach.command == ""
    recall, retrieval = found[3].parts
    assert retrieval.verdict == "supported"
    assert "recall 0.800, of chance 0.200" in recall.evidence  # every seed the same: no interval, so not decided
    linear = found[4].parts[2]
    assert "time 1.00" in linear.evidence
    assert linear.runs == ("sweep abcdef0123",)


def test_claims_that_the_numbers_contradict_are_not_supported(tmp_path: Path) -> None:
    runs(tmp_path / "runs", {"kit": 0.0, "window": 0.3, "local": 0.2, "global": 0.4, "kit-random": 0.1})
    sweep(tmp_path / "scale", {"kit": 1.4, "window": 1.0, "global": 1.0})
    found = judge(tmp_path / "runs", tmp_path / "scale")
    assert {n for n, c in found.items() if c.verdict == "not supported"} == {1, 2, 3, 4, 6}
    assert found[5].verdict == OPEN


def test_every_task_of_the_paper_is_judged_by_runs_of_its_own_protocol(tmp_path: Path) -> None:
    deblur = {"of": loading.load_suite("deblur", "smoke"), "protocol": "blur-rgb8-ssim3d", "sigma": None}
    found = judge(
        runs(tmp_path / "denoise", GOOD, steps=FULL_STEPS),
        runs(tmp_path / "deblur", GOOD | {"kit": -0.5}, steps=FULL_STEPS, **deblur),
    )
    tasks = ("denoising", "deblurring", "deraining")
    parts = {task: part for task in tasks for part in found[5].parts if task in part.question}
    assert [parts[task].verdict for task in tasks] == ["supported", "not supported", OPEN]
    assert "--suite derain --preset full" in parts["deraining"].command
    assert found[5].verdict == "not supported"
    assert found[2].verdict == "supported"  # by the denoising runs
    runs(tmp_path / "deblur", GOOD, steps=FULL_STEPS, **(deblur | {"protocol": "blur-rgb8-ssim3d-tile"}))
    with pytest.raises(InputError, match="Rows of different protocols"):
        judge(tmp_path / "deblur")
    assert len(claims(*load([tmp_path / "denoise", tmp_path / "deblur"]), "blur-rgb8-ssim3d")) == 6


def test_only_a_long_recipe_speaks_of_the_state_of_the_art(tmp_path: Path) -> None:
    short = judge(runs(tmp_path / "short", GOOD))[5].parts[0]
    assert short.verdict == OPEN
    assert "steps of training say nothing of the state of the art" in short.evidence
    assert judge(runs(tmp_path / "long", GOOD, steps=300_000))[5].parts[0].verdict == "supported"
    both = judge(tmp_path / "short", runs(tmp_path / "worse", GOOD | {"kit": -0.5}, steps=300_000))
    assert both[5].verdict == "not supported"  # the longest recipe speaks, and two open parts do not hide it


@pytest.mark.parametrize("what", ["one seed", "no difference", "nothing"])
def test_what_is_not_decided_names_the_command_that_would(tmp_path: Path, what: str) -> None:
    if what == "nothing":
        sweep(tmp_path / "runs", {"window": 1.0})
    else:
        gains = GOOD if what == "one seed" else dict.fromkeys(GOOD, 0.0)
        runs(tmp_path / "runs", gains, seeds=(0,) if what == "one seed" else range(3))
    found = judge(tmp_path / "runs")
    assert {claim.verdict for claim in found.values()} == {OPEN}
    for claim in found.values():
        for part in claim.parts:
            words = shlex.split(part.command, comments=True)
            assert words[:3] == ["python", "-m", "kitbench"]
            context = cli.commands[words[3]].make_context(words[3], words[4:])  # raises for an unknown option
            if words[3] == "run":
                loading.load_suite(context.params["suite"], context.params["preset"], methods=context.params["method"])


def test_predicted_points_decide_no_time(tmp_path: Path) -> None:
    linear = judge(sweep(tmp_path / "scale", {"kit": 1.0, "global": 2.0}, status="predicted"))[4].parts[2]
    assert linear.verdict == OPEN


def test_the_command_prints_and_writes_all_six(kitbench: Kitbench, tmp_path: Path) -> None:
    runs(tmp_path / "runs", {"kit": 0.0, "conv": 0.0}, seeds=(0,))
    text = kitbench("claims", "runs").stdout
    assert re.findall(r"^## (\d)\.", text, re.MULTILINE) == list("123456")
    kitbench("claims", "runs", "--out", "claims.md")
    assert (tmp_path / "claims.md").read_text() == text
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "scale.json").write_text("{}")
    assert "is no sweep" in kitbench("claims", "bad", code=2).stderr
    assert "is no folder" in kitbench("claims", "nowhere", code=2).stderr


def test_every_variant_of_the_ablation_changes_one_setting_of_kit() -> None:
    from kitbench.model import methods

    for preset in ("smoke", "quick", "full"):
        chosen = loading.load_suite("ablate", preset)
        resolved = {n: methods.load_method(m.attention, n).resolve(m.settings) for n, m in chosen.methods.items()}
        base = resolved.pop("kit")
        for name, settings in resolved.items():
            changed = {key for key in settings if settings[key] != base[key]} - {"size"}
            assert len(changed) == (0 if name in ("kit-unshifted", "kit-random") else 1), (preset, name, changed)
