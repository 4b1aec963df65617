"""`kitbench claims`: the six statements of the KiT paper, as we read its abstract, put to the test by stored runs.

A statement is broken into parts that stored numbers can answer. A part about quality is a contrast between two methods
over all test images (contrasts.py); all contrasts of a page are fixed beforehand and corrected together. A part about
cost is an exponent in pixels, from a sweep (growth.py). A statement is supported where all its parts are, not supported
where one part is contradicted, dependent on the learning rate where a part is, and not decided otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from kitbench.errors import InputError
from kitbench.spec.tasks import Kind
from kitbench.store.folder import TRIALS, RunFolder, find
from kitbench.store.records import Tuning, read_record
from kitbench.store.sweeps import Sweep
from kitbench.text import counted, shown
from kitbench.verdict.compare import Compared
from kitbench.verdict.contrasts import (
    ONE,
    UNDECIDED,
    Contrast,
    Runs,
    Setup,
    Verdict,
    combined,
    decide_contrasts,
    select,
)
from kitbench.verdict.entries import entries, labels, scored_under
from kitbench.verdict.growth import Part, costly_part, linear_measured, linear_operations, quadratic_part
from kitbench.verdict.proposals import contrast_command, run_command
from kitbench.verdict.provenance import deviations, unlike_sentences
from kitbench.verdict.retrieval import Retrieval, noted
from kitbench.verdict.searches import NONE_SEARCHED, Searches
from kitbench.verdict.statistics import MOST_SEEDS, mean_interval, seeds_to_find

FULL_STEPS = 100_000
"""Training steps from which on a run may speak of the state of the art."""

STATEMENTS = (
    "Global similarity lacks locality, and its cost is quadratic in the input resolution.",
    "Local attention sees adjacent positions only: too small a receptive field for restoration.",
    "KiT groups the k nearest patches by hashing and aggregates them by pair-wise local attention.",
    "KiT has non-local connectivity, the locality bias, and linear complexity in the input resolution.",
    "KiT is better than the state of the art of its day on denoising, deblurring and deraining.",
    "Non-local layers are normally used only on low-resolution maps because of their cost.",
)
QUESTIONS = {
    "locality": ("local", "global", "Does local attention restore better than global attention?"),
    "reach": ("kit", "local", "Does reaching beyond adjacent positions (KiT) restore better than local attention?"),
    "retrieval": ("kit", "kit-random", "Do the nearest patches restore better than as many random ones?"),
    "neighbours": ("kit", "kit-k1", "Do the nearest patches restore better than the patch alone, without neighbours?"),
    "connectivity": ("kit", "window", "Does non-local connectivity (KiT) restore better than windows?"),
    "bias": ("kit", "global", "Does KiT's locality restore better than global attention?"),
}
ONLY_SMOKE = "only smoke runs are stored, which settle no claim"
OTHERS = ("global", "window", "local")
"""The attentions that KiT has to beat to be the best."""
TASKS: tuple[Kind, ...] = ("denoise", "deblur", "derain")
"""The tasks that the paper claims."""
WORDS = {"denoise": "denoising", "deblur": "deblurring", "derain": "deraining", "denoise-real": "camera noise"}
"""What each task is called."""
_Key = tuple[str, str, str]
"""Task, methods a and b of a contrast."""


@dataclass(frozen=True)
class Claim:
    """One statement, and what the runs say of it."""

    number: int
    statement: str
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> Verdict:
        return combined(part.verdict for part in self.parts)


def load(paths: Sequence[Path]) -> tuple[list[RunFolder], list[Sweep], Searches]:
    """Runs, sweeps and searches of learning rates in these folders, or one folder below.

    Raises InputError where a folder holds none of them, or runs only deeper.
    """
    runs: list[RunFolder] = []
    sweeps, records, trials = [], [], []
    for path in paths:
        found = [p for p in [path / "scale.json", *sorted(path.glob("*/scale.json"))] if p.is_file()]
        sweeps += [_sweep(p) for p in found]
        searches = sorted([*path.glob("tuning*.json"), *path.glob("*/tuning*.json")])
        records += [read_record(Tuning, p) for p in searches]
        trials += [RunFolder(p.parent) for search in searches for p in search.parent.glob(f"{TRIALS}/*/run.json")]
        stored = (run for below in ("", "*/", "*/*/") for run in path.glob(f"{below}run.json"))
        if not (found or searches) or any(run.parent.parent.name != TRIALS for run in stored):
            runs += find([path])
    return runs, sweeps, Searches.read(records, [*runs, *trials])


def _sweep(path: Path) -> Sweep:
    try:
        return Sweep.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(
            f"{path} is not a sweep of this version of kitbench; make it anew by `kitbench scale`."
        ) from error


def claims(
    runs: Sequence[RunFolder], sweeps: Sequence[Sweep], searches: Searches = NONE_SEARCHED, protocol: str | None = None
) -> list[Claim]:
    """All six, in order. Raises InputError for runs of one task and two protocols."""
    by_task = _by_task(runs, searches, protocol)
    # The questions are put to denoising, or else to the task with the weightiest runs.
    main = max(
        by_task.values(), default=Runs(()),
        key=lambda of: (bool(of.blocks), of is by_task.get("denoise"), of.blocks[0].weight if of.blocks else ()),
    )  # fmt: skip
    quality = _quality(main, by_task)
    return [
        Claim(1, STATEMENTS[0], (quality["locality"], quadratic_part(sweeps))),
        Claim(2, STATEMENTS[1], (quality["reach"],)),
        Claim(3, STATEMENTS[2], (_recall(main), quality["retrieval"], quality["neighbours"])),
        Claim(
            4,
            STATEMENTS[3],
            (
                _reach(main),
                quality["connectivity"],
                quality["bias"],
                linear_operations(sweeps),
                linear_measured(sweeps),
            ),
        ),
        Claim(5, STATEMENTS[4], tuple(quality[kind] for kind in TASKS)),
        Claim(6, STATEMENTS[5], (costly_part(sweeps),)),
    ]


def _by_task(runs: Sequence[RunFolder], searches: Searches, protocol: str | None) -> dict[str, Runs]:
    """The runs of each task: tasks have protocols of their own, which never meet."""
    kinds: dict[str, list[RunFolder]] = {}
    for folder in runs:
        kinds.setdefault(folder.run.task.kind, []).append(folder)
    if protocol is not None:
        entries(runs, protocol)  # refuses one that nothing was scored under
    scored = {
        kind: [f for f in folders if protocol is None or any(scored_under(e, protocol) for e in f.evaluations())]
        for kind, folders in kinds.items()
    }
    return {kind: select(entries(folders, protocol), searches) for kind, folders in scored.items() if folders}


def _quality(main: Runs, by_task: Mapping[str, Runs]) -> dict[str, Part]:
    """Every question about quality, by name, and whether KiT is best, by task; corrected together."""
    asked: dict[_Key, Runs] = {("", a, b): main for a, b, _ in QUESTIONS.values()}
    of_task = {kind: by_task.get(kind, Runs(())) for kind in TASKS}
    # The contrasts of the task that the questions are put to are asked once.
    names = {kind: "" if of_task[kind] is main else kind for kind in TASKS}
    asked |= {(names[kind], "kit", other): of_task[kind] for kind in TASKS for other in OTHERS}
    decided = decide_contrasts({key: (key[1], key[2], runs.compare(key[1], key[2])) for key, runs in asked.items()})
    kind_of_main = next((kind for kind, runs in by_task.items() if runs is main), "denoise")
    parts = {}
    for name, (a, b, question) in QUESTIONS.items():
        asked_of = f"On {WORDS[kind_of_main]}, {question[0].lower()}{question[1:]}"
        parts[name] = _part(asked_of, decided["", a, b], main, _elsewhere(a, b, main, by_task))
    for kind in TASKS:
        contrasts = [decided[names[kind], "kit", other] for other in OTHERS]
        parts[kind] = _best_of_all(kind, contrasts, of_task[kind])
    return parts


def _elsewhere(a: str, b: str, main: Runs, by_task: Mapping[str, Runs]) -> tuple[str, ...]:
    """The contrast a - b on other tasks, images and backbones, after their longest training with one recipe."""
    places = {
        WORDS[kind] if group is runs else f"{WORDS[kind]}, {_unlike_in(group, runs)}": group
        for kind, runs in by_task.items()
        for group in (runs, *runs.others)
        if group is not main
    }
    found = []
    for place, group in places.items():
        own = {setup: one for setup, one in group.compare(a, b).items() if setup.comparison == ONE}
        if own:
            longest = max(own, key=lambda setup: setup.steps)
            short = f"{_in_short(own[longest])}, {_seeds(own[longest].found.seeds)}"
            found.append(f"elsewhere, no part of this verdict: {place}, {longest}: {short}")
    return tuple(found)


def _unlike_in(group: Runs, chosen: Runs) -> str:
    """In what a group of comparisons differs from that of its task which claims are put to, and its test sets."""
    own, usual = (runs.blocks[0].first.run.identity for runs in (group, chosen))
    gray = own["mode"] != usual["mode"]
    names = {
        "task": "another degradation", "backbone": "another backbone", "train_sha256": "other training images",
        "numerics": "an earlier version's numerics",
    }  # fmt: skip
    differs = [f"{own['mode']} images"] if gray else []
    differs += [
        name for key, name in names.items() if own.get(key) != usual.get(key) and not (gray and key == "train_sha256")
    ]
    sets = sorted({entry.evaluation.data_set for entry in group.blocks[0].entries})
    return f"{', '.join(differs)} ({', '.join(sets)})"


def _in_short(compared: Compared) -> str:
    p = f", p {compared.found.p:.3g}" if compared.found.p is not None else ""
    return f"{compared.a} - {compared.b} {shown(compared.found.mean, 3, '+')} dB{p}"


def _part(question: str, contrast: Contrast, runs: Runs, elsewhere: tuple[str, ...]) -> Part:
    together = [compared.runs for compared in contrast.setups.values()]
    keys = dict.fromkeys(key for own in together for key in own)
    facts = [f"{setup}: {in_words(compared)}" for setup, compared in contrast.setups.items()]
    facts += [_together(contrast)] if contrast.p_holm is not None else []
    absent = ONLY_SMOKE if runs.smoke and not runs.blocks else contrast.reason
    command = contrast_command(contrast, runs) if contrast.verdict == UNDECIDED else ""
    if not contrast.setups and not command:
        absent += ", and no shipped suite trains both like the stored runs"
    return Part(
        question, contrast.verdict, (*facts, *_unlike(runs, together), *_left_out(runs), *elsewhere), tuple(keys),
        command, absent, _figure(contrast),
    )  # fmt: skip


def _figure(contrast: Contrast) -> str:
    """The difference after the longest training by one recipe, and the p value of the contrast."""
    setup = _longest(contrast)
    if setup is None:
        return ""
    interval = contrast.setups[setup].found.interval
    text = f"{contrast.a} - {contrast.b} {shown(contrast.setups[setup].found.mean, 3, '+')} dB"
    text += f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval is not None else ""
    text += f", {setup.steps:,} steps, {_seeds(contrast.setups[setup].found.seeds)}"
    if contrast.p_holm is None:
        return text
    of = f" of all {len(contrast.setups)} setups" if len(contrast.setups) > 1 else ""
    return f"{text}; adjusted p{of} {contrast.p_holm:.2g}"


def _figures(contrasts: Sequence[Contrast]) -> str:
    """The same of several contrasts, without intervals."""
    found = [(contrast, setup) for contrast in contrasts if (setup := _longest(contrast)) is not None]
    return "; ".join(
        f"{contrast.a} - {contrast.b} {shown(contrast.setups[setup].found.mean, 3, '+')} dB, {setup.steps:,} steps, "
        f"{_seeds(contrast.setups[setup].found.seeds)}"
        for contrast, setup in found
    )


def _longest(contrast: Contrast) -> Setup | None:
    return max((setup for setup in contrast.setups if setup.comparison == ONE), key=lambda s: s.steps, default=None)


def _seeds(number: int) -> str:
    return counted(number, "seed")


def _together(contrast: Contrast) -> str:
    """The p value that decides a contrast, in words."""
    largest = max(compared.found.p or 0.0 for compared in contrast.setups.values())
    which = ", the largest" if len(contrast.setups) > 1 else ""
    return (
        f"adjusted p of {contrast.a} - {contrast.b}: {contrast.p_holm:.3g}, from {largest:.3g}{which} "
        f"(Holm's correction over {counted(contrast.family, 'contrast')})"
    )


def _unlike(runs: Runs, together: Sequence[Collection[str]]) -> tuple[str, ...]:
    """Which runs other code or another environment made than most of those that they were compared with.

    together: the keys of the runs of each comparison; runs at each method's best rate are of several blocks.
    """
    found = []
    for keys in together:
        touched = [block.entries for block in runs.blocks if any(entry.run.key[:10] in keys for entry in block.entries)]
        own = [entry for of_block in touched for entry in of_block]
        found += [one for one in deviations(own, labels(own)) if one.run[:10] in keys]
    return unlike_sentences(found)


def _left_out(runs: Runs) -> tuple[str, ...]:
    return (f"left out, not the default settings: {', '.join(runs.left_out)}",) if runs.left_out else ()


def in_words(compared: Compared) -> str:
    """A difference in words: figure, interval, p, and what its seeds and images can show."""
    found = compared.found
    text = f"{compared.a} - {compared.b} {shown(found.mean, 3, '+')} dB"
    if found.interval is not None:
        text += f", 95 % interval [{found.interval.low:+.3f}, {found.interval.high:+.3f}]"
    if found.interval_seeds is not None:
        text += f" (on these images alone [{found.interval_seeds.low:+.3f}, {found.interval_seeds.high:+.3f}])"
    if found.p is not None:
        text += f", p {found.p:.3g}"
    seeds, images = (counted(n, what) for n, what in ((found.seeds, "seed"), (found.images, "image")))
    text += f", {seeds}, {images}"
    if compared.detectable is not None:
        text += f", which detect {shown(compared.detectable, 2)} dB or more with 80 % power"
        if not compared.decided:
            needed = seeds_to_find(found.spread, compared.family)
            more = f"takes {needed} seeds" if needed else f"is out of reach of {MOST_SEEDS} seeds"
            text += f"; to find a difference of {shown(abs(found.mean), 3)} dB {more}"
    text += f"; {compared.without}" if compared.without else ""
    return text + (f" ({found.note})" if found.note else "")


def _best_of_all(kind: Kind, contrasts: Sequence[Contrast], runs: Runs) -> Part:
    """Whether KiT is better than every other attention; contrasts of too short recipes decide nothing."""
    question = f"On {WORDS[kind]}, does KiT restore better than global, window and local attention?"
    longest = [max((setup.steps for setup in contrast.setups), default=0) for contrast in contrasts]
    short = [steps for steps in longest if 0 < steps < FULL_STEPS]
    verdicts = [UNDECIDED if steps < FULL_STEPS else c.verdict for steps, c in zip(longest, contrasts, strict=True)]
    verdict, reason, command = combined(verdicts), "", ""
    if verdict == UNDECIDED:
        open_one = next(c for c, own in zip(contrasts, verdicts, strict=True) if own == UNDECIDED)
        reason = f"{max(short):,} steps of training say nothing of the state of the art" if short else open_one.reason
        enough = not short and max(longest) >= FULL_STEPS
        command = contrast_command(open_one, runs) if enough else run_command(None, [], task=kind)
    if runs.smoke and not runs.blocks:
        reason = ONLY_SMOKE
    facts = tuple(
        f"{setup}: {_in_short(compared)}" for contrast in contrasts for setup, compared in contrast.setups.items()
    )
    together = [compared.runs for contrast in contrasts for compared in contrast.setups.values()]
    keys = dict.fromkeys(key for own in together for key in own)
    facts += tuple(_together(contrast) for contrast in contrasts if contrast.p_holm is not None)
    if facts:
        facts += (*_unlike(runs, together), *_left_out(runs))
    return Part(question, verdict, facts, tuple(keys), command, reason, _figures(contrasts))


def _recall(runs: Runs) -> Part:
    """What KiT's runs noted of their retrieval after training, one value per seed: the mean over levels."""
    question = "Does hashing find more of the k nearest patches than chance would?"
    return _noted(
        runs, question, lambda found: found.by_seed("recall") - found.by_seed("chance"), "recall minus chance", 0.0
    )


def _reach(runs: Runs) -> Part:
    """Whether KiT reaches beyond what touches: the share of its neighbours that do not, one value per seed."""
    question = "Do more than half of the neighbours of a patch lie beyond the 8 patches that touch it?"
    return _noted(runs, question, lambda found: 1 - found.by_seed("adjacent"), "share beyond", 0.5)


def _noted(runs: Runs, question: str, value: Callable[[Retrieval], np.ndarray], what: str, bound: float) -> Part:
    """A part that is supported where the interval over seeds of a value that KiT's runs noted lies above a bound."""
    of_blocks = [
        (block, [e for group in block.methods["kit"].values() for e in group]) for block in runs.with_methods("kit")
    ]
    # The longest training whose runs say it, and of several seeds where there are such.
    block, of_kit = max(
        of_blocks,
        key=lambda pair: (noted(pair[1]) is not None, len({e.run.seed for e in pair[1]}) > 1),
        default=(None, []),
    )
    command = run_command(block, ["kit"])
    found = noted(of_kit)
    if found is None:
        measured = any(entry.training and entry.training.notes for entry in of_kit)
        only = "the stored runs of kit measured their retrieval on one clean image only; train them again"
        reason = only if measured else "no stored run of kit noted its retrieval"
        if runs.smoke and not runs.blocks:
            reason = ONLY_SMOKE
        return Part(question, UNDECIDED, (), command=command, reason=reason)
    values = value(found)
    after = f"{block.steps:,} steps, " if block else ""
    facts = (f"{after}{_seeds(len(values))}: {found}", *_unlike(runs, [found.runs]))
    interval = mean_interval(values)
    short = f"{what}, mean of levels, {values.mean():.3f}"
    if interval is None:
        reason = "no interval over seeds"
        return Part(question, UNDECIDED, facts, tuple(found.runs), command, reason, f"{short}, {_seeds(len(values))}")
    facts += (f"{what}, mean over levels, 95 % interval over seeds [{interval.low:+.3f}, {interval.high:+.3f}]",)
    below, above = interval.high < bound, interval.low > bound
    verdict: Verdict = "supported" if above else "not supported" if below else UNDECIDED
    reason = "" if above or below else "the interval holds the bound"
    short += f" [{interval.low:.3f}, {interval.high:.3f}], {_seeds(len(values))}"
    return Part(question, verdict, facts, tuple(found.runs), "" if above or below else command, reason, short)
