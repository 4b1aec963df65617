"""Figures in the prose of README.md and results/README.md, computed from the stored runs that they are about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from statistics import fmean, median

from kitbench.store.folder import find
from kitbench.store.sweeps import Sweep
from kitbench.verdict.anchors import anchors
from kitbench.verdict.contrasts import blocks, compare_methods
from kitbench.verdict.entries import entries
from kitbench.verdict.rows import rows
from kitbench.verdict.scaling.fit import exponent
from tests.conftest import ROOT

REFERENCE = ROOT / "results" / "reference"
SEEDS, MORE, TUNED = "denoise-standard-seeds-cpu", "denoise-standard-more-seeds-cpu", "denoise-standard-tuned-cpu"
SETS, REACH, GRAY = "denoise-standard-sets-seeds-cpu", "reach-standard-cpu", "denoise-standard-gray-cpu"
RAIN, SHAKE = "derain-standard-rain100l-cpu", "deblur-standard-levin09-cpu"
CAMERA, SHORT_CAMERA = "denoise-real-standard-cc15-cpu", "denoise-real-cc15-cpu"
LR, SHORT_LR = 0.002, 0.005
"""Of the recipes `standard` and `reach`; of `quick`."""
Scores = Mapping[str, float]
"""Mean PSNR over the images of a set, dB, by seed."""


@cache
def stored(folder: str) -> dict[tuple[str, str, float | None, float], dict[str, float]]:
    """Scores of a folder of stored runs, by method, test set, sigma and learning rate (0: not trained)."""
    found: dict[tuple[str, str, float | None, float], dict[str, float]] = {}
    for entry in entries(find([REFERENCE / folder]), None):
        run, scored = entry.run, entry.evaluation
        place = (run.method, scored.data_set, scored.sigma, run.recipe.lr if run.recipe else 0.0)
        found.setdefault(place, {})[str(run.seed)] = scored.mean_psnr
    return found


def scores(method: str, data_set: str, *folders: str, sigma: float | None = 25, lr: float = LR) -> dict[str, float]:
    """Of all seeds in these folders."""
    return {s: v for folder in folders for s, v in stored(folder).get((method, data_set, sigma, lr), {}).items()}


def mean(*of: object, **chosen: object) -> float:
    """The mean of `scores` over seeds, dB."""
    return fmean(scores(*of, **chosen).values())  # type: ignore[arg-type]


def gaps(a: Scores, b: Scores) -> list[float]:
    """a - b in dB, of the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def says(page: str, *sentences: str) -> None:
    """Fails unless the page contains each of these texts, wherever its lines break."""
    text = " ".join((ROOT / page).read_text("utf-8").split())
    for sentence in sentences:
        assert sentence in text, f"{page} does not say: {sentence}"


def up(value: float) -> str:
    """To hundredths, upwards: for a bound."""
    return f"{math.ceil(100 * value) / 100:.2f}"


def test_the_main_methods_of_denoising_lie_close_together() -> None:
    means = {name: mean(name, "CBSD68", SEEDS) for name in ("conv", "window", "kit")}
    spread = max(means.values()) - min(means.values())
    for page in ("README.md", "results/README.md"):
        says(page, f"within {up(spread)} dB of one another")
    others = [means[name] - means["conv"] for name in ("window", "kit")]
    long = {name: mean(name, "CBSD68", REACH) for name in ("conv", "window", "kit")}
    others += [long[name] - long["conv"] for name in ("window", "kit")]
    kodak = max(mean(name, "Kodak24", SETS) for name in ("window", "kit")) - mean("conv", "Kodak24", SETS)
    says(
        "results/README.md",
        f"no attention was more than {up(max(others))} dB above it on CBSD68, or {up(kodak)} dB on Kodak24",
    )


def test_windows_lie_above_no_attention_on_mcmaster_in_every_seed() -> None:
    found = gaps(scores("window", "McMaster", SETS), scores("conv", "McMaster", SETS))
    assert min(found) > 0
    assert len(found) == 5
    says("results/README.md", f"on McMaster they were {fmean(found):.2f} dB above it, in all of five seeds")
    says("README.md", f"windows lie {fmean(found):.2f} dB above `conv` in the mean")


def test_the_nearest_patches_lie_above_random_ones_in_every_seed() -> None:
    one = gaps(scores("kit", "CBSD68", SEEDS, MORE), scores("kit-random", "CBSD68", SEEDS, MORE))
    own = gaps(scores("kit", "CBSD68", SEEDS, MORE), scores("kit-random", "CBSD68", TUNED, lr=0.004))
    assert min(*one, *own) > 0
    assert (len(one), len(own)) == (9, 6)
    page = (ROOT / "results" / "README.md").read_text("utf-8")
    [adjusted] = {float(p) for p in re.findall(r"Adjusted p of kit - kit-random: ([0-9.]+),", page)}  # from `claims`
    says(
        "results/README.md",
        f"by {fmean(one):.2f} dB after 24,000 steps (nine of nine seeds, adjusted p {adjusted:.3f})",
        f"the adjusted p of {adjusted:.3f}, doubled, is {2 * adjusted:.3f}",
    )
    says(
        "README.md",
        f"by {fmean(one):.2f} dB with one recipe (nine seeds) and {fmean(own):.2f} dB with each at its own best learning rate (six seeds)",
    )


def test_on_gray_pictures_the_nearest_patches_gain_nothing_over_random_ones() -> None:
    places = [(name, sigma) for name in ("BSD68", "Set12") for sigma in (15, 25, 50)]

    def of(method: str, seed: str) -> list[float]:
        return [scores(method, name, GRAY, sigma=sigma)[seed] for name, sigma in places]

    others = zip(*(of(name, "0") for name in ("window", "kit", "kit-random")), strict=True)
    assert all(none > max(column) for none, column in zip(of("conv", "0"), others, strict=True))
    gains = {s: [a - b for a, b in zip(of("kit", s), of("kit-random", s), strict=True)] for s in ("0", "1")}
    below = {seed: sum(gain < 0 for gain in found) for seed, found in gains.items()}
    assert below == {"0": 6, "1": 2}
    means = [fmean(pair) for pair in zip(*gains.values(), strict=True)]
    says(
        "results/README.md", f"they lie {min(means):+.2f} to {max(means):+.2f} dB above them in the mean over two seeds"
    )


def by_image(folder: str, method: str, data_set: str) -> dict[str, dict[str, float]]:
    """PSNR in dB by image, then by seed."""
    found: dict[str, dict[str, float]] = {}
    for entry in entries(find([REFERENCE / folder]), None):
        if (entry.run.method, entry.evaluation.data_set) == (method, data_set):
            for score in entry.evaluation.scores:
                found.setdefault(score.image, {})[str(entry.run.seed)] = score.psnr
    return found


def image_gains(folder: str, method: str, other: str) -> list[float]:
    """How far a method lies above another on each image of a folder's only test set, the mean over its seeds, dB."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in entries(find([REFERENCE / folder]), None):
        for score in entry.evaluation.scores:
            found.setdefault(entry.run.method, {}).setdefault(score.image, []).append(score.psnr)
    return [fmean(found[method][image]) - fmean(found[other][image]) for image in found[method]]


def above_conv(method: str, name: str) -> list[float]:
    """How far a method lies above no attention in the suite `reach`, of every seed: on the images of `Repetition` whose
    name the pattern matches, the mean over images, dB."""
    one, other = (by_image(REACH, of, "Repetition") for of in (method, "conv"))
    found = [gaps(one[image], other[image]) for image in one if re.match(name, image)]
    return [fmean(of_seed) for of_seed in zip(*found, strict=True)]


def test_what_repeated_content_is_worth() -> None:
    page = "results/README.md"
    kit = {period: above_conv("kit", f"periodic-[0-9]+-{period:03}") for period in (16, 32, 64, 128)}
    window = {period: above_conv("window", f"periodic-[0-9]+-{period:03}") for period in kit}
    near = [gain for period in (16, 32, 64) for gain in kit[period]]
    assert {len(gains) for gains in (*kit.values(), *window.values())} == {3}
    for either in (page, "README.md"):
        says(either, f"{min(near):.1f} to {max(near):.1f} dB on textures with periods of 16 to 64 px")
    means = [fmean(gains) for gains in kit.values()]
    says(
        page,
        f"KiT is {means[0]:.2f}, {means[1]:.2f} and {means[2]:.2f} dB at periods of 16, 32 and 64 px, and {means[3]:.2f}",
    )
    says(page, f"where windows gained {max(max(window[period]) for period in (16, 32, 64)):.1f} dB at most")
    far = [gain for period in (32, 64, 128) for gain in window[period]]
    says(
        page,
        f"({fmean(window[16]):.2f} dB above `conv`; random patches {fmean(above_conv('kit-random', 'periodic-[0-9]+-016')):.2f}",
        f"lie {-min(far):.2f} dB below `conv` to {max(far):.2f} above it at longer ones",
    )
    copies = {apart: above_conv("kit", f"copies-[0-9]+-{apart:03}") for apart in (32, 64, 128, 192)}
    one, other = (by_image(REACH, of, "Repetition") for of in ("kit", "conv"))
    assert min(min(gaps(one[image], other[image])) for image in one if image.startswith("copies")) > 0
    shown = [f"{fmean(gains):.2f}" for gains in copies.values()]
    says(page, f"{', '.join(shown[:3])} and {shown[3]} dB at 32, 64, 128 and 192 px")


def test_what_is_gained_on_buildings_and_over_random_patches() -> None:
    page, houses = "results/README.md", "Urban100-centre512"
    kit, window = (gaps(scores(name, houses, REACH), scores("conv", houses, REACH)) for name in ("kit", "window"))
    assert len(kit) == len(window) == 3
    said = [f"{min(gains):.2f} to {max(gains):.2f}" for gains in (kit, window)]
    says(page, f"{said[0]} dB on buildings, where windows gained {said[1]}", f"by {said[1]} and {said[0]} dB")
    says("README.md", f"{said[0]} dB on buildings")
    of = {name: by_image(REACH, name, houses) for name in ("kit", "window", "conv")}
    fewest = min(
        sum(of[name][image][seed] > of["conv"][image][seed] for image in of[name])
        for name in ("kit", "window")
        for seed in "012"
    )
    says(page, f"in {fewest} or more of the 100 pictures")
    level, *more = gaps(scores("kit", houses, REACH), scores("window", houses, REACH))
    assert abs(level) < 0.01
    says(page, f"above them in seeds 1 and 2, by {more[0]:.2f} and {more[1]:.2f} dB")
    sets = (houses, "Repetition", "CBSD68", "Repetition-none")
    apart = [gaps(scores("kit", name, REACH), scores("kit-random", name, REACH)) for name in sets]
    assert all(min(gains) > 0 and len(gains) == 3 for gains in apart)
    shown = [f"{min(gains):.2f} to {max(gains):.2f}" for gains in apart]
    says(page, f"with crops of 128 px, by {shown[0]} dB in three of three seeds")
    says(page, f"{shown[0]} dB on buildings, {shown[1]} on *Repetition*, {shown[2]} on CBSD68 and {shown[3]} without")
    three = [scores(name, "CBSD68", REACH) for name in ("kit", "window", "conv")]
    spread = max(max(one[seed] for one in three) - min(one[seed] for one in three) for seed in "012")
    says(page, f"the three lie within {up(spread)} dB of one another in each seed")


def test_hashing_lost_nothing() -> None:
    sets = {place[1] for place in stored(REACH) if place[0] == "kit"}
    [worst, *_, best] = sorted(
        gap for name in sets for gap in gaps(scores("kit", name, REACH), scores("kit-exact", name, REACH))
    )
    says("results/README.md", f"{worst:.3f} to {best:.3f} dB above it on all four sets")
    found: dict[int, list[float]] = {}
    for run in find([REFERENCE / REACH]):
        if run.run.method == "kit":
            assert run.training is not None
            for place in run.training.notes.values():
                if isinstance(place, dict) and "recall" in place:
                    found.setdefault(place["level"], []).append(100 * place["recall"])
    full, half = (fmean(found[level]) for level in sorted(found))
    says(
        "results/README.md",
        f"it misses {100 - half:.0f} to {100 - full:.0f} % of the nearest patches",
        f"hashing finds only {full:.0f} % (full resolution) and {half:.0f} % (half resolution)",
    )


def test_what_the_learning_rate_and_the_length_of_training_move() -> None:
    record = json.loads((REFERENCE / TUNED / "tuning-denoise-standard-colour-24000.json").read_text())
    tried = {(trial["method"], trial["lr"]): trial["psnr_db"] for trial in record["trials"] if trial["psnr_db"]}
    moved = [abs(tried[name, 2 * rate] - psnr) for (name, rate), psnr in tried.items() if (name, 2 * rate) in tried]
    says("results/README.md", f"twice the rate moved a method by up to {max(moved):.1f} dB after 24,000 steps")
    names = ("conv", "kit", "window", "local", "kit-random")
    short = {name: mean(name, "CBSD68", "denoise-cbsd68-cpu", lr=0.005) for name in names}
    long = {name: mean(name, "CBSD68", SEEDS) for name in names}
    assert (min(short, key=short.__getitem__), max(long, key=long.__getitem__)) == ("conv", "conv")
    says("results/README.md", "on CBSD68 `conv` is last after 700 steps and first after 24,000")


def test_how_near_published_weights_come_to_print() -> None:
    found = anchors(find([REFERENCE / "anchors"]))
    largest = max(abs(anchor.difference) for anchor in found)
    for page in ("results/README.md", "docs/protocols.md"):
        says(page, f"within {largest:.3f} dB")


def test_the_cost_of_kit_in_time() -> None:
    steps: dict[tuple[str, str], list[float]] = {}
    for folder in (SEEDS, REACH, "reach-quick-cpu"):
        for run in find([REFERENCE / folder]):
            if run.training is not None and run.training.cost.step_seconds is not None:
                steps.setdefault((folder, run.run.method), []).append(run.training.cost.step_seconds)
    ratios = [median(steps[folder, "kit"]) / median(steps[folder, "window"]) for folder, name in steps if name == "kit"]
    says("results/README.md", f"takes {min(ratios):.1f} to {max(ratios):.1f} times that of windows")
    points = json.loads((REFERENCE / "scale-cpu" / "scale.json").read_text())["points"]
    time = {(p["method"], p["what"], p["size"]): p["seconds"] for p in points if p["seconds"] and not p["noisy"]}
    alone = [seconds / time["window", *rest] for (name, *rest), seconds in time.items() if name == "kit"]
    says("results/README.md", f"with four times the keys of windows, {min(alone):.0f} to {max(alone):.1f} times")


def above(method: str, other: str) -> list[float]:
    """How far a method lies above another on Rain100L after 24,000 steps, dB, of every seed."""
    return gaps(*(scores(name, "Rain100L", RAIN, sigma=None) for name in (method, other)))


def test_what_attention_is_worth_in_deraining() -> None:
    names = ("window", "kit", "kit-random")
    gains = {name: above(name, "conv") for name in names}
    assert {len(gain) for gain in gains.values()} == {3}
    means = [fmean(gain) for gain in gains.values()]
    least = math.floor(10 * min(min(gain) for gain in gains.values())) / 10
    core = f"{min(means):.1f} to {max(means):.1f} dB above `conv` in the mean over three seeds"
    for page, first in (("README.md", "w"), ("results/README.md", "W")):
        says(
            page,
            f"{first}indows, KiT and random patches lie {core}, within {up(max(means) - min(means))} dB of one another",
        )
    says("results/README.md", f"The others lay above `conv` too, in all three seeds by {least} dB or more")
    higher = sum(gain > 0 for gain in image_gains(RAIN, "window", "conv"))
    says("results/README.md", f"windows lie above `conv` in {higher} of the 100 pictures")
    nearest, far = above("kit", "kit-random"), above("kit", "window")
    says(
        "results/README.md",
        f"the nearest patches lie {-fmean(nearest):.2f} dB below random ones ({min(nearest):+.2f} to {max(nearest):+.2f})",
        f"KiT lies {fmean(far):.2f} dB above windows ({', '.join(f'{gap:+.2f}' for gap in far)} in seeds 0, 1 and 2)",
    )


def test_global_attention_lies_above_all_others_in_deraining() -> None:
    names = ("kit-random", "kit", "window")
    gains = {name: above("global", name) for name in (*names, "conv")}
    assert {len(gain) for gain in gains.values()} == {3}
    [block] = blocks(entries(find([REFERENCE / RAIN]), None))
    means = {name: compare_methods(block, "global", name).found.mean for name in (*gains, "local")}  # scenes count once
    least = math.floor(100 * min(min(gains[name]) for name in names)) / 100
    pictures = min(sum(gain > 0 for gain in image_gains(RAIN, "global", name)) for name in names)
    assert len(above("global", "local")) == 1
    adjusted = rows(find([REFERENCE / RAIN])).set_index("method")["p_holm"]
    says(
        "results/README.md",
        f"{means['kit-random']:.2f} to {means['window']:.2f} dB above random patches, KiT and windows in the mean over "
        f"three seeds, by {least} dB or more in each, in {pictures} or more of the 100 pictures",
        f"and {means['conv']:.2f} dB above `conv`",
        f"(adjusted p {adjusted['conv']:.4f} for `conv`, {min(adjusted[[*names]]):.3f} to {max(adjusted[[*names]]):.3f}",
        f"Above local attention it lies by {means['local']:.2f} dB, in the one seed of that",
        f"first, {math.floor(10 * least) / 10} dB or more above KiT, windows and random patches in each of three seeds",
    )
    says("README.md", f"global attention {math.floor(10 * least) / 10} dB or more above them in each seed")


def in_tiles(method: str, side: int) -> float:
    """PSNR on Rain100L of the weights of seed 0, in tiles of a side in px, dB."""
    [run] = [run for run in find([REFERENCE / "pools-rain-cpu"]) if run.run.method == method]
    [one] = [scored for scored in run.evaluations() if scored.stamp.startswith(f"rain-y8-ssim2d-tile{side}.v1")]
    return one.mean_psnr


def test_global_attention_alone_gains_by_wider_tiles_in_deraining() -> None:
    names = ("conv", "kit", "kit-random", "local", "window")
    assert max(in_tiles(name, 128) - in_tiles(name, 64) for name in names) < 0
    whole = scores("global", "Rain100L", RAIN, sigma=None)["0"]
    assert whole <= in_tiles("global", 128)
    narrow = in_tiles("global", 64)
    says(
        "results/README.md",
        f"gains by wider tiles, {in_tiles('global', 128) - narrow:.2f} dB, and not beyond 128 px",
        f"it still lies {narrow - in_tiles('local', 64):.2f} dB above local attention and "
        f"{narrow - in_tiles('kit', 64):.2f} dB above KiT",
    )


def test_another_rate_does_not_bring_no_attention_up_to_windows_in_deraining() -> None:
    own = scores("conv", "Rain100L", RAIN, sigma=None)["0"]
    others = [mean("conv", "Rain100L", "derain-standard-rates-cpu", sigma=None, lr=lr) for lr in (LR / 2, 2 * LR)]
    assert max(others) < scores("window", "Rain100L", RAIN, sigma=None)["0"]
    said = f"reaches {others[0]:.2f} and {others[1]:.2f} dB, where the recipe's gives {own:.2f} (seed 0"
    says("results/README.md", f"`conv` at half and at twice the rate {said}")
    faster = [mean(name, "Rain100L", "derain-standard-rates-cpu", sigma=None, lr=2 * LR) for name in ("kit", "window")]
    says(
        "results/README.md", f"At twice the rate KiT and windows reach {faster[0]:.2f} and {faster[1]:.2f} dB (seed 0)"
    )


def test_deblurring_tells_nothing_apart() -> None:
    means = [mean(name, "Levin09", SHAKE, sigma=None) for name in ("conv", "kit", "kit-random", "window")]
    gains = [value - mean("input", "Levin09", SHAKE, sigma=None, lr=0.0) for value in means]
    says(
        "results/README.md",
        f"All four lie within {up(max(means) - min(means))} dB of one another, in one seed",
        f"They gain {min(gains):.1f} to {max(gains):.1f} dB over the blurred input",
    )


def test_real_noise_gains_nothing_from_longer_training_on_synthetic_noise() -> None:
    methods = ("conv", "kit", "kit-random", "window")
    lost, means = [], {}
    for name in methods:
        [long] = scores(name, "CC15", CAMERA, sigma=None).values()
        short = scores(name, "CC15", SHORT_CAMERA, sigma=None, lr=SHORT_LR).values()
        assert long < min(short)
        lost.append(fmean(short) - long)
        means[name] = long
    validated = {
        folder.run.method: [line.validation_psnr_db for line in folder.logged() if line.validation_psnr_db]
        for folder in find([REFERENCE / CAMERA])
        if folder.run.method in methods
    }
    last = {name: values[-1] for name, values in validated.items()}
    assert all(values[-1] > max(values) - 0.02 for values in validated.values())  # no method has passed its best
    assert last["kit"] == max(last.values())
    says(
        "results/README.md",
        f"All four lie within {up(max(means.values()) - min(means.values()))} dB of one another, in one seed on 15",
        f"{min(lost):.2f} to {max(lost):.2f} dB below their mean",
        f"to {min(last.values()):.1f} to {max(last.values()):.1f} dB",
        f"On those KiT is first, {last['kit'] - last['conv']:.2f} dB above `conv`; on CC15 it lies "
        f"{means['kit'] - means['conv']:.2f} dB above it",
    )


def test_the_time_of_global_attention_grows_with_the_square_of_the_pixels() -> None:
    sweep = Sweep.model_validate_json((REFERENCE / "scale-global-cpu" / "scale.json").read_bytes())
    points = [point for point in sweep.points if point.seconds is not None and not point.noisy]
    found = exponent(points, lambda point: point.seconds)
    assert found is not None
    assert found.half_width is not None
    sides = sorted(point.size for point in points)
    says(
        "results/README.md",
        f"its time from {sides[0]} to {sides[-1]} px (exponent {found.value:.2f} ± {found.half_width:.2f})",
    )
