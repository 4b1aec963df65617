"""What becomes of stored runs when things go wrong: kills, full disks, damage, crowds, nonsense. Prints counts.

    python benchmarks/faults.py                          everything, about 20 minutes on two cores
    python benchmarks/faults.py kills --count 50         one part: kills, disk, damage, crowd, fuzz

Every command is the real one, in a process of its own (real_commands.py). A part fails where a process leaves a
traceback, an exit code that is none of 0, 2 and 3, a half-written file, a lost or changed number, or a file outside its
folder.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from real_commands import RUN, SUITE, Command, digest, folder, kitbench, leftovers, numbers, phase, require


def kills(count: int, seed: int = 0) -> Counter[str]:
    """SIGKILL at random moments, then the same command: everything as if it had never been killed.

    Three of four kills hit `run`, one hits `table --out`. A resumed run is killed again in a third of the cases.
    """
    draw, counts = random.Random(seed), Counter[str]()
    with folder() as place:
        kitbench(place, *RUN)
        expected = numbers(place / "results")
        table = (
            kitbench(place, "table", "results", "--format", "csv", "--out", "table.csv")
            and (place / "table.csv").read_bytes()
        )
        for number in range(count):
            if number % 4 == 1:
                (place / "table.csv").write_bytes(b"old\n")
                command = Command(place, "table", "results", "--format", "csv", "--out", "table.csv")
                time.sleep(draw.uniform(0, 0.5))
                command.kill()
                require((place / "table.csv").read_bytes() in (b"old\n", table), "a table was half written")
                require(kitbench(place, *command.arguments).code == 0, "the table could not be written again")
                require((place / "table.csv").read_bytes() == table, "the table changed")
                counts["killed while writing the table"] += 1
                continue
            with folder() as other:
                for again in range(2 if number % 3 == 0 else 1):
                    command = Command(other, *RUN)
                    while not again and phase(other / "results") == "preparing" and command.process.is_alive():
                        time.sleep(0.002)
                    time.sleep(draw.uniform(0, 1.6))
                    counts[f"killed in {phase(other / 'results')}"] += 1
                    command.kill()
                done = kitbench(other, *RUN)
                require(done.code == 0, f"the run did not go on: {done.text[-500:]}")
                require(numbers(other / "results") == expected, "a resumed run has other numbers")
                require(not leftovers(other / "results"), f"left behind: {leftovers(other / 'results')}")
                counts["resumed bit-identical"] += 1
    return counts


@contextmanager
def mounted(*options: str) -> Iterator[Path | None]:
    """A file system of its own in memory; None where this process may not mount one."""
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", place]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            yield None
            return
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def disk(sizes: tuple[int, ...] = (40, 80, 140, 200, 300, 420)) -> Counter[str]:
    """A disk of so many KiB beyond what is asked for up front, and one that is read-only: told, and nothing is lost."""
    counts: Counter[str] = Counter()
    with folder() as place:
        kitbench(place, *RUN)
        expected = numbers(place / "results")
    for kib in sizes:
        # Room for what `run` asks before it starts, filled by somebody else while it runs.
        with folder() as place, mounted("-o", "size=16m") as small:
            if small is None:
                counts["disk full: not tried, no right to mount"] += 1
                return counts
            command = Command(place, *RUN, "--out", str(small / "results"))
            while phase(small / "results") == "preparing" and command.process.is_alive():
                time.sleep(0.002)
            with suppress(OSError), (small / "filler").open("wb") as filler:
                free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
                filler.write(bytes(max(0, free - (kib << 10))))
            done = command.wait()
            if done.code == 0:
                counts["disk large enough after all"] += 1
            else:
                require(
                    "no space is left where the output goes" in done.text,
                    f"a full disk is not told: {done.text[-800:]}",
                )
                passing = ("failed.json", "progress.json")
                kept = {path: digest(path) for path in small.rglob("*.json") if path.name not in passing}
                (small / "filler").unlink()
                require(kitbench(place, *RUN, "--out", str(small / "results")).code == 0, "did not go on with space")
                require(all(digest(path) == sha for path, sha in kept.items()), "a stored record changed")
                counts["disk full, told and gone on"] += 1
            require(numbers(small / "results") == expected, "other numbers after a full disk")
    with folder() as place, mounted("-o", "size=1m") as small:
        assert small is not None
        done = kitbench(place, *RUN, "--out", str(small / "results"))
        require(done.code == 2 and "free some" in done.text, f"too small a disk is not refused: {done.text[-500:]}")
        require(not list(small.iterdir()), "something was written to too small a disk")
        counts["too small a disk refused before anything is written"] += 1
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        done = kitbench(place, *RUN, "--out", str(small / "results"))
        require(done.code == 2 and "cannot be written" in done.text, f"read-only is not told: {done.text[-500:]}")
        counts["read-only folder refused"] += 1
    return counts


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def flip(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {"truncated": cut, "bit flipped": flip}
READERS = (
    ("table", "results", "--format", "csv", "--out", "table.csv"),
    ("report", "results", "--out", "report.html"),
    ("claims", "results", "--out", "claims.md"),
    ("diff", "results/A", "results/B"),
    ("status", "results"),
    RUN,
)


def damage(
    rounds: int = 1, seed: int = 0, readers: tuple[tuple[str, ...], ...] = READERS, suffixes: tuple[str, ...] = ()
) -> Counter[str]:
    """Every file of a finished run (of these suffixes), cut and with a bit flipped: told, and no other touched."""
    draw, counts = random.Random(seed), Counter[str]()
    with folder() as place:
        kitbench(place, *RUN)
        run = next((place / "results").glob("*-s0-*"))
        names = {"results/A": f"results/{run.name}", "results/B": "results/B"}
        files = [p.relative_to(place) for p in run.rglob("*") if p.is_file() and p.name != ".lock"]
        for path in sorted(p for p in files if not suffixes or p.suffix in suffixes):
            for kind, change in [item for item in DAMAGE.items() for _ in range(rounds)]:
                with folder() as other:
                    shutil.copytree(place / "results", other / "results")
                    shutil.copytree(run, other / "spare" / "B")
                    (other / "results" / "B").symlink_to(other / "spare" / "B")
                    (other / path).write_bytes(change((place / path).read_bytes(), draw))
                    whole = {p: digest(p) for p in (other / "results").rglob("*") if p.is_file() and p != other / path}
                    told = False
                    # Weights are read again only where an evaluation is missing.
                    more = [(*RUN, "--set", "task.sigma_test=[15, 50]")] if path.suffix == ".safetensors" else []
                    for reader in (*readers, *more):
                        done = kitbench(other, *(names.get(word, word) for word in reader))
                        told |= done.code != 0
                    changed = [p.name for p, sha in whole.items() if digest(p) != sha and p.name != "failed.json"]
                    require(not changed, f"damage to {path} changed {changed}")
                    counts[f"{kind}, {'told' if told else 'not noticed'}: {kind_of(path)}"] += 1
    return counts


def kind_of(path: Path) -> str:
    return path.name if path.parent.name not in ("eval", "crops") else f"{path.parent.name}/*"


def checkpoints(rounds: int = 4, seed: int = 0) -> Counter[str]:
    """The newest checkpoint damaged: the one before it is used, and the end is the same to the last bit."""
    draw, counts = random.Random(seed), Counter[str]()
    with folder() as place:
        kitbench(place, *RUN)
        expected = numbers(place / "results")
    for kind, change in [item for item in DAMAGE.items() for _ in range(rounds)]:
        with folder() as place:
            command = Command(place, *RUN)
            while not list((place / "results").glob("*/checkpoint-previous.safetensors")):
                require(command.process.is_alive(), "it ended before it was killed")
                time.sleep(0.002)
            command.kill()
            [path] = (place / "results").glob("*/checkpoint.safetensors")
            path.write_bytes(change(path.read_bytes(), draw))
            done = kitbench(place, *RUN)
            require(done.code == 0 and "going on from the one before it" in done.text, f"not told: {done.text[-800:]}")
            require(numbers(place / "results") == expected, "other numbers from the checkpoint before")
            counts[f"{kind}, told and gone on from the one before: checkpoint"] += 1
    return counts


CROWD = SUITE.replace("[methods.conv]", "[methods.conv]\n[methods.window]").replace("seeds = [0]", "seeds = [0, 1]")


def crowd(processes: int = 4) -> Counter[str]:
    """Several processes on one folder and one suite: every run made once, the table complete for each of them."""
    with folder(CROWD) as place:
        commands = [Command(place, *RUN) for _ in range(processes)]
        ends = [command.wait() for command in commands]
        require(all(done.code == 0 for done in ends), f"one failed: {[done.text[-300:] for done in ends]}")
        runs = sorted(path.parent for path in (place / "results").glob("*/run.json"))
        trained = Counter(
            line
            for done in ends
            for line in {" ".join(words) for words in re.findall(r"colour (\w+) seed (\d+)  24/24", done.text)}
        )
        require(len(runs) == 5 and set(trained.values()) == {1} and len(trained) == 4, f"made: {dict(trained)}")
        tables = {done.text[done.text.index("\nMethod") : done.text.index("wrote ")] for done in ends}
        require(len(tables) == 1, "the processes printed different tables")
        require(not leftovers(place / "results"), f"left behind: {leftovers(place / 'results')}")
        return Counter({"processes": processes, "runs, each made once": len(runs), "equal tables": processes})


def nonsense(count: int = 1000, seed: int = 0) -> Counter[str]:
    """Fuzzed suites, data cards, result files and pictures (fuzz.py): an answer or one sentence each."""
    from fuzz import fuzz

    with folder() as place:
        kitbench(place, *RUN, "--out", str(place / "inside" / "results"))
        cards = [path.read_text() for path in sorted((Path(__file__).parent.parent / "datasets").glob("*.toml"))]
        before = Path.cwd()
        os.chdir(place / "inside")
        try:
            return fuzz(place / "inside", place / "inside" / "results", SUITE, cards, count, seed)
        finally:
            os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["kills", "disk", "damage", "crowd", "fuzz"])
    parser.add_argument("--count", type=int, help="how many kills, or examples of the fuzzer")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    for part in chosen.parts:
        clock = time.perf_counter()
        if part == "kills":
            counts = kills(chosen.count or 50, chosen.seed)
        elif part == "disk":
            counts = disk()
        elif part == "damage":
            counts = damage(seed=chosen.seed) + checkpoints(seed=chosen.seed)
        elif part == "crowd":
            counts = crowd()
        elif part == "fuzz":
            counts = nonsense(chosen.count or 1000, chosen.seed)
        else:
            parser.error(f"unknown part {part}")
        print(f"{part}: {time.perf_counter() - clock:.0f} s", flush=True)
        for what, count in sorted(counts.items()):
            print(f"  {count:5d}  {what}", flush=True)


if __name__ == "__main__":
    main()
