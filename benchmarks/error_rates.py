"""How often the tables and claims decide something false, and how large a difference they find, on simulated scores.

    python benchmarks/error_rates.py [--repeats 4000]   # simulates: error_rates.json (a few minutes on one core)
    python benchmarks/error_rates.py --markdown         # the table of the stored JSON

A world gives every method, seed and image a score: the method's true mean, plus effects of the method's seed, of the
image on the method, and of all three. (What a seed or an image does to all methods alike cancels in differences.) The
first world has the spreads of the stored runs on CBSD68. Others have other spreads between seeds, seeds and images in
other numbers, methods of unequal spread, and image effects with heavy or skewed tails. The functions that judge the
scores are those that tables and claims call. Printed for each world:

- false marks: share of tables with at least one row marked as different from the best although it is not, the larger of
  two cases: all seven methods equal, or four equal and three 1 dB lower (after which Holm's correction is weaker);
- false claims: the same for a page of claims, whose contrasts are decided by one setup, the others being decided
  already: the case in which most false decisions happen;
- cover: share of 95 % intervals that hold the true difference;
- power: share of true differences of so many dB that are found, in a table of seven methods of which one is better by
  so much, and among the contrasts of claims with that method.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from kitbench.verdict.claims import OTHERS, QUESTIONS, TASKS
from kitbench.verdict.statistics import ALPHA, Array, half_width, holm, p_values, spread, to_best

METHODS = ("kit", "window", "local", "global", "kit-random", "kit-k1", "conv")
Decisions = NDArray[np.bool_]
CHUNK = 250
"""Tables simulated at a time, for memory."""
GAINS = (0.05, 0.1, 0.2)
"""dB, of which power is printed."""
UNEQUAL = (1.0, 1.0, 1.0, 2.0, 3.0, 1.0, 0.5)
"""Seed spreads of the methods, in units of the world's."""


@dataclass(frozen=True)
class World:
    """Standard deviations in dB of what a method's score has from its seed, the image, and both together."""

    name: str
    seeds: int = 3
    images: int = 68
    of_seed: float = 0.108
    of_image: float = 0.117
    of_rest: float = 0.085
    seed_spreads: tuple[float, ...] = (1.0,) * len(METHODS)
    image_spreads: tuple[float, ...] = (1.0,) * len(METHODS)
    tails: Literal["normal", "heavy", "skewed"] = "normal"
    """Of the image effects: normal; Student's t with 3 degrees of freedom; log-normal of shape 0.8."""
    looked: tuple[int, ...] = ()
    """After how many seeds the scores were looked at before: what any look decides counts as decided."""
    known_limit: bool = False
    """Shown, but beyond what the tests are built for."""

    @property
    def looks(self) -> tuple[int, ...]:
        return (*self.looked, self.seeds)

    def scores(self, random: np.random.Generator, tables: int, truth: Array) -> Array:
        """Scores [tables, methods, seeds, images] in dB; truth: the true means [methods]."""
        methods = len(truth)
        by_seed = random.standard_normal((tables, methods, self.seeds, 1)) * np.array(self.seed_spreads)[:, None, None]
        by_image = self._image_effects(random, (tables, methods, 1, self.images))
        by_image *= np.array(self.image_spreads)[:, None, None]
        rest = random.standard_normal((tables, methods, self.seeds, self.images))
        found: Array = self.of_rest * rest + self.of_seed * by_seed + self.of_image * by_image
        found += truth[:, None, None]
        return found

    def _image_effects(self, random: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Mean 0, variance 1."""
        if self.tails == "heavy":
            return random.standard_t(3, shape) / math.sqrt(3)
        if self.tails == "skewed":
            variance = 0.8**2
            mean, sd = math.exp(variance / 2), math.sqrt((math.exp(variance) - 1) * math.exp(variance))
            return (random.lognormal(0, 0.8, shape) - mean) / sd
        return random.standard_normal(shape)


def worlds() -> Iterator[World]:
    yield World("stored runs")
    for seeds in (5, 10):
        yield World("stored runs, more seeds", seeds)
    for of_seed in (0.05, 0.108):
        yield World("interim look after 5 seeds", 8, of_seed=of_seed, looked=(5,), known_limit=True)
    for of_seed in (0.05, 0.2):
        for seeds in (3, 5, 10):
            yield World("other seed spread", seeds, of_seed=of_seed)
    for images in (2, 6, 12, 24, 100):
        yield World("other images", 5, images, of_seed=0.05)
    for seeds, images, of_seed in ((3, 2, 0.2), (10, 2, 0.2), (3, 100, 0.2), (10, 100, 0.2)):
        yield World("other images", seeds, images, of_seed)
    yield World("other images", 3, 12, of_seed=0.05)
    yield World("other images", 10, 12, of_seed=0.05)
    for seeds, images in ((3, 68), (5, 68), (10, 68), (5, 12), (10, 12)):
        yield World("unequal methods", seeds, images, seed_spreads=UNEQUAL, image_spreads=UNEQUAL[::-1])
    tails: tuple[Literal["heavy", "skewed"], ...] = ("heavy", "skewed")
    for kind in tails:
        for seeds, images in ((3, 12), (5, 12), (10, 12), (5, 68)):
            yield World(f"{kind} images", seeds, images, of_seed=0.05, tails=kind)
    for seeds, images in ((10, 12), (5, 24)):
        yield World(
            "unequal methods, heavy images", seeds, images, 0.05, seed_spreads=UNEQUAL, image_spreads=UNEQUAL[::-1],
            tails="heavy",
        )  # fmt: skip
    for images in (12, 24, 68):
        yield World(
            "unequal methods, skewed images", 10, images, 0.05, seed_spreads=UNEQUAL, image_spreads=UNEQUAL[::-1],
            tails="skewed", known_limit=images < 68,
        )  # fmt: skip


def marks(scores: Array) -> tuple[NDArray[np.intp], Decisions]:
    """The best [tables] of tables of one column, and whether each row is marked as different from it."""
    [(best, p)] = to_best([scores])
    return best, p < ALPHA


def contrasts(scores: Array, pairs: list[tuple[int, int]]) -> Array:
    """p values [tables, pairs], each for one comparison."""
    first, second = (list(side) for side in zip(*pairs, strict=True))
    return p_values(spread(scores[:, first] - scores[:, second]))


PAIRS = [(METHODS.index(a), METHODS.index(b)) for a, b, _ in QUESTIONS.values()]
BEST = [(METHODS.index("kit"), METHODS.index(other)) for other in OTHERS]


def claims(world: World, random: np.random.Generator, tables: int, truth: Array) -> Decisions:
    """Whether each contrast of pages of claims is decided: those of one task, then of the two others."""
    asked = [PAIRS] + [BEST] * (len(TASKS) - 1)
    scores = [world.scores(random, tables, truth) for _ in asked]
    decided = np.zeros((tables, sum(map(len, asked))), bool)
    for seeds in world.looks:
        p = [contrasts(own[:, :, :seeds], pairs) for own, pairs in zip(scores, asked, strict=True)]
        decided |= holm(np.concatenate(p, -1)) < ALPHA
    return decided


def share(of: Callable[[int], Decisions], repeats: int) -> float:
    """Mean over so many tables of what is found in each."""
    sizes = [min(CHUNK, repeats - done) for done in range(0, repeats, CHUNK)]
    return float(np.concatenate([of(size) for size in sizes]).mean())


def rates_of(world: World, repeats: int) -> dict[str, Any]:
    """Rates of a world, from so many tables for false decisions and half as many for power."""
    random = np.random.default_rng(16)
    equal, halves = np.zeros(len(METHODS)), np.repeat([0.0, -1.0], (4, 3))

    def false_marks(truth: Array) -> Callable[[int], Decisions]:
        def of(tables: int) -> Decisions:
            scores, false = world.scores(random, tables, truth), np.zeros(tables, bool)
            for seeds in world.looks:
                best, marked = marks(scores[:, :, :seeds])
                false |= (marked & (truth[best][:, None] <= truth)).any(-1)
            return false

        return of

    def false_claims(truth: Array) -> Callable[[int], Decisions]:
        nothing = np.array([truth[a] == truth[b] for a, b in PAIRS + BEST * (len(TASKS) - 1)])
        return lambda tables: np.asarray((claims(world, random, tables, truth) & nothing).any(-1))

    def covered(tables: int) -> Decisions:
        first, second = (list(side) for side in zip(*combinations(range(len(METHODS)), 2), strict=True))
        scores = world.scores(random, tables, equal)
        found = spread(scores[:, first] - scores[:, second])
        return np.asarray(np.abs(found.mean) <= half_width(found))

    def found_in_table(gain: float) -> Callable[[int], Decisions]:
        def of(tables: int) -> Decisions:
            scores = world.scores(random, tables, np.array([gain, *[0.0] * (len(METHODS) - 1)]))
            found = np.zeros((tables, len(METHODS) - 1), bool)
            for seeds in world.looks:
                best, marked = marks(scores[:, :, :seeds])
                found |= (marked & (best == 0)[:, None])[:, 1:]
            return found

        return of

    def found_in_claims(gain: float) -> Callable[[int], Decisions]:
        truth = np.array([gain, *[0.0] * (len(METHODS) - 1)])
        of_kit = np.array([truth[a] != truth[b] for a, b in PAIRS + BEST * (len(TASKS) - 1)])
        return lambda tables: claims(world, random, tables, truth)[:, of_kit]

    return {
        "false_marks": max(share(false_marks(truth), repeats) for truth in (equal, halves)),
        "false_claims": max(share(false_claims(truth), repeats) for truth in (equal, halves)),
        "cover": share(covered, repeats),
        "power_table": [share(found_in_table(gain), repeats // 2) for gain in GAINS],
        "power_claims": [share(found_in_claims(gain), repeats // 2) for gain in GAINS],
    }


def limit(repeats: int) -> float:
    """The largest rate of false decisions that agrees with 5 %: two standard errors more."""
    return ALPHA + 2 * math.sqrt(ALPHA * (1 - ALPHA) / repeats)


def markdown(stored: dict[str, Any]) -> str:
    repeats, rows = stored["repeats"], []
    for found in stored["worlds"]:
        world, rates = World(**found["world"]), found["rates"]
        rows.append(
            [
                world.name + " †" * world.known_limit, world.seeds, world.images, f"{world.of_seed:.3f}",
                f"{rates['false_marks']:.1%}", f"{rates['false_claims']:.1%}", f"{rates['cover']:.1%}",
                *(" / ".join(f"{power:.0%}" for power in rates[key]) for key in ("power_table", "power_claims")),
            ]
        )  # fmt: skip
    gains = " / ".join(f"{gain:g}" for gain in GAINS)
    header = ["scenario", "seeds", "images", "seed sd, dB", "false marks", "false claims", "coverage",
              f"power in a table at {gains} dB", f"power in claims at {gains} dB"]  # fmt: skip
    aimed = [found["rates"] for found in stored["worlds"] if not found["world"]["known_limit"]]
    worst = {key: max(rates[key] for rates in aimed) for key in ("false_marks", "false_claims")}
    least = min(rates["cover"] for rates in aimed)
    note = (
        f"{repeats} tables and pages of claims per scenario, {repeats // 2} for power. Largest rates of false "
        "decisions: "
        f"{worst['false_marks']:.1%} of tables, {worst['false_claims']:.1%} of pages (aimed at: at most 5 %, here "
        f"{limit(repeats):.1%} with two standard errors). Least coverage: {least:.1%} (aimed at: at least 94 %). "
        "† Known limits, not counted: few images whose effects are very skewed and of very unequal size; scores that "
        "were looked at before the last seeds were added, where a decision of either look counts."
    )
    return tabulate(rows, header, "github", disable_numparse=True) + f"\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4000, help="simulated tables per scenario")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the stored JSON and simulate nothing"
    )
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).with_name("error_rates.json"), help="where the figures are kept"
    )
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())))
        return
    stored: dict[str, Any] = {"repeats": options.repeats, "worlds": []}
    for world in worlds():
        stored["worlds"].append({"world": asdict(world), "rates": rates_of(world, options.repeats)})
        print(f"{world.name}, {world.seeds} seeds, {world.images} images: {stored['worlds'][-1]['rates']}", flush=True)
    options.json.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"\n{markdown(stored)}")


if __name__ == "__main__":
    main()
