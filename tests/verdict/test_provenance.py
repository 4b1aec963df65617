"""Rows made by other code, another release of torch, other threads or flags never share a table unmarked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kitbench.errors import InputError
from kitbench.spec import loading
from kitbench.spec.fields import digest
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Origin
from kitbench.verdict.against import against_sheets
from kitbench.verdict.claims import claims
from kitbench.verdict.contrasts import blocks
from kitbench.verdict.curves import curves_markdown
from kitbench.verdict.entries import entries, labels
from kitbench.verdict.ladder import ladder_sheet, ladders
from kitbench.verdict.page.report import report
from kitbench.verdict.render import Format, render
from tests.stored import evidence_of, store

QUICK = loading.load_suite("denoise", "quick")
FORMATS: tuple[Format, ...] = ("terminal", "markdown", "latex", "csv", "json")


def alter(folder: RunFolder, change: dict[str, object], record: str = "run.json") -> None:
    """Change a stored record's environment, as somebody could who copies a run, with a checksum that fits."""
    path = folder.path / record
    raw = json.loads(path.read_text())
    del raw["sha256"]
    for key, value in change.items():
        place = raw
        *parents, last = key.split(".")
        for parent in parents:
            place = place[parent]
        place[last] = value
    raw["sha256"] = digest(raw)
    path.write_text(json.dumps(raw))


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, RunFolder]:
    folders = {}
    for method, gain in (("conv", 0.0), ("kit", 1.0), ("window", 0.5), ("local", 0.5), ("kit-random", 0.2)):
        for seed in range(3):
            folders[f"{method}-{seed}"] = store(tmp_path, method, [30 + gain, 31 + gain] * 4, seed=seed, of=QUICK)
    return folders


def shown(folders: dict[str, RunFolder]) -> str:
    return "\n".join(render(list(folders.values()), form) for form in FORMATS)


def test_runs_of_one_code_and_environment_carry_no_mark(stored: dict[str, RunFolder]) -> None:
    assert "unlike" not in shown(stored)
    assert "¶" not in shown(stored)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"environment.versions.torch": "2.1.0"}, "torch 2.1.0 instead of 2"),
        ({"environment.threads": 64}, "threads 64 instead of 1"),
        ({"environment.commit": "a" * 40 + "+dirty"}, "commit aaaaaaaaaa+dirty instead of not recorded"),
        ({"source": {"training": "b" * 64}}, "source of the training bbbbbbbbbb instead of not recorded"),
        ({"environment.flags": {"processes": 2}}, "processes 2 instead of 1"),
        ({"environment.flags": {"processes": 1, "micro_batch": 1}}, "micro-batch 1 instead of none"),
        ({"environment.flags": {"tf32": True}}, "flags tf32 True instead of not recorded"),
    ],
)
def test_an_altered_run_is_marked_in_every_format_in_the_report_and_in_claims(
    stored: dict[str, RunFolder], change: dict[str, object], expected: str
) -> None:
    alter(stored["kit-1"], change)
    runs = list(stored.values())
    for form in FORMATS:
        text = " ".join(render(runs, form).split())
        assert expected in text.replace("\\", ""), form
        if form in ("terminal", "markdown", "latex"):
            assert ("kit\\P{}" if form == "latex" else "kit¶") in text
            assert "window¶" not in text
    assert expected in report(runs, [])
    assert "kit¶" in report(runs, [])
    of_kit = [
        evidence_of(part) for claim in claims(runs, []) for part in claim.parts if "kit - window" in evidence_of(part)
    ]
    assert len(of_kit) == 2
    assert all(expected in text for text in of_kit)


def test_a_scoring_by_other_code_is_marked(stored: dict[str, RunFolder]) -> None:
    [record] = stored["window-2"].path.glob("eval/*.json")
    numerics = {"source": {"scoring": "c" * 64}, "torch": "2", "threads": 1, "flags": {}}
    alter(stored["window-2"], {"numerics": numerics}, f"eval/{record.name}")
    text = " ".join(render(find([stored["kit-0"].path.parent]), "terminal").split())
    assert (
        "Runs of window were made differently from most: source of the scoring cccccccccc instead of not recorded"
        in text
    )


def test_another_commit_is_marked_unless_the_source_that_decides_numbers_is_the_same(
    stored: dict[str, RunFolder],
) -> None:
    alter(stored["local-0"], {"environment.commit": "d" * 40})
    said = "Runs of local were made differently from most: commit dddddddddd instead of not recorded"
    assert said in " ".join(shown(stored).split())
    for folder in stored.values():
        alter(folder, {"source": dict.fromkeys(("attention", "network", "data", "training", "scoring"), "e" * 64)})
        [record] = folder.path.glob("eval/*.json")
        numerics = {"source": {"scoring": "e" * 64}, "torch": "2", "threads": 1, "flags": {}}
        alter(folder, {"numerics": numerics}, f"eval/{record.name}")
    assert "unlike" not in shown(stored)
    assert "¶" not in shown(stored)
    alter(stored["local-0"], {"source.training": "f" * 64})
    said = "commit dddddddddd instead of not recorded; source of the training ffffffffff instead of eeeeeeeeee"
    assert said in " ".join(shown(stored).split())


def test_tables_of_differences_name_who_made_the_runs(stored: dict[str, RunFolder], tmp_path: Path) -> None:
    for seed in range(3):
        origin = Origin(key=stored[f"kit-{seed}"].run.key, by="Mallory", archive_sha256="a" * 64, imported="2026")
        stored[f"kit-{seed}"].write("origin.json", origin)
        for method in ("kit", "conv"):
            store(tmp_path, method, [31.0, 32.0] * 4, seed=seed, of=QUICK, steps=3000, curve={3000: 30.0})
    runs, said = find([tmp_path]), "¶ Runs of kit were imported, run by Mallory."
    assert said in against_sheets(runs, "conv")[1].notes
    assert said in curves_markdown(runs, [])
    [ladder] = ladders(blocks(entries(runs, None)))
    assert said in ladder_sheet(ladder).notes


def test_two_runs_that_say_they_are_the_same_one_are_refused(stored: dict[str, RunFolder], tmp_path: Path) -> None:
    """Their seed would count twice, and one's scores would replace the other's."""
    twin = RunFolder(tmp_path / "twin")
    shutil.copytree(stored["kit-1"].path, twin.path)
    [record] = twin.path.glob("eval/*.json")
    for name in ("run.json", f"eval/{record.name}"):
        alter(twin, {"key": "f" * 64}, name)
    with pytest.raises(InputError, match=r"ffffffffff both say that they are kit, seed 1.*one is not what it says"):
        entries(find([tmp_path]), None)


def test_a_shipped_name_stands_for_its_attention_only(tmp_path: Path) -> None:
    """`--set methods.local.attention=global` trains global attention."""
    store(tmp_path, "local", 30.0, attention="global")
    store(tmp_path, "kit-exact", 30.0, attention="kit")
    store(tmp_path, "own", 30.0, attention="global")
    assert set(labels(entries(find([tmp_path]), None)).values()) == {"local (attention global)", "kit-exact", "own"}


def test_a_run_counts_once_on_however_many_sets_it_was_scored(tmp_path: Path) -> None:
    for data_set in ("Set_A", "Set_B", "Set_C"):
        folder = store(tmp_path, "kit", [30.0, 31.0], data_set=data_set)
    alter(folder, {"environment.versions.torch": "1.9"})
    for method in ("window", "local"):
        store(tmp_path, method, [30.0, 31.0])
    text = render(find([tmp_path]), "markdown")
    assert "Runs of kit were made differently from most: torch 1.9 instead of 2." in text
    assert text.count("were made differently from most") == 1
