"""What README.md and the pages in results/ say of denoising."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import scipy.stats

from kitbench.spec.suite import Backbone
from kitbench.store.folder import find
from kitbench.verdict.against import against_sheets
from kitbench.verdict.compare import compare
from kitbench.verdict.contrasts import blocks
from kitbench.verdict.entries import entries
from tests.conftest import ROOT
from tests.statements.stored import (
    GRAY,
    MORE,
    REFERENCE,
    RESULTS,
    SEEDS,
    SETS,
    TUNED,
    gaps,
    mean,
    says,
    scores,
    up,
)

ATTENTIONS = ("window", "local", "kit")


def test_the_main_methods_of_denoising_lie_close_together() -> None:
    means = {name: mean(name, "CBSD68", SEEDS) for name in ("conv", "window", "kit")}
    spread = max(means.values()) - min(means.values())
    for page in ("README.md", RESULTS):
        says(page, f"within {up(spread)} dB of one another")
    attentions = ("window", "kit", "kit-random", "local", "global")
    assert max(mean(name, "CBSD68", SEEDS) for name in attentions) < means["conv"]
    kodak = max(mean(name, "Kodak24", SETS) for name in ("window", "kit")) - mean("conv", "Kodak24", SETS)
    says(RESULTS, f"no attention lay above it on CBSD68, or more than {up(kodak)} dB above it on Kodak24, in the mean")


def test_windows_lie_above_no_attention_on_mcmaster_in_every_seed() -> None:
    found = gaps(scores("window", "McMaster", SETS), scores("conv", "McMaster", SETS))
    assert min(found) > 0
    assert len(found) == 5
    says(
        RESULTS,
        f"on McMaster they were {fmean(found):.2f} dB above it in the mean, and above it in each "
        f"of five seeds (by {min(found):.2f} to {max(found):.2f};",
    )
    says("README.md", f"windows lie {fmean(found):.2f} dB above `conv` in the mean")


def test_the_nearest_patches_lie_above_random_ones_in_every_seed_and_are_not_decided_to() -> None:
    kit, far = (scores(name, "CBSD68", SEEDS, MORE) for name in ("kit", "kit-random"))
    own_far = scores("kit-random", "CBSD68", TUNED, lr=0.004)
    one, own = gaps(kit, far), gaps(kit, own_far)
    assert min(*one, *own) > 0
    assert (len(one), len(own)) == (9, 6)
    both = f"by {fmean(one):.2f} dB in the mean over nine seeds, in each of them, and by {fmean(own):.2f} dB where"
    says(RESULTS, f"restored better than random ones after 24,000 steps**: {both} random patches have their own best")
    new = [one[5:], own[3:]]
    p = [scipy.stats.ttest_1samp(gained, 0).pvalue for gained in new]
    says(
        RESULTS,
        f"by {fmean(new[0]):.2f} dB (one recipe, p {p[0]:.3f}) and by {fmean(new[1]):.2f} dB (best rates, three seeds, "
        f"p {p[1]:.2f})",
    )
    says(
        "README.md",
        f"by {fmean(one):.2f} dB after 24,000 steps (nine of nine seeds), and by {fmean(own):.2f} dB where random patches "
        "have their own best learning rate (six of six), but three seeds after 3,000 steps do not show it",
    )
    short = gaps(*(scores(name, "CBSD68", "ablate-standard-cbsd68-cpu") for name in ("kit", "kit-random")))
    assert [gap < 0 for gap in short] == [False, True, False]
    says(RESULTS, "after 3,000 steps three seeds, one of which has the other sign, do not show it")
    page = (ROOT / "results" / "claims.md").read_text("utf-8")
    [verdict] = re.findall(r"as many random ones\? \*\*(.*?)\.?\*\*", page)
    assert verdict == "Not decided: no runs of each at its own best rate, 3,000 steps (run `kitbench tune`)"


def lengths(folders: Iterable[Path], backbone: Backbone) -> set[int]:
    """Steps after which two methods or more have three seeds on CBSD68, in tiles of 256 px."""
    seeds: dict[tuple[str, int], dict[str, set[int | None]]] = {}
    for stored in find(list(folders)):
        run = stored.run
        if run.backbone == backbone and ("CBSD68", 25.0, "awgn8-tile.v1") in {
            (e.data_set, e.sigma, e.stamp) for e in stored.evaluations()
        }:
            assert run.recipe is not None
            seeds.setdefault((run.comparison, run.recipe.steps), {}).setdefault(run.method, set()).add(run.seed)
    return {steps for (_, steps), of in seeds.items() if sum(len(found) >= 3 for found in of.values()) >= 2}


def test_the_statements_are_put_to_every_length_that_was_run_with_three_seeds() -> None:
    """A verdict must not hang on which of the stored runs are given."""
    page = (ROOT / "results" / "claims.md").read_text("utf-8")
    [listed] = re.findall(r"made by: python -m kitbench claims (.*?) -->", page)
    given = [ROOT / folder for folder in listed.split() if any((ROOT / folder).glob("*/run.json"))]
    backbone = next(run.run.backbone for run in find([REFERENCE / SEEDS]) if run.run.method == "kit")
    assert backbone is not None
    stored = [folder for folder in REFERENCE.iterdir() if any(folder.glob("*/run.json"))]
    assert lengths(given, backbone) == lengths(stored, backbone) == {700, 3000, 24_000}


def test_on_gray_pictures_the_nearest_patches_gain_nothing_over_random_ones() -> None:
    places = [(name, sigma) for name in ("BSD68", "Set12") for sigma in (15, 25, 50)]

    def of(method: str, seed: str) -> list[float]:
        return [scores(method, name, GRAY, sigma=sigma)[seed] for name, sigma in places]

    gains = [[a - b for a, b in zip(of("kit", s), of("kit-random", s), strict=True)] for s in "012"]
    means = [fmean(column) for column in zip(*gains, strict=True)]
    below = [sum(gain < 0 for gain in column) for column in gains]
    says(
        RESULTS,
        f"they lie {min(means):+.2f} to {max(means):+.2f} dB above them in the mean over three seeds, below them in "
        f"{below[0]}, {below[1]} and {below[2]} of the six columns in seeds 0, 1 and 2",
    )
    [block] = blocks(entries(find([REFERENCE / GRAY]), None))
    column = "BSD68", "σ25"
    both = ({column: block.methods[name][column]} for name in ("kit", "kit-random"))
    one = compare("kit", "kit-random", *both)
    assert one is not None
    assert one.found.interval is not None
    low, high = one.found.interval.low, one.found.interval.high
    says(RESULTS, f"on BSD68 at sigma 25 the 95 % interval is [{low:+.2f}, {high:+.2f}]")
    says(RESULTS, f"(BSD68, sigma 25: 95 % interval [{low:+.2f}, {high:+.2f}], three seeds)")


def test_on_gray_pictures_no_attention_lies_above_none_but_on_set12() -> None:
    found: dict[tuple[str, float], list[list[float]]] = {}
    for name, sigma in itertools.product(("BSD68", "Set12"), (15, 25, 50)):
        none = scores("conv", name, GRAY, sigma=sigma)
        found[name, sigma] = [gaps(scores(m, name, GRAY, sigma=sigma), none) for m in ("kit", "window", "kit-random")]
    assert {len(gained) for column in found.values() for gained in column} == {3}
    large = [gain for (name, _), column in found.items() if name == "BSD68" for gained in column for gain in gained]
    assert max(large) < 0
    says(
        RESULTS,
        f"On the 68 pictures of BSD68 `conv` lies above KiT, windows and random patches in each of three seeds, by "
        f"{-max(large):.2f} to {-min(large):.2f} dB",
    )
    says("README.md", f"lie {-max(large):.2f} to {-min(large):.2f} dB below `conv` on BSD68, in each seed")
    few = {sigma: [gain for gained in found["Set12", sigma] for gain in gained] for sigma in (15, 25, 50)}
    assert max(few[50]) < 0
    assert all(min(few[sigma]) < 0 < max(few[sigma]) for sigma in (15, 25))
    says(RESULTS, "on the 12 of Set12 at sigma 50 too, while at 15 and 25 the order changes with the seed")
    [sheet] = against_sheets(find([REFERENCE / GRAY]), "conv")
    cells = [cell for _, *line in sheet.lines for cell in line]
    assert not [cell for cell in cells if "**" in cell]
    says(RESULTS, f"None of these differences from `conv` is decided (`table --against conv`: {len(cells)} of them)")


def test_what_the_learning_rate_and_the_length_of_training_move() -> None:
    record = json.loads((REFERENCE / TUNED / "tuning-denoise-standard-colour-24000.json").read_text())
    tried = {(trial["method"], trial["lr"]): trial["psnr_db"] for trial in record["trials"] if trial["psnr_db"]}
    moved = [abs(tried[name, 2 * rate] - psnr) for (name, rate), psnr in tried.items() if (name, 2 * rate) in tried]
    says(RESULTS, f"twice the rate moved a method by up to {max(moved):.1f} dB in denoising after 24,000")
    names = ("conv", "kit", "window", "local", "kit-random")
    short = {name: mean(name, "CBSD68", "denoise-cbsd68-cpu", lr=0.005) for name in names}
    long = {name: mean(name, "CBSD68", SEEDS) for name in names}
    assert (min(short, key=short.__getitem__), max(long, key=long.__getitem__)) == ("conv", "conv")
    says(RESULTS, "on CBSD68 `conv` is last after the 700 steps of the recipe `quick`")


def test_wider_tiles_put_kit_behind_windows() -> None:
    found: dict[str, list[float]] = {}
    for protocol in ("awgn8-tile64.v1", "awgn8-tile128.v1", "awgn8-tile256.v1", "awgn8.v1"):
        for run in find([REFERENCE / "pools-cpu"]):
            found.setdefault(run.run.method, []).extend(
                scored.mean_psnr for scored in run.evaluations() if scored.stamp == protocol
            )
    apart = [kit - window for kit, window in zip(found["kit"], found["window"], strict=True)]
    says(
        RESULTS,
        f"KiT of seed 0 is level with windows ({apart[0]:+.3f} dB); in tiles of 128 and 256 px and on whole pictures it "
        f"lies {-apart[1]:.3f}, {-apart[2]:.3f} and {-apart[3]:.3f} dB below them",
    )


def test_the_lead_of_attention_over_none_does_not_last() -> None:
    early = "denoise-standard-3000-cpu"
    lead = {name: gaps(scores(name, "CBSD68", early), scores("conv", "CBSD68", early)) for name in ATTENTIONS}
    late = {name: mean(name, "CBSD68", SEEDS) - mean("conv", "CBSD68", SEEDS) for name in ATTENTIONS}
    assert max(late.values()) < 0 < min(gain for [gain] in lead.values())
    [window], [local], [kit] = lead.values()
    assert abs(window - local) < 0.005
    lagging, scaled = (scores("kit", "CBSD68", folder)["0"] for folder in ("denoise-standard-ema-cpu", early))
    says(
        RESULTS,
        f"windows and local attention lie {window:.2f} dB above `conv` and KiT {kit:.2f} (seed 0)",
        f"KiT would have scored {lagging:.2f} dB after 3,000 steps in place of {scaled:.2f}",
    )


def test_the_gain_over_random_patches_does_not_come_from_wide_tiles() -> None:
    stamps = ("awgn8-tile64.v1", "awgn8-tile128.v1", "awgn8-tile256.v1", "awgn8.v1")
    found = {
        run.run.method: {scored.stamp: scored.mean_psnr for scored in run.evaluations()}
        for run in find([REFERENCE / "pools-cpu"])
    }
    below = [found["kit"][stamp] - found["kit-random"][stamp] for stamp in stamps]
    lost = {name: found[name][stamps[0]] - found[name][stamps[-1]] for name in ("kit", "kit-random")}
    conv = [found["conv"][stamp] for stamp in stamps]
    assert abs(found["global"][stamps[0]] - conv[0]) < 0.005
    assert all(
        none >= found[name][stamp] for none, stamp in zip(conv, stamps, strict=True) for name in ("kit", "window")
    )
    says(
        RESULTS,
        f"in tiles of 64 px it is {below[0]:.2f} dB, in those of 256 px {below[2]:.2f} (seed 0)",
        f"Random patches lie {min(below):.2f} to {max(below):.2f} dB below KiT in tiles of every size",
        f"KiT lost {lost['kit']:.2f} dB that way and random patches {lost['kit-random']:.2f}",
        f"and `conv` by {up(max(conv) - min(conv))}.",
    )


def test_on_gray_pictures_no_attention_leads_in_narrow_tiles_too() -> None:
    means: dict[tuple[str, float], float] = {}
    for run in find([REFERENCE / "pools-gray-cpu"]):
        assert run.run.seed == 2
        for one in run.evaluations():
            if one.stamp.startswith("awgn8-tile64."):
                assert one.sigma is not None
                means[run.run.method, one.sigma] = one.mean_psnr
    above = [means["conv", sigma] - means[name, sigma] for name in ("kit", "window") for sigma in (15, 25, 50)]
    assert min(above) > 0
    says(
        RESULTS,
        f"`conv` lies above KiT and windows on BSD68 too, by {min(above):.2f} to {max(above):.2f} dB (seed 2, "
        "`pools-gray-cpu`)",
    )
