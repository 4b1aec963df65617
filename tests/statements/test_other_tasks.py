"""What the pages say of deraining, deblurring and camera noise."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations
from pathlib import Path
from statistics import fmean

from kitbench.store.folder import find
from kitbench.verdict.claims import claims, load
from kitbench.verdict.compare import adjusted
from kitbench.verdict.contrasts import blocks, compare_methods
from kitbench.verdict.entries import entries
from kitbench.verdict.published import published
from kitbench.verdict.rows import rows
from kitbench.verdict.statistics import mean_interval
from tests.conftest import ROOT
from tests.statements.stored import (
    AS_LONG_RAIN,
    CAMERA,
    LR,
    MORE_RAIN,
    RAIN,
    REFERENCE,
    RESULTS,
    SHAKE,
    SHORT_CAMERA,
    SHORT_LR,
    SHORT_RAIN,
    gaps,
    image_gains,
    mean,
    says,
    scores,
    step_ratios,
    time_shares,
    up,
)


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
    for page, first in (("README.md", "w"), (RESULTS, "W")):
        says(
            page,
            f"{first}indows, KiT and random patches lie {core}, within {up(max(means) - min(means))} dB of one another",
        )
    says(RESULTS, f"The others lay above `conv` too, in all three seeds by {least} dB or more")
    [block] = blocks(entries(find([REFERENCE / RAIN]), None))
    pairs = combinations(("conv", "global", "kit", "kit-random", "window"), 2)  # those with three seeds
    told = {(one.a, one.b): one.p_holm or 0.0 for one in adjusted([compare_methods(block, *pair) for pair in pairs])}
    kit, far, window = (told["conv", name] for name in ("kit", "kit-random", "window"))
    assert 0 < far < kit < 0.05 < window
    says(
        RESULTS,
        f"Among all pairs the table tells random patches and KiT from `conv`, adjusted p {far:.3f} and {kit:.3f}, and not "
        f"windows, {window:.3f}",
    )
    against = adjusted([compare_methods(block, name, "conv") for name in ("global", "kit", "kit-random", "window")])
    assert all(one.decided and one.found.mean > 0 for one in against)
    p = [one.p_holm or 0.0 for one in against]
    says(
        RESULTS,
        "**every attention with three seeds restored better than none here**",
        f"with `--against conv`, which asks for fewer differences, it tells all four of them ({min(p):.5f} to {max(p):.3f})",
    )
    higher = sum(gain > 0 for gain in image_gains(RAIN, "window", "conv"))
    says(RESULTS, f"windows lie above `conv` in {higher} of the 100 pictures")
    nearest, far = above("kit", "kit-random"), above("kit", "window")
    says(
        RESULTS,
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
        RESULTS,
        f"{means['kit-random']:.2f} to {means['window']:.2f} dB above random patches, KiT and windows in the mean over "
        f"three seeds, by {least} dB or more in each, in {pictures} or more of the 100 pictures",
        f"and {means['conv']:.2f} dB above `conv`",
        f"(adjusted p {adjusted['conv']:.4f} for `conv`, {min(adjusted[[*names]]):.3f} to {max(adjusted[[*names]]):.3f}",
        f"Above local attention it lies by {means['local']:.2f} dB, in the one seed of that",
        f"first, {math.floor(10 * least) / 10} dB or more above KiT, windows and random patches in each of three seeds",
    )
    validated: dict[str, list[float]] = {}
    for folder in find([REFERENCE / RAIN]):
        steps = [line.validation_psnr_db for line in folder.logged() if line.validation_psnr_db]
        if steps:
            validated.setdefault(folder.run.method, []).append(steps[-1])
    assert min(validated.pop("global")) > max(psnr for found in validated.values() for psnr in found)
    says(RESULTS, "On eight validation crops with streaks of the training's own kind it leads in each seed, too")
    says("README.md", f"global attention {math.floor(10 * least) / 10} dB or more above them in each seed")


def test_how_far_print_lies_above_the_best_row_in_deraining() -> None:
    [printed] = [
        figure.psnr_db
        for model in published()
        for figure in model.figures
        if (model.method, figure.data_set) == ("PReNet", "Rain100L")
    ]
    best = max(
        mean(m, "Rain100L", RAIN, sigma=None) for m in ("conv", "global", "kit", "kit-random", "window", "local")
    )
    says(RESULTS, f"PReNet's printed {printed:.2f} dB are {printed - best:.1f} dB more than the best row here")


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
        RESULTS,
        f"gains by wider tiles, {in_tiles('global', 128) - narrow:.2f} dB, and not beyond 128 px",
        f"it still lies {narrow - in_tiles('local', 64):.2f} dB above local attention and "
        f"{narrow - in_tiles('kit', 64):.2f} dB above KiT",
    )


def test_another_rate_does_not_bring_no_attention_up_to_windows_in_deraining() -> None:
    own = scores("conv", "Rain100L", RAIN, sigma=None)["0"]
    others = [mean("conv", "Rain100L", "derain-standard-rates-cpu", sigma=None, lr=lr) for lr in (LR / 2, 2 * LR)]
    assert max(others) < scores("window", "Rain100L", RAIN, sigma=None)["0"]
    said = f"reaches {others[0]:.2f} and {others[1]:.2f} dB, where the recipe's gives {own:.2f} (seed 0"
    says(RESULTS, f"`conv` at half and at twice the rate {said}")
    faster = [mean(name, "Rain100L", "derain-standard-rates-cpu", sigma=None, lr=2 * LR) for name in ("kit", "window")]
    lost = [
        scores(m, "Rain100L", RAIN, sigma=None)["0"] - psnr for m, psnr in zip(("kit", "window"), faster, strict=True)
    ]
    assert abs(faster[1] - others[1]) < 0.02
    says(
        RESULTS,
        f"On Rain100L, at twice the rate KiT and windows reach {faster[0]:.2f} and {faster[1]:.2f} dB (seed 0)",
        f"windows are level with `conv` and KiT lies {faster[0] - others[1]:.2f} dB above it (seed 0)",
        f"by {fmean(lost):.1f} dB in deraining (KiT and windows, one seed)",
    )


def test_deblurring_tells_nothing_apart() -> None:
    none, *attentions = (mean(name, "Levin09", SHAKE, sigma=None) for name in ("conv", "kit", "kit-random", "window"))
    means = [none, *attentions]
    seeds = len(scores("conv", "Levin09", SHAKE, sigma=None))
    assert seeds == 2
    says(
        "README.md",
        f"| camera shake | `conv` | KiT, windows and random patches at most {up(max(attentions) - none)} dB above `conv` | "
        f"{seeds} |",
    )
    gains = [value - mean("input", "Levin09", SHAKE, sigma=None, lr=0.0) for value in means]
    says(
        RESULTS,
        f"All four lie within {up(max(means) - min(means))} dB of one another in the mean over two seeds",
        f"They gain {min(gains):.1f} to {max(gains):.1f} dB over the blurred input",
    )


def test_real_noise_gains_nothing_from_longer_training_on_synthetic_noise() -> None:
    methods = ("conv", "kit", "kit-random", "window")
    long = {name: scores(name, "CC15", CAMERA, sigma=None) for name in methods}
    assert {tuple(found) for found in long.values()} == {("0", "1", "2")}
    lost, kept = [], []
    for name in methods:
        short = scores(name, "CC15", SHORT_CAMERA, sigma=None, lr=SHORT_LR).values()
        lost += [fmean(short) - value for value in long[name].values() if value < min(short)]
        kept += [name for value in long[name].values() if value >= min(short)]
    assert kept == ["kit-random"]
    above = {name: gaps(long[name], long["conv"]) for name in methods if name != "conv"}
    gains = [gain for gained in above.values() for gain in gained]
    assert min(gains) > 0
    assert sum(far > own for far, own in zip(above["kit-random"], above["window"], strict=True)) == 1
    assert all(own > near for near, own in zip(above["kit"], above["window"], strict=True))
    validated = [
        (run.run.method, [line.validation_psnr_db for line in run.logged() if line.validation_psnr_db])
        for run in find([REFERENCE / CAMERA])
        if run.run.method in methods
    ]
    first, last = [values[0] for _, values in validated], [values[-1] for _, values in validated]
    assert all(values[-1] > max(values) - 0.02 for _, values in validated)  # no run has passed its best
    says(
        RESULTS,
        f"`conv` is the lowest of the four in each of three seeds, by {min(gains):.2f} to {max(gains):.2f} dB; windows lie "
        f"{min(above['window']):.2f} to {max(above['window']):.2f} dB above it, and random patches above windows in one seed",
        f"but for one run of random patches: {min(lost):.2f} to {max(lost):.2f} dB below their means",
        f"rose, from {min(first):.1f} to {max(first):.1f} dB after 1,000 steps to {min(last):.1f} to "
        f"{max(last):.1f} dB at the end",
    )
    says(
        "README.md",
        f"`conv` lowest of four in each seed, by {min(gains):.2f} to {max(gains):.2f} dB on 15 pictures; all fall back",
    )


def test_kit_is_decided_to_be_worse_than_global_attention_in_deraining() -> None:
    pages = [(ROOT / RESULTS / name).read_text("utf-8") for name in ("deraining.md", "claims.md")]
    listed = [re.findall(r"made by: python -m kitbench claims (.*?)(?: --brief)? -->", page)[0] for page in pages]
    assert all({RAIN, MORE_RAIN, SHORT_RAIN} <= {Path(folder).name for folder in given.split()} for given in listed)
    p_values, families = [], []
    for given in listed:
        decided = claims(*load([ROOT / folder for folder in given.split()]))
        facts = " ".join(fact for claim in decided for part in claim.parts for fact in part.facts)
        # The contrast of deraining: that of denoising is 1.
        [(p_value, family)] = set(
            re.findall(r"adjusted p of kit - global: (0\.0[0-9]+), [^;]*?over (\d+) contrasts", facts)
        )
        p_values.append(float(p_value))
        families.append(int(family))
    assert max(p_values) < 0.05
    [long], [short] = (
        blocks(entries(find([REFERENCE / at for at in of]), None)) for of in ((RAIN, MORE_RAIN), (SHORT_RAIN,))
    )
    means = [f"{compare_methods(block, 'global', 'kit').found.mean:.2f}" for block in (long, short)]
    lower = [
        gaps(*(scores(m, "Rain100L", *of, sigma=None) for m in ("global", "kit")))
        for of in ((RAIN, MORE_RAIN), (SHORT_RAIN,))
    ]
    assert all(gap > 0 for gained in lower for gap in gained)
    assert {len(gained) for gained in lower} == {5}
    says(
        RESULTS,
        f"by {means[0]} dB after 24,000 steps and by {means[1]} dB after 12,000, below it in every seed",
        f"KiT lies {means[0]} dB below global attention after 24,000 steps and {means[1]} dB after 12,000 (five "
        f"seeds each, adjusted p {p_values[0]:.3f} over the {families[0]} contrasts of deraining, {p_values[1]:.3f} "
        f"over the {families[1]} of all [statements](claims.md))",
        f"{p_values[1]:.3f}, tripled, is {3 * p_values[1]:.3f}",
    )
    says(
        "README.md",
        f"in deraining KiT restores worse than global attention at equal steps, by {means[0]} dB (five seeds",
    )


def test_at_equal_training_time_the_lead_of_global_attention_in_deraining_is_not_decided() -> None:
    longer = step_ratios(SHORT_RAIN, "global", "kit")
    assert len(longer) == 2
    steps = f"{min(longer):.1f} to {max(longer):.1f} times"
    shares = time_shares((AS_LONG_RAIN, "global"), (RAIN, "kit"))
    late = f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %"
    early = f"{100 * min(shares) * 12 / 14:.0f} to {100 * max(shares) * 12 / 14:.0f} %"
    kit = scores("kit", "Rain100L", RAIN, sigma=None)
    behind = gaps(kit, scores("global", "Rain100L", SHORT_RAIN, sigma=None))
    ahead = gaps(scores("global", "Rain100L", AS_LONG_RAIN, sigma=None), kit)
    assert (len(behind), len(ahead)) == (3, 3)
    assert min(*behind, *ahead) > 0
    interval = mean_interval(ahead)
    assert interval is not None
    assert interval.low < 0
    lead, each = fmean(ahead), [f"{gain:+.2f}" for gain in ahead]
    says(
        RESULTS,
        f"a training step of {steps} KiT's time here",
        f"Trained for 14,000 steps, which take {late} of the time of KiT's 24,000 (by steps timed before training, with or "
        f"without the calibration, or by the median step of the training), global attention lies {lead:.2f} dB above KiT ({each[0]}, {each[1]} and {each[2]} in seeds 0, 1 and 2; 95 % interval over seeds "
        f"[{interval.low:+.2f}, {interval.high:+.2f}]); trained for 12,000, a seventh less, it lies below "
        f"KiT in each of the three seeds, by {fmean(behind):.2f} dB in the mean",
        f"A step of global attention takes {steps} KiT's: at about equal training time it was {lead:.2f} dB ahead, "
        "which three seeds do not decide",
    )
    says(RESULTS, f"it compared KiT with global attention after {early} of KiT's time")
    says("README.md", f"nor is it at equal training time, {lead:.2f} dB)")


def test_the_recipes_rate_is_the_best_of_three_in_deraining_at_both_lengths() -> None:
    for folder, steps in ((RAIN, 24_000), (SHORT_RAIN, 12_000)):
        record = json.loads((REFERENCE / folder / f"tuning-derain-standard-colour-{steps}.json").read_text())
        assert record["best"] == {"global": LR, "kit": LR}
        assert sorted({trial["lr"] for trial in record["trials"]}) == [LR / 2, LR, 2 * LR]
    says(RESULTS, "**For both the recipe's rate is the best, at both lengths**, as far as one seed tells")


def test_how_the_verdict_on_global_attention_in_deraining_hangs_on_single_seeds() -> None:
    page = (ROOT / RESULTS / "claims.md").read_text("utf-8")
    [listed] = re.findall(r"made by: python -m kitbench claims (.*?) -->", page)
    runs, sweeps, searches = load([ROOT / folder for folder in listed.split()])
    long = {run.path: run.run.seed for run in find([REFERENCE / RAIN, REFERENCE / MORE_RAIN])}
    p_values, means = [], []
    for seed in range(5):
        kept = [
            run for run in runs if long.get(run.path) != seed or run.run.method not in ("kit", "global")
        ]  # of every method that is compared
        facts = " ".join(
            fact for claim in claims(kept, sweeps, searches) for part in claim.parts for fact in part.facts
        )
        p_values += {float(p) for p in re.findall(r"adjusted p of kit - global: (0\.0[0-9]+), ", facts)}
        means += {float(m) for m in re.findall(r"one recipe, 24,000 steps: kit - global -([0-9.]+) dB, p", facts)}
    assert (len(p_values), len(means)) == (5, 5)
    above = sum(p > 0.05 for p in p_values)
    [short] = set(re.findall(r"12,000 steps: kit - global -[0-9.]+ dB, 95 % interval .*?, p ([0-9.e-]+),", page)) or {
        re.findall(r"12,000 steps: kit - global -[0-9.]+ dB, p ([0-9.e-]+)", page)[0]
    }
    says(RESULTS, f"the five seeds alone have an uncorrected p of {float(short.rstrip('.')):.5f}")
    says(
        RESULTS,
        f"The decision is fragile too: with one of the five seeds after 24,000 steps left out the adjusted p is {min(p_values):.3f} to "
        f"{max(p_values):.3f}, above 0.05 for {above} of the five, and the difference {min(means):.2f} to {max(means):.2f} dB",
    )
