"""Nonsense in the place of what strangers write: suites, data cards, result files, pictures. Used by faults.py.

Hypothesis alters real ones. Whatever comes of it must be an answer or one sentence (`InputError`, `RunError`), within
LONGEST seconds, and no file may change outside the folder that a command writes to.
"""

from __future__ import annotations

import io
import json
import os
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from PIL import Image

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # as the command line does, before OpenCV is imported

from kitbench.cli.main import cli
from kitbench.data.cards import Card
from kitbench.data.images import decode
from kitbench.data.photograph import read_set
from kitbench.errors import InputError, RunError
from kitbench.spec.fields import digest
from kitbench.spec.loading import load_suite
from kitbench.spec.messages import parse

LONGEST = 60.0
OWN = """
name = "Own"
title = "two pictures"
tasks = ["denoise"]
colour = true
home = "https://example.org"
licence = "none"
citation = "none"
folders = ["Own"]
layouts = [["*.png", "*/*.png"]]
count = 2
"""
"""A card of a set that is here."""
LITERALS = (
    "-1", "0", "1e999", "nan", "3.5", "true", '"x"', '""', '"../../x"', "[]", "[[1]]", "{}", "{ a = 1 }", "1979-05-27",
    "99999999999999999999", '"\\u0000"', "[1, 'a']", "=", "'''", '{ from = "awgn8", tile = 1 }', '"denoise"',
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["../../x", "/etc/passwd", "<script>", "\x00", "9" * 400, "awgn8.v1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@st.composite
def altered_text(draw: st.DrawFn, text: str) -> str:
    """TOML with some lines changed, lost, doubled or invented."""
    lines = text.splitlines()
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        key, _, _ = lines[place].partition("=")
        line = draw(
            st.sampled_from([f"{key}= {literal}" for literal in LITERALS])
            | st.just("")
            | st.just(lines[place] * 2)
            | st.text(max_size=20)
            | st.sampled_from([f"{lines[place][:-1]}", f"[{key.strip()}]", f"x{lines[place]}"])
        )
        lines[place] = line
    return "\n".join(lines)


@st.composite
def altered_tree(draw: st.DrawFn, tree: Any) -> Any:
    """JSON with one to three values or keys changed or lost."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        node, depth = tree, draw(st.integers(0, 4))
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[draw(st.integers(0, len(keys) - 1))]
            if depth and isinstance(node[key], dict | list):
                node, depth = node[key], depth - 1
                continue
            if draw(st.integers(0, 4)) == 0:
                del node[key]
            else:
                node[key] = draw(VALUES)
            break
    return tree


@st.composite
def altered_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A file with some bytes changed, cut short, or with nonsense in the middle."""
    changed = bytearray(data)
    # Headers are where the harm is: half of the places lie in the first 64 bytes.
    places = st.integers(0, min(63, len(data) - 1)) | st.integers(0, len(data) - 1)
    for place in draw(st.lists(places, min_size=1, max_size=6)):
        changed[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        place = draw(places)
        changed[place:place] = draw(st.binary(max_size=16))
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.integers(0, 3)) == 0 else changed)


class Fuzzer:
    """Counts what came of each kind of nonsense."""

    def __init__(self, place: Path, count: int, seed: int) -> None:
        self.place, self.count, self.seed = place, count, seed
        self.counts: Counter[str] = Counter()

    def each(self, strategy: st.SearchStrategy[Any], kind: str, work: Callable[[Any], object]) -> None:
        """Call `work` with `count` examples; an answer or one sentence is fine, all else is not."""

        @settings(max_examples=self.count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @seeded(self.seed)
        @given(strategy)
        def run(example: Any) -> None:
            clock = time.monotonic()
            try:
                work(example)
                self.counts[f"{kind}: taken"] += 1
            except (InputError, RunError) as error:
                if not str(error).strip():
                    raise AssertionError(f"{kind}: refused without a word") from error
                self.counts[f"{kind}: refused in a sentence"] += 1
            assert time.monotonic() - clock < LONGEST, f"{kind}: took {time.monotonic() - clock:.0f} s"

        run()

    def command(self, *arguments: str) -> None:
        """The command line, in this process: whatever it raises comes through; a refusal is raised as InputError."""
        before = self.outside()
        done = CliRunner().invoke(cli, list(arguments), catch_exceptions=True)
        assert self.outside() == before, f"{arguments} wrote outside its folder"
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code:
            raise InputError((done.output.strip().splitlines() or ["refused without a word"])[-1])

    def outside(self) -> list[str]:
        """What lies beside the folder that commands write to."""
        return sorted(path.name for where in (self.place.parent, self.place) for path in where.iterdir())


def suites(fuzzer: Fuzzer, text: str) -> None:
    path = fuzzer.place / "nonsense.toml"
    path.touch()

    def work(changed: str) -> None:
        path.write_text(changed, encoding="utf-8", errors="surrogatepass")
        load_suite(str(path))

    fuzzer.each(altered_text(text), "suite", work)


def data_cards(fuzzer: Fuzzer, texts: Sequence[str]) -> None:
    (fuzzer.place / "Own" / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        Image.new("RGB", (8, 8), len(name)).save(fuzzer.place / "Own" / f"{name}.png")

    def work(changed: str) -> None:
        try:
            raw = tomllib.loads(changed)
        except (tomllib.TOMLDecodeError, UnicodeError) as error:
            raise InputError("no TOML") from error
        card = parse(Card, raw, "data card")
        read_set(card, fuzzer.place, "colour")

    fuzzer.each(st.sampled_from([*texts, *[OWN] * len(texts)]).flatmap(altered_text), "data card", work)


def result_files(fuzzer: Fuzzer, results: Path) -> None:
    """Records whose checksum is made to fit, and files of nonsense."""
    files = [path for path in sorted(results.rglob("*")) if path.is_file() and path.suffix in (".json", ".csv", ".png")]
    whole = {path: path.read_bytes() for path in files}
    trees = {path: json.loads(data) for path, data in whole.items() if path.suffix == ".json"}
    (fuzzer.place / "out").mkdir(exist_ok=True)
    out = fuzzer.place / "out" / "out"
    commands = [
        ("table", str(results), "--format", "csv"),
        ("table", str(results)),
        ("status", str(results)),
        ("diff", *(str(path.parent) for path in list(results.glob("*/run.json"))[:2])),
        ("check", str(results), "--against", str(out.parent / "reference.json")),
        ("claims", str(results)),
        ("report", str(results), "--out", str(out)),
    ]

    @st.composite
    def damaged(draw: st.DrawFn) -> tuple[Path, bytes, tuple[str, ...]]:
        path = draw(st.sampled_from(files))
        command = commands[draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5, 6]))]
        if path in trees and draw(st.integers(0, 3)):
            tree = draw(altered_tree(trees[path]))
            if isinstance(tree, dict) and "sha256" in tree and draw(st.booleans()):
                del tree["sha256"]
                with suppress(ValueError, TypeError):
                    tree["sha256"] = digest(tree)
            return path, json.dumps(tree).encode(), command
        return path, draw(altered_bytes(whole[path])), command

    def work(example: tuple[Path, bytes, tuple[str, ...]]) -> None:
        path, data, command = example
        path.write_bytes(data)
        try:
            fuzzer.command(*command)
        finally:
            path.write_bytes(whole[path])

    fuzzer.command("check", str(results), "--against", str(out.parent / "reference.json"), "--update")
    fuzzer.each(damaged(), "result file", work)


def pictures(fuzzer: Fuzzer, run: Path) -> None:
    """Pictures as data sets hold them, and as people give them to `restore`."""
    random = np.random.default_rng(0)
    shown = Image.fromarray(random.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    made = {}
    for kind in ("png", "jpeg", "tiff", "bmp", "webp"):
        file = io.BytesIO()
        shown.save(file, kind)
        made[kind] = file.getvalue()
    (fuzzer.place / "out").mkdir(exist_ok=True)
    for kind in made:
        (fuzzer.place / f"picture.{kind}").touch()

    def work(example: tuple[str, bytes]) -> None:
        kind, data = example
        path = fuzzer.place / f"picture.{kind}"
        path.write_bytes(data)
        decode(path)
        fuzzer.command(
            "restore", str(path), "--run", str(run), "--out", str(fuzzer.place / "out"), "--overwrite",
            "--device", "cpu",
        )  # fmt: skip

    examples = st.sampled_from(sorted(made)).flatmap(lambda k: st.tuples(st.just(k), altered_bytes(made[k])))
    fuzzer.each(examples, "picture", work)


def fuzz(place: Path, results: Path, suite: str, cards: Sequence[str], count: int, seed: int = 0) -> Counter[str]:
    """`count` examples over the four kinds. `results`: stored runs below `place`, at least one of them trained."""
    fuzzer = Fuzzer(place, max(1, count // 4), seed)
    suites(fuzzer, suite)
    data_cards(fuzzer, cards)
    result_files(fuzzer, results)
    pictures(fuzzer, next(path.parent for path in sorted(results.glob("*/weights.safetensors"))))
    return fuzzer.counts
