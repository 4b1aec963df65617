"""Runs that others made: exported, imported marked, refused where they are not comparable; nothing half-written."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from kitbench.apply import exchange
from kitbench.cli.main import cli
from kitbench.spec.loading import load_suite
from kitbench.store.archive import MANIFEST
from kitbench.store.folder import find
from kitbench.store.records import Origin, Progress
from kitbench.verdict.claims import claims
from kitbench.verdict.page.report import report
from kitbench.verdict.render import Format, render
from tests.apply.conftest import invoke
from tests.conftest import ROOT
from tests.stored import evidence_of, rewrite, store, store_whole

FORMATS: tuple[Format, ...] = ("terminal", "markdown", "latex", "csv", "json")
BY = "Jane Doe, Elsewhere"
PROGRESS = Progress(phase="scoring", done=1, total=2, seconds_left=None, updated=0.0, host="h")
Contents = dict[str, bytes]


def exported(stranger: Path) -> Path:
    archive = stranger.parent / "theirs.zip"
    invoke("export", stranger, "--out", archive, "--by", BY)
    return archive


def repacked(archive: Path, change: Callable[[Contents], object]) -> Path:
    """The archive with other contents, and without a change of its manifest unless `change` makes it."""
    with zipfile.ZipFile(archive) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    change(contents)
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in contents.items():
            new.writestr(name, data)
    return archive


def test_imported_runs_stand_in_the_same_table_marked_in_every_format_and_in_the_report(
    stranger: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ours"
    for seed in (0, 1):
        store_whole(out, "local", seed)
    invoke("import", exported(stranger), "--out", out)
    runs = find([out])
    assert sorted((r.run.method, r.run.seed, r.origin.by if r.origin else None) for r in runs) == [
        ("kit", 0, BY), ("kit", 1, BY), ("local", 0, None), ("local", 1, None),
    ]  # fmt: skip
    for form in FORMATS:
        text = " ".join(render(runs, form).split())
        assert f"imported, run by {BY}" in text, form
        if form in ("terminal", "markdown", "latex"):
            assert ("kit\\P{}" if form == "latex" else "kit¶") in text
            assert "local¶" not in text
    page = report(runs, [])
    assert f"imported, run by {BY}" in page
    assert "kit¶" in page
    # What was imported is exported with the name of who made it, not of who passes it on.
    invoke("export", out, "--out", tmp_path / "again.zip", "--by", "us")
    invoke("import", tmp_path / "again.zip", "--out", tmp_path / "third")
    assert {f.run.method: f.origin.by for f in find([tmp_path / "third"]) if f.origin} == {"kit": BY, "local": "us"}


def test_claims_say_who_made_imported_runs(tmp_path: Path) -> None:
    quick = load_suite("denoise")
    for method, gain in (("conv", 0.0), ("kit", 1.0), ("window", 0.5)):
        for seed in range(3):
            folder = store(tmp_path, method, [30 + gain, 31 + gain] * 4, seed, of=quick)
            if (method, seed) == ("kit", 1):
                folder.write("origin.json", Origin(key=folder.run.key, by=BY, archive_sha256="0", imported="2026"))
    found = [evidence_of(part) for claim in claims(find([tmp_path]), []) for part in claim.parts]
    of_kit = [text for text in found if "kit - window" in text]
    assert of_kit
    assert all(f"runs of kit were imported, run by {BY}" in text for text in of_kit)
    assert not [text for text in found if "imported" in text and "kit" not in text]


def test_a_local_run_is_never_replaced(stranger: Path, tmp_path: Path) -> None:
    ours = store_whole(tmp_path / "ours", "kit", 0, psnr=20.0)
    before = {path: path.read_bytes() for path in ours.path.rglob("*.json")}
    done = invoke("import", exported(stranger), "--out", tmp_path / "ours")
    assert (
        f"left out {ours.path.name}: already here, with other scores: of an image, up to 10 dB and SSIM 0;"
        in done.output
    )
    assert "kitbench diff" in done.output
    assert "1 run imported" in done.output
    assert {path: path.read_bytes() for path in ours.path.rglob("*.json")} == before
    # Nor where it lies under another name.
    shutil.rmtree(tmp_path / "ours")
    ours = store_whole(tmp_path / "ours", "kit", 0, psnr=20.0)
    ours.path.rename(tmp_path / "ours" / "mine")
    assert "1 run imported" in invoke("import", tmp_path / "theirs.zip", "--out", tmp_path / "ours").output
    assert "0 runs imported" in invoke("import", tmp_path / "theirs.zip", "--out", tmp_path / "ours").output


def test_a_clone_that_differs_in_nothing_that_decides_a_number_is_imported_and_marked(
    stranger: Path, tmp_path: Path
) -> None:
    store_whole(tmp_path / "ours", "local")
    for folder in find([stranger]):
        rewrite(folder.path / "run.json", lambda raw: raw["environment"].update(commit="a" * 40 + "+dirty"))
    invoke("import", exported(stranger), "--out", tmp_path / "ours")
    text = render(find([tmp_path / "ours"]), "markdown")
    assert f"¶ Runs of kit were imported, run by {BY}.\n" in text  # its commit alone marks no run, ours neither
    commits = {folder.run.environment.commit for folder in find([tmp_path / "ours"]) if folder.run.method == "kit"}
    assert commits == {"a" * 40 + "+dirty"}


def replace(contents: Contents, name: str, data: bytes, listed: bool) -> None:
    """Put a file into an archive, with `listed` also into its manifest."""
    contents[name] = data
    if listed:
        manifest = json.loads(contents[MANIFEST])
        manifest["files"][name] = hashlib.sha256(data).hexdigest()
        contents[MANIFEST] = json.dumps(manifest).encode()


def first(contents: Contents, end: str) -> str:
    return next(name for name in contents if name.endswith(end))


FAULTS: dict[str, tuple[Callable[[Contents], object], str]] = {
    "checksum": (
        lambda c: replace(c, first(c, "run.json"), b"{}", listed=False),
        "run.json does not have the checksum that the manifest states",
    ),
    "traversal": (lambda c: replace(c, "../evil/run.json", b"{}", listed=True), "'../evil/run.json', which is not the"),
    "inner traversal": (
        lambda c: replace(c, first(c, "run.json").replace("run.json", "eval/../../../x.json"), b"{}", listed=True),
        "which is not the name of a record",
    ),
    "absolute": (lambda c: replace(c, "/etc/run.json", b"{}", listed=True), "'/etc/run.json', which is not the name"),
    "pickle": (lambda c: replace(c, "a/checkpoint.pt", b"", listed=True), "'a/checkpoint.pt', which is not the name"),
    "origin": (lambda c: replace(c, "a/origin.json", b"{}", listed=True), "'a/origin.json', which is not the name"),
    "unlisted": (lambda c: replace(c, "a/run.json", b"{}", listed=False), "contains a/run.json, unlike what its"),
    "missing": (lambda c: c.pop(first(c, "training.json")), "lacks "),
    "nobody": (
        lambda c: replace(c, "a/run.json", b"{}", listed=True),
        "does not state for each of its runs who made it",
    ),
    "no record": (
        lambda c: replace(c, first(c, "run.json"), b'{"schema_version": 1}', listed=True),
        "is not a valid record",
    ),
    "no manifest": (lambda c: c.pop(MANIFEST), f"contains no {MANIFEST}"),
    "newer": (
        lambda c: c.update({MANIFEST: b'{"schema_version": 2}'}),
        "has schema version '2', this kitbench reads 1",
    ),
    "by a table": (
        lambda c: c.update({MANIFEST: c[MANIFEST].replace(BY.encode(), b"a|b")}),
        "has characters that are not allowed there; ask its author",
    ),
    "no json": (lambda c: c.update({MANIFEST: b"{"}), f"has no valid {MANIFEST}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_hostile_archive_is_refused_and_nothing_is_written(
    fault: str, stranger: Path, tmp_path: Path
) -> None:
    change, expected = FAULTS[fault]
    archive = repacked(exported(stranger), change)
    before = sorted(tmp_path.rglob("*"))
    done = invoke("import", archive, "--out", tmp_path / "ours", code=2)
    assert expected in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9])
def test_a_truncated_archive_is_refused(cut: float, stranger: Path, tmp_path: Path) -> None:
    archive = exported(stranger)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * cut)])
    assert "cannot be read as an archive of runs" in invoke("import", archive, "--out", tmp_path / "o", code=2).stderr
    absent = tmp_path / "absent.zip"
    assert f"{absent} is not a file" in invoke("import", absent, "--out", tmp_path / "o", code=2).stderr
    assert not (tmp_path / "o").exists()


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(stranger: Path, tmp_path: Path) -> None:
    archive = exported(stranger)
    data = bytearray(archive.read_bytes())
    for place in range(40, len(data), len(data) // 12):
        archive.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        done = CliRunner().invoke(cli, ["import", str(archive), "--out", str(tmp_path / "o")])
        assert done.exit_code in (0, 2), done.output
        if done.exit_code == 2:
            assert not (tmp_path / "o").exists()
        else:  # a field of the ZIP format that no content depends on
            for folder in find([stranger]):
                assert (tmp_path / "o" / folder.path.name / "run.json").read_bytes() == (
                    folder.path / "run.json"
                ).read_bytes()
            shutil.rmtree(tmp_path / "o")


def test_runs_of_another_task_on_the_same_set_are_no_other_version_of_it(stranger: Path, tmp_path: Path) -> None:
    """Where the task makes the inputs, its degradation is part of a set's digest."""
    store(tmp_path / "ours", "local", 30.0, of=load_suite("derain", "smoke"), sha256="dd", sigma=None)
    assert "2 runs imported" in invoke("import", exported(stranger), "--out", tmp_path / "ours").output


def test_a_recipe_that_a_preset_of_a_shipped_suite_changes_is_a_shipped_one(tmp_path: Path) -> None:
    family = load_suite("family", "quick")
    assert family.recipe.name == "quick"
    assert family.recipe.steps != load_suite("denoise", "quick").recipe.steps
    store_whole(tmp_path / "theirs", "kit", of=family)
    assert "1 run imported" in invoke("import", exported(tmp_path / "theirs"), "--out", tmp_path / "ours").output


def test_a_run_scored_on_a_folder_of_any_name_is_exported(tmp_path: Path) -> None:
    [name] = store_whole(tmp_path / "theirs", "kit", data_set="./.").evaluations()
    invoke("import", exported(tmp_path / "theirs"), "--out", tmp_path / "ours")
    [folder] = find([tmp_path / "ours"])
    assert folder.evaluations() == [name]


def test_runs_are_not_imported_into_a_run(stranger: Path, tmp_path: Path) -> None:
    ours = store_whole(tmp_path / "ours", "local")
    assert "is the folder of a run" in invoke("import", exported(stranger), "--out", ours.path, code=2).stderr
    assert not list(ours.path.glob("*/run.json"))


def test_an_archive_of_another_compression_is_refused(stranger: Path, tmp_path: Path) -> None:
    """Damaged LZMA data raise an exception of that module alone."""
    archive = exported(stranger)
    with zipfile.ZipFile(archive) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as new:
        for name, data in contents.items():
            new.writestr(name, data)
    assert "is compressed otherwise" in invoke("import", archive, "--out", tmp_path / "ours", code=2).stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(OSError(28, "No space left"), 2, "(No space left)"), (KeyboardInterrupt(), 3, "kitbench: stopped")],
)
@pytest.mark.parametrize("moved", [True, False])
def test_what_fails_half_way_is_taken_back(
    moved: bool, error: BaseException, code: int, said: str, stranger: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """When the first of two runs is moved or written, and the second one is not."""
    archive, rename, replace = exported(stranger), Path.rename, Path.replace

    def fail(self: Path, target: Path) -> Path:
        if list((tmp_path / "ours").glob("denoise-*" if moved else ".import-*/denoise-*/training.json")):
            raise error
        return rename(self, target) if moved else replace(self, target)

    monkeypatch.setattr(Path, "rename" if moved else "replace", fail)
    done = invoke("import", archive, "--out", tmp_path / "ours", code=code)
    assert said in done.stderr
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("by", ["", " ", "x" * 81, "two\nlines", "a\u2028b", "\x9b31m", "\u202eb", "a|b", "<script>"])
def test_who_made_the_runs_is_one_plain_line(by: str, stranger: Path, tmp_path: Path) -> None:
    invoke("export", stranger, "--out", tmp_path / "x.zip", "--by", by, code=2)
    assert not (tmp_path / "x.zip").exists()


def test_a_run_that_failed_or_is_still_scored_is_left_out(stranger: Path, tmp_path: Path) -> None:
    store_whole(stranger, "local")
    failed, scored = find([stranger])[:2]
    failed.fail(failed.run.key, "out of memory")
    scored.write("progress.json", PROGRESS)
    said = invoke("export", stranger, "--out", tmp_path / "x.zip", "--by", BY).output
    assert said.count(": not complete\n") == 2
    assert "(1 run)" in said


def test_a_damaged_log_is_not_exported(stranger: Path, tmp_path: Path) -> None:
    log = find([stranger])[0].log
    log.write_text(log.read_text() + "garbage\n")
    done = invoke("export", stranger, "--out", tmp_path / "x.ZIP", "--by", BY, code=2)
    assert "log.csv is not a training log" in done.stderr
    assert not (tmp_path / "x.ZIP").exists()


def test_exports_say_what_they_need(stranger: Path, tmp_path: Path) -> None:
    assert "--by is missing: say in one line" in invoke("export", stranger, "--out", tmp_path / "x.zip", code=2).stderr
    done = invoke("export", stranger, "--out", tmp_path / "x.csv", "--by", BY, code=2)
    assert "--by says who made the runs of an archive (.zip); leave it out for a results file." in done.stderr
    assert "must end in .zip" in invoke("export", stranger, "--out", tmp_path / "x.tar", code=2).stderr
    for folder in find([stranger]):
        (folder.path / "training.json").unlink()
    done = invoke("export", stranger, "--out", tmp_path / "x.zip", "--by", BY, code=2)
    assert "None of the 2 runs is complete" in done.stderr


def test_stored_reference_runs_of_older_source_are_refused(tmp_path: Path) -> None:
    older = ROOT / "results" / "reference" / "denoise-cbsd68-first-cpu"
    invoke("export", older, "--out", tmp_path / "x.zip", "--by", "us")
    done = invoke("import", tmp_path / "x.zip", "--out", tmp_path / "ours", code=2)
    assert "source" in done.stderr


def test_scores_that_a_run_lacks_here_are_not_added_and_equal_ones_not_spoken_of(
    stranger: Path, tmp_path: Path
) -> None:
    store_whole(tmp_path / "ours", "kit", 0)
    store_whole(tmp_path / "ours", "kit", 1)
    archive = exported(stranger)
    said = invoke("import", archive, "--out", tmp_path / "ours").output
    assert said.count(": already here\n") == 2
    store_whole(stranger, "kit", 0, data_set="Set_B", sha256="bb")
    said = invoke("import", exported(stranger), "--out", tmp_path / "ours").output
    assert "already here, without the archive's scores on Set_B σ25, which are not added\n" in said


def test_an_import_says_where_tables_will_ask_for_a_protocol(stranger: Path, tmp_path: Path) -> None:
    store_whole(tmp_path / "ours", "local")
    for folder in find([stranger]):
        [path] = (folder.path / "eval").iterdir()
        [evaluation] = folder.evaluations()
        own = evaluation.protocol.model_copy(update={"id": "mine-own"})
        rewrite(path, lambda raw, own=own: raw.update(protocol=own.model_dump(mode="json"), stamp=own.stamp))
        path.rename(folder.evaluation_path(evaluation.data_set, evaluation.sigma, own.stamp))
    said = invoke("import", exported(stranger), "--out", tmp_path / "ours").output
    assert f"{tmp_path / 'ours'} now has scores under awgn8.v1 and mine-own.v1+" in said
    assert "choose one of them with --protocol" in said
    invoke("table", tmp_path / "ours", code=2)
    invoke("table", tmp_path / "ours", "--protocol", "awgn8")
    # In a folder of their own they need no choice.
    assert "--protocol" not in invoke("import", tmp_path / "theirs.zip", "--out", tmp_path / "third").output


def test_what_a_killed_import_has_left_is_removed_by_the_next(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, left = exported(stranger), tmp_path / "ours" / ".import-abc" / "denoise-x"
    left.mkdir(parents=True)
    (left / "run.json").write_text("{}")
    # Nothing is staged in TMPDIR, which may be full.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    invoke("import", archive, "--out", tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(
        folder.path.name for folder in find([stranger])
    )


def test_two_imports_into_one_folder_wait_for_one_another(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = exported(stranger)
    (tmp_path / "ours" / ".import-abc").mkdir(parents=True)
    monkeypatch.setattr(exchange, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / "ours" / exchange.LOCK):
        said = invoke("import", archive, "--out", tmp_path / "ours", code=2).stderr
    assert "Another import into" in said
    assert (tmp_path / "ours" / ".import-abc").is_dir()


def test_a_name_too_long_for_a_file_system_is_refused_in_both_directions(stranger: Path, tmp_path: Path) -> None:
    name = f"{'a' * 300}/run.json"
    archive = repacked(exported(stranger), lambda c: replace(c, name, b"{}", listed=True))
    assert "which is not the name of a record" in invoke("import", archive, "--out", tmp_path / "o", code=2).stderr
    folder = find([stranger])[0].path
    folder.rename(folder.with_name("a" * 220))
    said = invoke("export", stranger, "--out", tmp_path / "y.zip", "--by", BY, code=2).stderr
    assert "at most 200 letters" in said


def test_a_disk_without_room_for_a_folder_is_left_as_it_was(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = exported(stranger)

    def full(**given: object) -> str:
        raise OSError(28, "No space left")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    said = invoke("import", archive, "--out", tmp_path / "new" / "ours", code=2).stderr
    assert "cannot be written to" in said
    assert "(No space left); nothing was imported" in said
    assert not (tmp_path / "new").exists()
