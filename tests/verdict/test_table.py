"""Tables: built from stored runs alone, the same bytes every time, protocols and contents never mixed."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kitbench.cli.main import cli
from kitbench.errors import InputError
from kitbench.store.folder import find
from kitbench.verdict.entries import scored_under
from kitbench.verdict.page.report import report
from kitbench.verdict.render import _latex, render
from kitbench.verdict.rows import rows
from tests.stored import rewrite, store


def test_rows_are_means_over_images_and_seeds(tmp_path: Path) -> None:
    for seed, psnr in ((0, 30.0), (1, 31.0), (2, 35.0)):
        store(tmp_path, "kit", psnr, seed)
    [row] = rows(find([tmp_path])).to_dict("records")
    assert row["psnr_db"] == pytest.approx(32.0)
    assert (row["seeds"], row["images"], row["gmacs"], row["sigma"]) == ("0,1,2", 2, 2.5, 25)
    assert len(row["runs"].split(",")) == 3


def test_the_form_of_a_computation_is_always_stated(tmp_path: Path) -> None:
    """Memory is the form's, not the method's: a lone materialised `global` must not pass for the method."""
    store(tmp_path, "global", 30.0, settings={"form": "materialised"})
    store(tmp_path, "kit", 31.0)
    for form in ("markdown", "latex", "terminal"):
        assert "global (materialised)" in render(find([tmp_path]), form)
    assert [row["form"] for row in json.loads(render(find([tmp_path]), "json"))] == ["materialised", None]
    store(tmp_path, "global", 30.5, settings={"form": "sdpa"})
    text = render(find([tmp_path]), "markdown")
    assert "| global (form materialised) |" in text
    assert "| global (form sdpa) " in text


def test_multiply_adds_beyond_what_a_definition_needs_are_printed_as_two_figures(tmp_path: Path) -> None:
    store(tmp_path, "local", 30.0, macs=1_570_000_000, needed=1_190_000_000)
    store(tmp_path, "window", 30.0, macs=1_230_000_000)
    runs = find([tmp_path])
    for text in (*(render(runs, form, wide=True) for form in ("markdown", "latex", "terminal")), report(runs, [])):
        assert "1.57 (needs 1.19)" in text
        assert "1.23 (" not in text
        flat = " ".join(text.split())
        assert "in parentheses those that the definition needs, where the implementation executes more" in flat
    by_method = {row["method"]: row for row in json.loads(render(runs, "json"))}
    assert (by_method["local"]["gmacs"], by_method["local"]["gmacs_needed"]) == (1.57, 1.19)
    assert by_method["window"]["gmacs_needed"] is None


def test_how_far_the_retrieval_of_a_method_reaches_is_noted_below_the_table(tmp_path: Path) -> None:
    on = {"k": 4, "chance": 0.02, "level": 2, "crops": 20, "images": 20, "side": 256, "sets": "Set_A", "condition": ""}
    for seed, (recall, adjacent, distance) in enumerate([(0.8, 0.5, 1.0), (0.9, 0.3, 4.0)]):
        note = {"recall": recall, "adjacent": adjacent, "distance": distance} | on
        store(tmp_path, "kit", 30.0, seed, notes={"bottom.0.attention": note})
    store(tmp_path, "conv", 30.0)
    store(tmp_path, "own", 30.0, notes={"bottom.0.attention": {"recall": 0.9, "chance": 0.1}})
    runs = find([tmp_path])
    expected = (
        "Retrieval of kit: of the 3 neighbours besides itself, at level 2 recall 0.850 (random patches 0.020), "
        "40% touch the query patch, median distance 2.5 patches; on 20 degraded crops of 20 images (Set_A), "
        "at most 256 px."
    )
    for text in (render(runs, "markdown"), render(runs, "terminal"), report(runs, [])):
        assert expected in " ".join(text.split())
        assert text.count("Retrieval of") == 1
    assert expected.replace("%", r"\%").replace("_", r"\_") in render(runs, "latex")
    by_method = {row["method"]: row["retrieval"] for row in json.loads(render(runs, "json"))}
    assert expected == f"Retrieval of kit: {by_method['kit']}."
    assert (by_method["conv"], by_method["own"]) == (None, None)


def test_best_is_bold_and_second_underlined_as_printed(tmp_path: Path) -> None:
    for method, psnr, ssim in (("kit", 30.0, 0.9), ("window", 31.0, 0.8), ("local", 31.001, 0.7)):
        store(tmp_path, method, psnr, ssim=ssim)
    store(tmp_path, "input", 20.0, seed=None)
    text = render(find([tmp_path]), "markdown")
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert list(lines) == ["Method", "input", "kit", "local", "window"]
    assert "<u>30.00</u> / **0.9000**" in lines["kit"]
    assert "**31.00** / <u>0.8000</u>" in lines["window"]
    assert "**31.00** / 0.7000" in lines["local"]  # equal as printed: both are best
    assert "1,234" in lines["kit"]
    assert "awgn8.v1" in lines["kit"]
    assert "| n/a" in lines["input"].replace("|    ", "| ").replace("  ", "")


@pytest.mark.parametrize("form", ["markdown", "latex", "csv", "json", "terminal"])
def test_the_same_runs_give_the_same_bytes_in_any_order(tmp_path: Path, form) -> None:
    store(tmp_path, "kit", 30.0, seed=1)
    store(tmp_path, "kit", 31.0, seed=0)
    store(tmp_path, "conv", 29.0)
    store(tmp_path, "nlm", 28.0, seed=None)
    runs = find([tmp_path])
    assert render(runs, form) == render(runs[::-1], form)


def test_every_row_of_csv_and_json_names_its_runs_and_protocol(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.0)
    from_csv = list(csv.DictReader(io.StringIO(render([folder], "csv"))))
    from_json = json.loads(render([folder], "json"))
    for row in (*from_csv, *from_json):
        assert row["runs"] == folder.run.key[:10]
        assert row["protocol"] == "awgn8.v1"
        assert float(row["psnr_db"]) == pytest.approx(30.0)
    assert from_json[0]["lpips"] is None


def test_a_run_in_two_folders_counts_once(tmp_path: Path) -> None:
    for out in ("a", "b"):
        for seed, psnr in ((0, 30.0), (1, 31.0)):
            store(tmp_path / out, "kit", psnr, seed)
    [row] = rows(find([tmp_path / "a", tmp_path / "b"])).to_dict("records")
    assert row["seeds"] == "0,1"
    assert row["psnr_pm_seeds"] == pytest.approx(12.706 * 0.5, rel=1e-4)  # Student, one degree of freedom
    store(tmp_path / "b", "kit", 30.5, 1)
    with pytest.raises(InputError, match=r"is in two of these folders, with unequal scores on Set_A; give one of them"):
        rows(find([tmp_path / "a", tmp_path / "b"]))


def test_a_block_of_references_is_titled_by_its_own_mode(tmp_path: Path) -> None:
    for mode in ("gray", "colour"):
        file = store(tmp_path / mode, "nlm", 30.0, seed=None).path / "run.json"
        record = json.loads(file.read_text())
        record.pop("sha256")
        file.write_text(json.dumps(record | {"mode": mode, "key": mode}))
    text = render(find([tmp_path / "gray", tmp_path / "colour"]), "markdown")
    assert re.findall(r"denoise, (\w+): training-free methods", text) == ["colour", "gray"]


def test_references_stand_beside_trained_rows_in_their_columns_alone_with_what_differs_there(tmp_path: Path) -> None:
    """A folder of each set: the reference was scored in both, once by the torch of the one and once by another."""
    for out, torch, data_set, lr in (("a", "2", "Set_A", 1e-3), ("b", "3", "Set_B", 1e-4)):
        for method in ("kit", "window"):
            folder = store(tmp_path / out, method, 30.0, lr=lr, data_set=data_set)
            rewrite(
                folder.path / "run.json", lambda raw, torch=torch: raw["environment"]["versions"].update(torch=torch)
            )
    for data_set in ("Set_A", "Set_B", "Set_C"):
        store(tmp_path / "b", "input", 20.0, seed=None, data_set=data_set)
    text = render(find([tmp_path / "a", tmp_path / "b"]), "markdown")
    blocks = text.split("**denoise, ")[1:]
    of_set = {name: next(block for block in blocks if f"{name} " in block) for name in ("Set_A", "Set_B", "Set_C")}
    assert [name for name in of_set for other in of_set if other != name and other in of_set[name]] == []
    assert ["n/a / n/a" in block for block in blocks] == [False] * 3
    assert "Runs of input were made differently from most: torch 2 instead of 3." in of_set["Set_B"]
    assert "¶" not in of_set["Set_A"]
    assert "training-free methods" in of_set["Set_C"]


def test_rows_of_two_protocols_are_refused_until_one_is_chosen(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0)
    store(tmp_path, "kit", 31.0, protocol="awgn8-seed0")
    with pytest.raises(InputError, match=r"awgn8-seed0\.v1 and awgn8\.v1"):
        rows(find([tmp_path]))
    assert rows(find([tmp_path]), "awgn8-seed0").iloc[0]["psnr_db"] == pytest.approx(31.0)
    with pytest.raises(InputError, match="found: awgn8-seed0"):
        rows(find([tmp_path]), "awgn9")


def test_the_id_of_a_protocol_does_not_choose_one_of_its_name_with_changed_keys(tmp_path: Path) -> None:
    [shipped] = store(tmp_path, "kit", 30.0).evaluations()
    changed = shipped.model_copy(update={"stamp": "awgn8.v1+00ce90"})
    assert [scored_under(shipped, name) for name in ("awgn8", "awgn8.v1")] == [True, True]
    assert [scored_under(changed, name) for name in ("awgn8", "awgn8.v1", changed.stamp)] == [False, False, True]
    of_own_file = shipped.protocol.model_copy(update={"id": "mine"})
    own = shipped.model_copy(update={"stamp": "mine.v1+00ce90", "protocol": of_own_file})
    assert [scored_under(own, name) for name in ("mine", "mine.v1+00ce90", "awgn8")] == [True, True, False]


def test_two_versions_of_a_data_set_are_refused(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0)
    store(tmp_path, "conv", 30.0, sha256="bb")
    with pytest.raises(InputError, match="Two versions of data set Set_A"):
        rows(find([tmp_path]))


def test_runs_of_different_recipes_never_stand_in_one_block(tmp_path: Path) -> None:
    for kit, window, lr in ((30.0, 29.0, 1e-3), (35.0, 34.0, 1e-4)):
        store(tmp_path, "kit", kit, lr=lr)
        store(tmp_path, "window", window, lr=lr)
    text = render(find([tmp_path]), "markdown")
    assert text.count("| Method") == 2
    assert text.count("**30.00**") == text.count("**35.00**") == 1


def test_seeds_that_a_method_has_on_some_of_its_sets_alone_are_stated_with_these(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        store(tmp_path, "kit", 30.0, seed)
        store(tmp_path, "kit", 30.0, seed, sigma=50)
    store(tmp_path, "kit", 31.0, 1, data_set="Set_B")
    assert "| 0,1,2; 1 on Set_B σ25 |" in render(find([tmp_path]), "markdown")
    assert "0, 1, 2; 1 on Set_B σ25" in report(find([tmp_path]), [])


def test_a_row_that_is_ranked_beside_no_other_is_not_the_best_of_its_column(tmp_path: Path) -> None:
    for seed in (0, 1):
        store(tmp_path, "kit", 30.0, seed)
    store(tmp_path, "window", 31.0)
    assert "**" not in render(find([tmp_path]), "markdown").split("| Method")[1]
    store(tmp_path, "window", 31.0, 1)
    assert "**31.00**" in render(find([tmp_path]), "markdown")
    store(tmp_path, "local", 30.5)
    assert "**31.00**" in render(find([tmp_path]), "markdown")
    store(tmp_path, "conv", 31.5)  # of one seed: not ranked, and above the best that is
    text = render(find([tmp_path]), "markdown").split("| Method")[1]
    assert "31.50§" in text
    assert "31.00 " in text
    assert "**3" not in text  # the equal SSIM of all keep their mark


def test_runs_of_one_method_with_different_settings_are_told_apart(tmp_path: Path) -> None:
    store(tmp_path, "kit", 30.0, settings={"k": 4, "patch": 8})
    store(tmp_path, "kit", 31.0, settings={"k": 8, "patch": 8})
    assert list(rows(find([tmp_path]))["method"]) == ["kit (k 4)", "kit (k 8)"]


def test_an_uncounted_cost_is_marked_with_its_reason(tmp_path: Path) -> None:
    folder = store(tmp_path, "mine", 30.0, note="nobody counted aten::mystery")
    assert "2.50† " in render([folder], "markdown")
    assert "† mine: nobody counted aten::mystery." in render([folder], "markdown")
    assert r"$\dagger$ mine: nobody counted aten::mystery." in render([folder], "latex")


def test_latex_is_escaped_and_balanced(tmp_path: Path) -> None:
    store(tmp_path, "my_method", 30.0)
    text = render(find([tmp_path]), "latex")
    assert r"my\_method" in text
    assert r"Set\_A $\sigma$=25" in text
    assert not re.search(r"(?<!\\)_", text)
    assert text.count("{") == text.count("}")
    columns = (
        text.count("r", text.index(r"\begin{tabular}{"), text.index("}", text.index(r"\begin{tabular}{") + 16)) - 1
    )
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in body} == {columns}


def test_a_per_cent_sign_is_escaped_once(tmp_path: Path) -> None:
    r"""`\\%` would end the line, and comment out the rest of it."""
    assert r"a & 50 \% \\" in _latex("", ["Method", "x"], [["a", r"50 \%"]], []).splitlines()


def test_csv_has_every_digit_of_a_large_integer(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.0, peak=123_456_789)
    rewrite(folder.path / "training.json", lambda raw: raw["cost"].update(parameters=26_134_567))
    store(tmp_path, "input", 20.0, seed=None)  # pandas turns a column of integers with a gap into fractions
    [row] = [row for row in csv.DictReader(io.StringIO(render(find([tmp_path]), "csv"))) if row["method"] == "kit"]
    assert (row["parameters"], row["train_peak_bytes"]) == ("26134567", "123456789")


def test_seconds_a_step_that_other_work_slowed_are_not_shown_but_named(tmp_path: Path) -> None:
    folder = store(tmp_path, "kit", 30.0)
    path = folder.path / "training.json"
    record = json.loads(path.read_bytes())
    record.pop("sha256", None)
    record["cost"]["step_seconds"] = None  # as in runs made before it was measured apart
    path.write_text(json.dumps(record | {"contended": 0.4}))
    text = render([folder], "markdown")
    assert "n/a‡" in text
    assert "up to 40% of the time" in text
    path.write_text(json.dumps(record | {"contended": 0.01}))
    assert "‡" not in render([folder], "markdown")


def test_a_task_with_one_condition_has_columns_without_a_noise_level(tmp_path: Path) -> None:
    folders = [store(tmp_path, name, psnr, sigma=None) for name, psnr in (("kit", 30.0), ("window", 29.0))]
    store(tmp_path, "kit", 28.0, sigma=None, data_set="Set_B")
    text = render(folders, "markdown")
    assert "Set_A: PSNR dB / SSIM" in text
    assert "Set_B: PSNR dB / SSIM" in text
    assert "σ" not in text
    assert "**30.00**" in text
    table = rows(folders)
    assert list(table["condition"].unique()) == [""]
    assert table["sigma"].isna().all()
    assert "nan" not in render(folders, "csv").lower()


def test_a_file_has_the_format_of_its_suffix_and_no_colours(tmp_path: Path) -> None:
    for method in ("kit", "conv"):
        store(tmp_path / "runs", method, [30.0, 31.0], seed=0)

    def table(*options: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, ["table", str(tmp_path / "runs"), *options])
        assert done.exit_code == code, done.output
        return done.stderr

    for suffix, form in ((".csv", "csv"), (".tex", "latex"), (".json", "json"), (".md", "markdown")):
        table("--out", str(tmp_path / f"t{suffix}"))
        assert (tmp_path / f"t{suffix}").read_text() == render(find([tmp_path / "runs"]), form)
    table("--out", str(tmp_path / "t.txt"))
    text = (tmp_path / "t.txt").read_text()
    assert "\x1b" not in text
    assert text == click.unstyle(render(find([tmp_path / "runs"]), "terminal"))
    assert "name two formats" in table("--format", "csv", "--out", str(tmp_path / "u.md"), code=2)
    assert not (tmp_path / "u.md").exists()
