"""What the pages in results/ says of the choices that the paper leaves open: the suite `ablate`."""

from __future__ import annotations

from statistics import fmean

import scipy.stats

from kitbench.store.folder import find
from kitbench.verdict.claims import load
from kitbench.verdict.compare import adjusted
from kitbench.verdict.contrasts import blocks, compare_methods
from kitbench.verdict.differences import differences
from kitbench.verdict.entries import entries
from kitbench.verdict.rows import rows
from tests.statements.stored import (
    LR,
    MORE,
    REFERENCE,
    RESULTS,
    SEEDS,
    SHORT_LR,
    TUNED,
    gaps,
    image_gains,
    says,
    scores,
    up,
)  # fmt: skip

SHORT, LONG = "ablate-standard-cbsd68-cpu", "ablate-standard-24000-cpu"
"""3,000 and 24,000 steps."""
FAMILY = "family-standard-cpu"
SEARCH = ("kit-exact", "kit-rounds1", "kit-chunk-only")
KEYS = ("kit-k1", "kit-k2", "kit-k8", "kit-k16", "kit-patch")
OTHERS = ("kit-flat", "kit-mean", "kit-descriptor", "kit-aligned3", "kit-aligned7", "kit-unshifted", "kit-random")


def above_kit(name: str) -> list[float]:
    """How far a row of the suite lies above KiT after 3,000 steps, dB, of every seed."""
    return gaps(scores(name, "CBSD68", SHORT), scores("kit", "CBSD68", SHORT))


def test_no_setting_is_told_from_kit_after_a_short_training() -> None:
    [block] = blocks(entries(find([REFERENCE / SHORT]), None))
    assert set(block.methods) == {"kit", *SEARCH, *KEYS, *OTHERS}
    few = {name for name in block.methods if len(scores(name, "CBSD68", SHORT)) == 2}
    assert few == {"kit-aligned3", "kit-aligned7", "kit-k2", "kit-exact", "kit-rounds1"}
    compared = adjusted([compare_methods(block, name, "kit") for name in (*SEARCH, *KEYS, *OTHERS)])
    assert not any(one.decided for one in compared)
    intervals = [one.found.interval for one in compared if one.a in SEARCH]
    widest = max((one.high - one.low) / 2 for one in intervals if one is not None)
    mean = {name: fmean(above_kit(name)) for name in (*SEARCH, *KEYS, *OTHERS)}
    search = [-mean[name] for name in SEARCH]
    assert min(mean, key=mean.__getitem__) == "kit-random"
    assert set(sorted(mean, key=mean.__getitem__)[-2:]) == {"kit-patch", "kit-k16"}
    assert f"{mean['kit-patch']:.2f}" == f"{mean['kit-k16']:.2f}"
    says(
        RESULTS,
        f"that change anything but the number of keys lie within {up(max(abs(mean[n]) for n in (*SEARCH, *OTHERS)))} dB",
        f"lie {min(search):.3f} to {max(search):.3f} dB below `kit`, with intervals of up to ± {widest:.2f} dB",
        f"patches of 8 x 8 and 16 neighbours, {mean['kit-k16']:.2f} dB above `kit` in the mean",
        f"the lowest, {-mean['kit-random']:.2f} dB below it",
    )


def test_one_patch_alone_after_a_long_training() -> None:
    kit, own, far = (scores(name, "CBSD68", SEEDS, MORE, LONG) for name in ("kit", "kit-k1", "kit-random"))
    own_best = scores("kit-k1", "CBSD68", LONG, lr=2 * LR)
    far_best = scores("kit-random", "CBSD68", TUNED, lr=2 * LR)
    gained, tuned = gaps(kit, own), gaps(kit, own_best)
    lost, lost_best = gaps(far, own), gaps(far_best, own_best)
    assert len(gained) == len(tuned) == len(lost) == len(lost_best) == 6
    assert min(*gained, *tuned) > 0
    assert sum(one < 0 for one in lost) == sum(one < 0 for one in lost_best) == 5
    says(
        RESULTS,
        f"Three neighbours are worth {fmean(gained):.2f} dB in tiles of 256 px",
        f"KiT lies {min(gained):.3f} to {max(gained):.3f} dB above its own patch alone",
        f"where each has its own best rate, KiT lies {min(tuned):.3f} to {max(tuned):.3f} dB above it, in six of six",
        f"they lie {-min(lost):.2f} dB below to {max(lost):.2f} dB above the patch alone; where each has its best rate, "
        f"{-min(lost_best):.2f} dB below to {max(lost_best):.2f} dB above it",
        f"KiT gained {fmean(gained):.2f} dB at the recipe's learning rate and {fmean(tuned):.2f} dB where each has its "
        "own best one (six of six seeds each, tiles of 256 px)",
        f"the first two seeds put KiT {fmean(tuned[:2]):.2f} dB above the patch alone, all six {fmean(tuned):.2f}.",
    )
    assert f"{fmean(gained):.2f}" == f"{fmean(tuned):.2f}"
    says("README.md", f"Over its own patch alone KiT gains {fmean(gained):.2f} dB (six seeds, not decided)")
    for more, random in ((gained, far), (tuned, far_best)):
        less = gaps({seed: kit[seed] for seed in own}, random)
        assert 0.4 < fmean(more) / fmean(less) < 0.6  # "in about equal parts"
    for harm in (lost, lost_best):
        assert sum(gap < 0 for gap in harm) == 5
        low, high = scipy.stats.t.interval(0.95, 5, fmean(harm), scipy.stats.sem(harm))
        assert low < 0 < high
        says(
            RESULTS,
            f"They lie {-fmean(harm):.2f} dB below the patch alone in the mean over six seeds, and below it in five",
        )
    beside = gaps(scores("window", "CBSD68", SEEDS), own)
    assert len(beside) == 5
    says(RESULTS, f"lie {min(beside):.2f} to {max(beside):.2f} dB above that patch, in five of five seeds")


def test_one_patch_alone_learns_more_slowly() -> None:
    quick = "ablate-quick-cbsd68-cpu"
    kit = scores("kit", "CBSD68", "denoise-cbsd68-cpu", quick, lr=SHORT_LR)
    own = scores("kit-k1", "CBSD68", quick, lr=SHORT_LR)
    found = gaps(kit, own)
    assert len(found) == 25
    tuned = gaps(kit, scores("kit-k1", "CBSD68", quick, lr=2 * SHORT_LR))
    assert len(tuned) == 16
    says(
        RESULTS,
        f"After 700 steps KiT lies {fmean(found):.2f} dB above that patch in the mean over 25 seeds at the recipe's rate, "
        f"and {fmean(tuned):.2f} dB over 16 seeds where each has its own best one",
    )


def test_the_search_of_the_patch_alone() -> None:
    [record] = load([REFERENCE / LONG])[2].records
    *reached, last = [trial.psnr_db for trial in record.trials]
    assert last is None
    assert record.best == {"kit-k1": 2 * LR}
    first, second, third = (f"{psnr:.2f}" for psnr in reached if psnr is not None)
    says(RESULTS, f"(`kit-k1`) reached {first}, {second} and {third} dB at the first three rates")


def test_what_neighbours_are_worth_falls_with_the_size_of_the_tiles() -> None:
    found = {
        run.run.method: {e.stamp: e.mean_psnr for e in run.evaluations()} for run in find([REFERENCE / "pools-cpu"])
    }
    stamps = ("awgn8-tile64.v1", "awgn8-tile128.v1", "awgn8.v1")
    near, middle, whole = (found["kit"][stamp] - found["kit-k1"][stamp] for stamp in stamps)
    assert near > middle > whole > 0
    says(
        RESULTS,
        f"KiT lies {near:.2f} dB above its own patch in tiles of 64 px, {middle:.2f} in tiles of 128, and {whole:.2f} on",
    )


def test_more_keys_do_not_pay_after_a_long_training() -> None:
    kit = scores("kit", "CBSD68", SEEDS)["0"]
    of = {name: scores(name, "CBSD68", LONG)["0"] - kit for name in ("kit-k16", "kit-patch")}
    assert abs(of["kit-patch"]) < 0.005
    says(RESULTS, f"16 patches in place of 4 cost {-of['kit-k16']:.2f} dB, patches of 8 x 8 gained nothing")


def test_what_the_family_does_after_a_short_training() -> None:
    methods = {run.run.method: run for run in find([REFERENCE / FAMILY]) if run.run.seed is not None}
    above = {name: gaps(scores(name, "CBSD68", FAMILY), scores("window", "CBSD68", FAMILY))[0] for name in methods}
    order = sorted(above, key=above.__getitem__, reverse=True)
    assert order[:4] == ["channel", "window", "overlap", "kit"]
    by_content = [-above[name] for name in ("nlsn", "categories", "centres", "graph")]
    step = rows(list(methods.values())).set_index("method")["seconds_per_step"]
    assert step["channel"] < step["window"]
    slow = sorted(step[name] / step["window"] for name in ("nlsn", "graph"))
    short = "family-quick-cpu"
    higher = sum(gain > 0 for gain in image_gains(FAMILY, "channel", "window"))
    assert higher == 34
    early = [scores(name, "skimage-test", short, lr=SHORT_LR)["0"] for name in ("window", "channel")]
    says(
        RESULTS,
        f"{above['channel']:.2f} dB above them in the mean, but higher in half of the pictures ({higher} of 68)",
        f"`overlap` follows, {-above['overlap']:.2f} dB below windows, then KiT",
        f"lie {min(by_content):.2f} to {max(by_content):.2f} dB below windows",
        f"`channel` was {early[0] - early[1]:.2f} dB below windows",
        f"takes {slow[0]:.1f} to {slow[1]:.1f} times that of windows",
    )
    for name in ("conv", "kit", "window"):
        [again] = [
            run for run in find([REFERENCE / "denoise-standard-3000-cpu"]) if run.path.name == methods[name].path.name
        ]
        assert not [one for one in differences(again, methods[name]) if "commit" not in str(one)]
