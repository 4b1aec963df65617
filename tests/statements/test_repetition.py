"""What the pages say of near and far neighbours: the suite `reach`."""

from __future__ import annotations

import re
from statistics import fmean

from kitbench.store.folder import find
from tests.statements.stored import REACH, REFERENCE, RESULTS, by_image, gaps, says, scores, stored, up


def above_conv(method: str, name: str) -> list[float]:
    """How far a method lies above no attention in the suite `reach`, of every seed: on the images of `Repetition` whose
    name the pattern matches, the mean over images, dB."""
    one, other = (by_image(REACH, of, "Repetition") for of in (method, "conv"))
    found = [gaps(one[image], other[image]) for image in one if re.match(name, image)]
    return [fmean(of_seed) for of_seed in zip(*found, strict=True)]


def test_what_repeated_content_is_worth() -> None:
    page = RESULTS
    kit = {period: above_conv("kit", f"periodic-[0-9]+-{period:03}") for period in (16, 32, 64, 128)}
    window = {period: above_conv("window", f"periodic-[0-9]+-{period:03}") for period in kit}
    near = [gain for period in (16, 32, 64) for gain in kit[period]]
    assert {len(gains) for gains in (*kit.values(), *window.values())} == {3}
    for either in (page, "README.md"):
        says(either, f"{min(near):.1f} to {max(near):.1f} dB on textures with periods of 16 to 64 px")
    means = [fmean(gains) for gains in kit.values()]
    says(
        page,
        f"KiT is {means[0]:.2f}, {means[1]:.2f} and {means[2]:.2f} dB above `conv` at periods of 16, 32 and 64 px, and "
        f"{means[3]:.2f}",
    )
    says(page, f"where windows gained {max(max(window[period]) for period in (16, 32, 64)):.1f} dB at most")
    far = [gain for period in (32, 64, 128) for gain in window[period]]
    says(
        page,
        f"({fmean(window[16]):.2f} dB above `conv`; random patches {fmean(above_conv('kit-random', 'periodic-[0-9]+-016')):.2f}",
        f"lie {-min(far):.2f} dB below `conv` to {max(far):.2f} above it at longer ones",
    )


def owed_to_copies(name: str) -> list[list[float]]:
    """How far KiT lies above no attention on an image of `Repetition`, beyond what it does on the same image without
    copies, of each image whose name the pattern matches and each seed, dB."""
    kit, conv = (by_image(REACH, method, "Repetition") for method in ("kit", "conv"))
    alone = {image: gaps(kit[image], conv[image]) for image in kit if re.match(name, image)}
    kit, conv = (by_image(REACH, method, "Repetition-none") for method in ("kit", "conv"))
    return [[a - b for a, b in zip(gain, gaps(kit[i], conv[i]), strict=True)] for i, gain in alone.items()]


def test_what_is_owed_to_copies() -> None:
    textures = {n: owed_to_copies(f"periodic-[0-9]+-{n:03}") for n in (16, 32, 64, 128)}
    assert all(min(gain) > 0 for n in (16, 32, 64) for gain in textures[n])
    of = [fmean(gain) for [gain] in textures.values()]  # one picture of each period
    near, far = (
        [fmean(gain) for gain in owed_to_copies(f"copies-[0-9]+-({apart})")] for apart in ("032|064", "128|192")
    )
    assert min(min(gain) for gain in owed_to_copies("copies-[0-9]+-(032|064)")) > 0
    says(
        RESULTS,
        f"{of[0]:.2f}, {of[1]:.2f} and {of[2]:.2f} dB from textures with periods of 16, 32 and 64 px, and {of[3]:.2f} dB",
        f"{min(near):.2f} to {max(near):.2f} dB from squares that stand twice 32 or 64 px apart (six images), and "
        f"{min(far):+.2f} to {max(far):+.2f} dB from those 128 or 192 px apart (four)",
    )
    assert (len(near), len(far)) == (6, 4)


def test_what_is_gained_on_buildings_and_over_random_patches() -> None:
    page, houses = RESULTS, "Urban100-centre512"
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
    says(
        page,
        f"with crops and tiles of 128 px by {fmean(apart[2]):.2f} dB on CBSD68 and {shown[0]} dB on buildings, in three of",
    )
    says(page, f"{shown[0]} dB on buildings, {shown[1]} on *Repetition*, {shown[2]} on CBSD68 and {shown[3]} without")
    three = [scores(name, "CBSD68", REACH) for name in ("kit", "window", "conv")]
    spread = max(max(one[seed] for one in three) - min(one[seed] for one in three) for seed in "012")
    says(page, f"the three lie within {up(spread)} dB of one another in each seed")


def test_hashing_lost_nothing() -> None:
    sets = {place[1] for place in stored(REACH) if place[0] == "kit"}
    [worst, *_, best] = sorted(
        gap for name in sets for gap in gaps(scores("kit", name, REACH), scores("kit-exact", name, REACH))
    )
    says(RESULTS, f"{worst:.3f} to {best:.3f} dB above it on all four sets")
    found: dict[int, list[float]] = {}
    for run in find([REFERENCE / REACH]):
        if run.run.method == "kit":
            assert run.training is not None
            for place in run.training.notes.values():
                if isinstance(place, dict) and "recall" in place:
                    found.setdefault(place["level"], []).append(100 * place["recall"])
    full, half = (fmean(found[level]) for level in sorted(found))
    says(
        RESULTS,
        f"it misses {100 - half:.0f} to {100 - full:.0f} % of the nearest patches",
        f"hashing finds only {full:.0f} % (full resolution) and {half:.0f} % (half resolution)",
    )
