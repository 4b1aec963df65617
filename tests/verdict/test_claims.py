"""The six statements: decided where the stored numbers decide them, and only there."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.spec import loading
from kitbench.spec.fields import digest
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Trial, Tuning, read_record, shared_with_search
from kitbench.store.sweeps import Point, Sweep
from kitbench.verdict.claims import FULL_STEPS, Claim, claims, load
from kitbench.verdict.contrasts import UNDECIDED
from tests.conftest import Kitbench
from tests.stored import ENVIRONMENT, evidence_of, store

QUICK = loading.load_suite("denoise", "quick")


def runs(
    out: Path, gains: dict[str, float], seeds=range(5), steps: int | None = None, notes: dict | None = None, **stored
) -> Path:
    """Methods that differ by known decibels on 12 images, with a spread of 0.02 dB."""
    for number, (method, gain) in enumerate(gains.items()):
        for seed in seeds:
            noise = 0.02 * np.random.default_rng((seed, number)).standard_normal(12)
            noted = notes if method == "kit" else None
            options = {"of": QUICK, "lr": LR} | (ALONE if method == "kit-k1" else {}) | stored
            store(out, method, 30 + np.linspace(-3, 3, 12) + gain + noise, seed, steps=steps, notes=noted, **options)
    return out


LR = 5e-3
ALONE: dict = {"attention": "kit", "settings": {"k": 1, "patch": 4}, "of": loading.load_suite("ablate", "quick")}
"""The patch alone, a row of the suite `ablate`."""


def everything(out: Path, gains: dict[str, float], steps=(700, 3000), notes: dict | None = None, **stored) -> Path:
    """Runs of two lengths, with the records of searches that found the recipe's own rate best for every method."""
    suite = stored.get("of", QUICK)
    for length in steps:
        runs(out, gains, steps=length, notes=notes, **stored)
        of = {
            folder.run.method: folder.run for folder in find([out]) if folder.run.identity["recipe"]["steps"] == length
        }
        variants = {m: digest([of[m].attention, of[m].settings]) for m in gains}
        trials = [Trial(method=m, lr=LR, psnr_db=30, key=f"{m}{length}", variant=variants[m]) for m in gains]
        record = Tuning(
            suite=suite.name, preset=suite.preset, mode="colour", steps=length, seed=99, lr=LR, rates=(LR,),
            widened=False, validation="validation", trials=tuple(trials), best=dict.fromkeys(gains, LR),
            shared=shared_with_search(next(iter(of.values())).identity),
        )  # fmt: skip
        RunFolder(out).write(f"tuning-{length}.json", record)
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


def page(*paths: Path) -> dict[int, Claim]:
    return {claim.number: claim for claim in claims(*load(paths))}


GOOD = {"kit": 0.5, "window": 0.3, "local": 0.2, "global": 0.0, "kit-random": 0.1, "kit-k1": 0.4}
MEASURED_ON = {"k": 4, "crops": 20, "images": 5, "side": 256, "sets": "Set_A, Validation_A", "condition": "σ25"}
RECALL = {
    "encoder.0": {"level": 1, "recall": 0.6, "chance": 0.1, "adjacent": 0.3, "distance": 4.0} | MEASURED_ON,
    "decoder.0": {"level": 1, "recall": 0.8, "chance": 0.1, "adjacent": 0.1, "distance": 6.0} | MEASURED_ON,
    "bottom": {"level": 2, "recall": 0.9, "chance": 0.3, "adjacent": 0.4, "distance": 2.0} | MEASURED_ON,
}


def retrieval(seed: int, adjacent: float = 0.3) -> dict:
    """Notes that differ a little between seeds."""
    return {"bottom": RECALL["bottom"] | {"recall": 0.7 + 0.01 * seed, "adjacent": adjacent + 0.01 * seed}}


def test_claims_that_the_numbers_support_are_supported_with_figure_interval_and_runs(tmp_path: Path) -> None:
    everything(tmp_path / "runs", GOOD, notes=RECALL)
    sweep(tmp_path / "scale", {"kit": 1.0, "window": 1.0, "global": 2.0})
    found = page(tmp_path / "runs", tmp_path / "scale")
    assert {n: c.verdict for n, c in found.items()} == {
        1: "supported", 2: "supported", 3: UNDECIDED, 4: UNDECIDED, 5: UNDECIDED, 6: "supported"
    }  # fmt: skip
    [reach] = found[2].parts
    for setup in ("one recipe, 700 steps", "one recipe, 3,000 steps", "each at its own best rate, 3,000 steps"):
        assert f"{setup}: kit - local +0.3" in evidence_of(reach)
    assert re.search(r"95 % interval \[\+0\.\d+, \+0\.\d+\]", evidence_of(reach))
    assert "5 seeds, 12 images, which detect 0.02 dB or more with 80 % power" in evidence_of(reach)
    assert len(reach.runs) == 20
    assert reach.command == ""
    recall, retrieval, neighbours = found[3].parts
    assert (retrieval.verdict, neighbours.verdict) == ("supported", "supported")
    assert "each at its own best rate, 3,000 steps: kit - kit-k1 +0.1" in evidence_of(neighbours)
    assert recall.words == "not decided: no interval over seeds"  # every seed the same
    assert recall.figure == "recall minus chance, mean of levels, 0.600, 5 seeds"
    assert evidence_of(recall) == (
        "3,000 steps, 5 seeds: of the 3 neighbours besides itself, at level 1 recall 0.700 (random patches 0.100), 20% touch the "
        "query patch, median distance 5 patches; at level 2 recall 0.900 (random patches 0.300), 40% touch the query "
        "patch, median distance 2 patches; on 20 degraded crops of 5 images (Set_A, Validation_A with σ25), at most "
        "256 px"
    )
    operations, measured = found[4].parts[3:]
    assert operations.words == "supported (by construction)"
    assert found[1].parts[1].by_construction
    assert found[6].parts[0].by_construction
    assert measured.words == "supported"
    assert "time 1.00" in evidence_of(measured)
    assert "memory 1.00 ± 0.00 (4 sizes from 64 to 512 px)" in evidence_of(measured)
    assert measured.runs == ("sweep abcdef0123",)
    assert re.fullmatch(
        r"kit - local \+0\.30\d dB \[\+0\.2\d+, \+0\.3\d+\], 3,000 steps, 5 seeds; adjusted p of all 4 setups [\d.]+e-\d+",
        reach.figure,
    )
    assert measured.figure == "exponent of memory 1.00 ± 0.00, time 1.00 ± 0.00"
    assert found[6].parts[0].figure == "ratio 1 at 64 px and 64 at 512 px"
    assert found[5].parts[0].figure.startswith("kit - global +0.5")
    assert found[5].parts[1].figure == ""  # no runs of deblurring


def test_recall_and_reach_are_decided_by_what_several_seeds_measured(tmp_path: Path) -> None:
    for adjacent, words in (
        (0.3, "supported"), (0.48, "not decided: the interval holds the bound"), (0.6, "not supported")
    ):  # fmt: skip
        for seed in range(5):
            runs(tmp_path / words, {"kit": 0.0}, seeds=(seed,), notes=retrieval(seed, adjacent))
        found = page(tmp_path / words)
        assert found[3].parts[0].words == "supported"
        assert found[4].parts[0].words == words
        assert bool(found[4].parts[0].command) == words.startswith("not decided")
    half = 2.776 * 0.01 * np.sqrt(2.5) / np.sqrt(5)  # Student, 4 degrees of freedom; the spread of 0, .01, ... .04
    assert (
        f"share beyond, mean over levels, 95 % interval over seeds [{0.38 - half:+.3f}, {0.38 + half:+.3f}]"
        in evidence_of(found[4].parts[0])
    )


def test_what_was_measured_on_one_clean_image_decides_nothing(tmp_path: Path) -> None:
    for seed in range(3):
        runs(tmp_path, {"kit": 0.0}, seeds=(seed,), notes={"bottom": {"recall": 0.9 + 0.01 * seed, "chance": 0.1}})
    recall = page(tmp_path)[3].parts[0]
    assert "on one clean image only; train them again" in recall.words
    assert evidence_of(recall) == ""


def test_claims_that_the_numbers_contradict_are_not_supported(tmp_path: Path) -> None:
    everything(tmp_path / "runs", {"kit": 0.0, "window": 0.3, "local": 0.2, "global": 0.4, "kit-random": 0.1})
    sweep(tmp_path / "scale", {"kit": 1.4, "window": 1.0, "global": 1.0})
    found = page(tmp_path / "runs", tmp_path / "scale")
    assert {n for n, c in found.items() if c.verdict == "not supported"} == {1, 2, 3, 4, 6}
    assert found[5].verdict == UNDECIDED


def test_a_sweep_beside_folders_of_runs_does_not_hide_them(tmp_path: Path) -> None:
    sweep(tmp_path / "scale", {"kit": 1.0, "window": 1.0, "global": 2.0})
    assert load([tmp_path])[0] == []
    runs(tmp_path / "folders" / "runs", GOOD)
    assert load([tmp_path])[0] == []
    runs(tmp_path / "runs", GOOD)
    with pytest.raises(InputError, match=r"give .*/runs, which has some\."):
        load([tmp_path])


def test_one_recipe_of_one_length_decides_nothing_about_quality(tmp_path: Path) -> None:
    for claim in page(runs(tmp_path / "runs", GOOD)).values():
        for part in claim.parts:
            assert part.verdict == UNDECIDED
    assert part.command
    [reach] = page(tmp_path / "runs")[2].parts
    assert reach.words == (
        "not decided: only one recipe was compared (run `kitbench tune`) and only one length of training was run"
    )
    assert re.search(r"adjusted p of kit - local: 1\.\d+e-07", evidence_of(reach))  # however small
    assert reach.command.startswith("python -m kitbench tune --suite denoise --preset quick")


def test_each_task_of_the_paper_needs_runs_of_its_own_protocol(tmp_path: Path) -> None:
    deblur = {"of": loading.load_suite("deblur", "quick"), "protocol": "blur-rgb8-ssim3d", "sigma": None}
    long = (FULL_STEPS, 3 * FULL_STEPS)
    found = page(
        everything(tmp_path / "denoise", GOOD, long),
        everything(tmp_path / "deblur", GOOD | {"kit": -0.5}, long, **deblur),
    )
    tasks = ("denoising", "deblurring", "deraining")
    parts = {task: part for task in tasks for part in found[5].parts if task in part.question}
    assert [parts[task].verdict for task in tasks] == ["supported", "not supported", UNDECIDED]
    assert "--suite derain --preset full" in parts["deraining"].command
    assert found[5].verdict == "not supported"
    assert found[2].verdict == "supported"  # by the denoising runs
    [reach] = found[2].parts
    assert reach.question.startswith("On denoising, does reaching beyond")
    [told] = [
        fact
        for fact in reach.facts
        if fact.startswith("elsewhere, no part of this verdict: deblurring, one recipe, 300,000")
    ]
    assert re.search(r"kit - local -0\.\d+ dB, p .*, \d seeds", told)
    runs(tmp_path / "deblur", GOOD, steps=FULL_STEPS, **(deblur | {"protocol": "blur-rgb8-ssim3d-tile"}))
    with pytest.raises(InputError, match="Rows of different protocols"):
        page(tmp_path / "deblur")
    assert len(claims(*load([tmp_path / "denoise", tmp_path / "deblur"]), "blur-rgb8-ssim3d")) == 6


def test_other_images_and_backbones_of_the_task_are_told_beside_a_verdict_and_no_part_of_it(tmp_path: Path) -> None:
    """One verdict was printed alone while gray pictures, in the same folders, said the contrary."""
    alone = page(everything(tmp_path / "runs", GOOD))[2].parts[0]
    contrary = GOOD | {"kit": -0.5}
    runs(tmp_path / "gray", contrary, mode="gray", data_set="Set_G")
    wide = QUICK.model_copy(update={"backbone": QUICK.backbone.model_copy(update={"width": 32})})
    runs(tmp_path / "wide", contrary, range(1), of=wide)
    [reach] = page(*(tmp_path / name for name in ("runs", "gray", "wide")))[2].parts
    assert (reach.verdict, reach.runs, reach.facts[: len(alone.facts)]) == (alone.verdict, alone.runs, alone.facts)
    other, gray = reach.facts[len(alone.facts) :]
    start = "elsewhere, no part of this verdict: denoising, "
    assert re.fullmatch(
        start + r"gray images \(Set_G\), one recipe, .* steps: kit - local -0\.[67]\d\d dB, p .*, 5 seeds", gray
    )
    assert re.fullmatch(
        start + r"another backbone \(Set_A\), one recipe, .* steps: kit - local -0\.[67]\d\d dB, 1 seed", other
    )


def test_only_a_long_recipe_speaks_of_the_state_of_the_art(tmp_path: Path) -> None:
    short = page(everything(tmp_path / "short", GOOD))[5].parts[0]
    assert short.words == "not decided: 3,000 steps of training say nothing of the state of the art"
    long = everything(tmp_path / "long", GOOD | {"window": 0.5}, (100_000, 300_000))
    assert page(long)[5].parts[0].verdict == UNDECIDED  # not better than every other attention
    everything(tmp_path / "better", GOOD, (100_000, 300_000))
    assert page(tmp_path / "better")[5].parts[0].verdict == "supported"
    others = {method: gain for method, gain in GOOD.items() if method != "local"}
    everything(tmp_path / "mixed", {"kit": 0.5, "local": 0.2})
    everything(tmp_path / "mixed", others, (100_000, 300_000))
    mixed = page(tmp_path / "mixed")
    assert mixed[2].verdict == "supported"  # KiT and local attention, after 3,000 steps
    assert mixed[5].parts[0].words == "not decided: 3,000 steps of training say nothing of the state of the art"
    assert "--preset full" in mixed[5].parts[0].command


@pytest.mark.parametrize("what", ["one seed", "no difference", "one length", "smoke", "nothing"])
def test_what_is_not_decided_names_a_command_that_would_decide_it(tmp_path: Path, what: str) -> None:
    if what == "nothing":
        sweep(tmp_path / "runs", {"window": 1.0})
    elif what == "smoke":
        runs(tmp_path / "runs", GOOD, of=loading.load_suite("denoise", "smoke"))
    else:
        gains = GOOD if what == "one seed" else dict.fromkeys(GOOD, 0.0)
        everything(tmp_path / "runs", gains, (700,) if what == "one length" else (700, 3000))
        if what == "one seed":
            for folder in (tmp_path / "runs").glob("*-s[1-9]-*"):
                shutil.rmtree(folder)
    found = page(tmp_path / "runs")
    assert {claim.verdict for claim in found.values()} == {UNDECIDED}
    for claim in found.values():
        for part in claim.parts:
            assert part.reason
            words = shlex.split(part.command, comments=True)
            assert words[:3] == ["python", "-m", "kitbench"]
            assert "smoke" not in words
            context = cli.commands[words[3]].make_context(words[3], words[4:])  # raises for an unknown option
            if words[3] == "run":
                options = context.params
                loading.load_suite(options["suite"], options["preset"], options["overrides"], options["method"])
    [reach] = found[2].parts
    if what == "smoke":
        assert reach.words == "not decided: only smoke runs are stored, which settle no claim"
        assert found[3].parts[0].words == reach.words  # what they noted of their retrieval settles none either
    if what == "one length":
        assert "--set recipe.steps=2800" in reach.command


def test_variants_are_named_and_do_not_hide_the_default(tmp_path: Path) -> None:
    everything(tmp_path / "runs", GOOD)
    runs(tmp_path / "runs", {"kit": -1.0}, steps=700, settings={"k": 8}, changed=["k"])
    [reach] = page(tmp_path / "runs")[2].parts
    assert reach.verdict == "supported"
    assert evidence_of(reach).endswith("; left out, not the default settings: kit (k 8)")


def test_a_difference_that_would_print_as_zero_is_printed(tmp_path: Path) -> None:
    for number, method in enumerate(("kit", "local")):
        for seed in (0, 1):
            noise = 1e-4 * np.random.default_rng((seed, number)).standard_normal(12)
            store(tmp_path, method, 30 + np.linspace(-3, 3, 12) + 2e-4 * number + noise, seed, of=QUICK)
    [reach] = page(tmp_path)[2].parts
    assert re.search(r"kit - local -\de-04 dB", evidence_of(reach))
    assert not re.search(r" [-+]?0\.00+ dB", evidence_of(reach))


def test_runs_on_ones_own_folders_need_no_data(tmp_path: Path) -> None:
    command = ("kitbench", "run", "--suite", "denoise", "--train-set", "./mine", "--test-set", "./held")
    for folder in find([runs(tmp_path, GOOD, data_set="./held")]):
        environment = ENVIRONMENT.model_copy(update={"command": command})
        folder.write(
            "run.json", folder.run.model_copy(update={"environment": environment, "train_sets": {"./mine": "aa"}})
        )
    [reach] = page(tmp_path)[2].parts
    assert "--train-set ./mine --test-set ./held" in reach.command
    assert reach.command.endswith(" --out OUT")
    assert "--data" not in reach.command


def test_runs_at_own_rates_are_marked_where_another_torch_made_them(tmp_path: Path) -> None:
    """They lie in another block than the runs that they are compared with."""
    out = everything(tmp_path / "runs", GOOD)
    for length in (700, 3000):
        record = read_record(Tuning, out / f"tuning-{length}.json")
        more = [Trial(method=m, lr=1e-2, psnr_db=29 + 2 * (m == "kit"), key=f"{m}{length}'") for m in GOOD]
        changes = {"best": record.best | {"kit": 1e-2}, "trials": (*record.trials, *more), "rates": (LR, 1e-2)}
        RunFolder(out).write(f"tuning-{length}.json", record.model_copy(update=changes))
        for folder in find([runs(tmp_path / f"tuned-{length}", {"kit": 0.5}, steps=length, lr=1e-2)]):
            other = ENVIRONMENT.model_copy(update={"versions": {"torch": "9.9"}})
            folder.write("run.json", folder.run.model_copy(update={"environment": other}))
    [reach] = page(out, tmp_path / "tuned-700", tmp_path / "tuned-3000")[2].parts
    assert reach.verdict == "supported"
    assert "runs of kit were made differently from most: torch 9.9 instead of 2" in evidence_of(reach)


def test_the_command_prints_and_writes_all_six(kitbench: Kitbench, tmp_path: Path) -> None:
    runs(tmp_path / "runs", {"kit": 0.0, "conv": 0.0}, seeds=(0,))
    text = kitbench("claims", "runs").stdout
    assert re.findall(r"^## (\d)\.", text, re.MULTILINE) == list("123456")
    kitbench("claims", "runs", "--out", "claims.md")
    assert (tmp_path / "claims.md").read_text() == text
    brief = kitbench("claims", "runs", "--brief").stdout
    assert brief in text
    assert re.findall(r"^\| \*\*(\d)\.", brief, re.MULTILINE) == list("123456")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "scale.json").write_text("{}")
    assert "is not a sweep" in kitbench("claims", "bad", code=2).stderr
    assert "is not a folder" in kitbench("claims", "nowhere", code=2).stderr


def test_every_variant_of_the_ablation_changes_one_setting_of_kit() -> None:
    from kitbench.model import methods

    for preset in ("smoke", "quick", "full"):
        chosen = loading.load_suite("ablate", preset)
        resolved = {n: methods.load_method(m.attention, n).resolve(m.settings) for n, m in chosen.methods.items()}
        base = resolved.pop("kit")
        for name, settings in resolved.items():
            changed = {key for key in settings if settings[key] != base[key]} - {"size"}
            assert len(changed) == (0 if name in ("kit-unshifted", "kit-random") else 1), (preset, name, changed)
