"""The results file: one row per run, test set and condition, the same in CSV and Parquet, refused where it is another."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.store.folder import RunFolder, find
from kitbench.store.records import Origin
from kitbench.store.results_file import Result, read_results, results, write_results
from tests.stored import store

PARQUET = importlib.util.find_spec("pyarrow") is not None


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    """Two trained runs, one of them imported and scored twice; one that is not trained and exact on an image."""
    kit = store(tmp_path / "r", "kit", [30.1, 31.0 + 1e-12], 0, settings={"k": 4}, lpips=0.25)
    store(tmp_path / "r", "kit", 28.0, 0, settings={"k": 4}, sigma=None, data_set="Set, B")
    kit.write("origin.json", Origin(key=kit.run.key, by="Zoë, Lab", archive_sha256="0", imported="2026-01-01T00:00:00"))
    store(tmp_path / "r", "conv", 29.0, 1)
    exact = store(tmp_path / "r", "input", [20.0, 21.0], None)
    [record] = (exact.path / "eval").iterdir()
    evaluation = exact.evaluations()[0]
    first, *rest = evaluation.scores
    scores = (first.model_copy(update={"psnr": None}), *rest)
    exact.write(f"eval/{record.name}", evaluation.model_copy(update={"scores": scores}))
    return find([tmp_path / "r"])


def test_a_row_for_each_run_test_set_and_condition(runs: list[RunFolder]) -> None:
    found = results(runs)
    expected = {
        (folder.run.key, e.data_set, e.sigma, e.stamp): (e.mean_ssim, len(e.scores))
        for folder in runs
        for e in folder.evaluations()
    }
    assert len(found) == len(expected) == 4
    assert {(row.run, row.data_set, row.sigma, row.protocol): (row.ssim, row.images) for row in found} == expected
    [first] = [row for row in found if row.method == "kit" and row.sigma == 25]
    assert (first.psnr_db, first.lpips, first.run_by, first.seed) == ((30.1 + 31.0 + 1e-12) / 2, 0.25, "Zoë, Lab", 0)
    assert (first.parameters, first.macs, first.settings) == (1234, 2_500_000_000, '{"k": 4}')
    [exact] = [row for row in found if row.method == "input"]
    assert (exact.psnr_db, exact.seed, exact.parameters, exact.comparison, exact.run_by) == (None, None, None, "", None)


@pytest.mark.parametrize(
    "end", ["csv", pytest.param("parquet", marks=pytest.mark.skipif(not PARQUET, reason="pyarrow is not installed"))]
)
def test_what_is_written_is_read_back_to_the_last_bit(end: str, runs: list[RunFolder], tmp_path: Path) -> None:
    out = tmp_path / f"results.{end}"
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "r"), "--out", str(out)])
    assert (done.exit_code, done.output) == (0, f"wrote {out} (4 rows)\n")
    assert read_results(out) == results(runs)
    if end == "csv":
        with out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == list(Result.model_fields)
        assert {row["schema_version"] for row in rows} == {"1"}
        assert "2500000000" in {row["macs"] for row in rows}  # whole numbers stay whole where others are missing


def test_parquet_without_pyarrow_is_refused_before_anything_is_written(
    runs: list[RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="Parquet needs the package pyarrow, which is not installed: pip install"):
        write_results(results(runs), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="Parquet needs the package pyarrow"):
        read_results(tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("\n1,", "\n2,", "row 1, has schema version 2, this kitbench reads 1"),
        ("psnr_db", "psnr", "is not a results file: psnr_db: Field required"),
        ("0.5", "half", "is not a results file: ssim: Input should be a valid number"),
    ],
)
def test_another_table_is_refused(old: str, new: str, expected: str, runs: list[RunFolder], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_results(results(runs), path)
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    with pytest.raises(InputError, match=expected):
        read_results(path)
    with pytest.raises(InputError, match="cannot be read as a results file"):
        read_results(tmp_path / "none.csv")


def test_a_table_from_a_spreadsheet_is_read_and_an_empty_one_refused(runs: list[RunFolder], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_results(results(runs), path)
    path.write_text(path.read_text("utf-8"), "utf-8-sig")
    assert read_results(path) == results(runs)
    for text in ("", "a,b\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"x\.csv has no row of results; give another file\."):
            read_results(path)


def test_a_run_that_is_in_two_folders_has_one_row_each_or_is_refused(runs: list[RunFolder], tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "r", tmp_path / "copy")
    both = [*runs, *find([tmp_path / "copy"])]
    assert results(both) == results(runs)
    store(tmp_path / "copy", "conv", 29.5, 1)
    with pytest.raises(InputError, match=r"is in two of these folders, with unequal scores on Set_A; give one of them"):
        results(both)


def test_the_suffix_may_be_in_upper_case(tmp_path: Path) -> None:
    found = results([store(tmp_path, "kit", 30.0)])
    write_results(found, tmp_path / "R.CSV")
    assert read_results(tmp_path / "R.CSV") == found
