"""Figures that others printed, beside the tables of stored runs."""

from __future__ import annotations

import csv
import io
import json
import tomllib
from pathlib import Path

import pytest

from kitbench.spec.shipped import builtin
from kitbench.store.folder import find
from kitbench.verdict import published
from kitbench.verdict.render import render
from tests.conftest import ROOT
from tests.stored import store


def test_published_figures_stand_apart_with_their_source(tmp_path: Path) -> None:
    text = render([store(tmp_path / "own", "kit", 30.0, data_set="CBSD68", sigma=50)], "markdown")
    block = text[text.index("Published, not run here") :]
    assert "28.56" in block
    assert "open-mmlab/mmagic" in block
    assert "KiT: not available to the authors of this suite." in block
    assert "Kodak24" not in block  # only what stands beside a column of the table
    store(tmp_path / "other", "kit", 30.0)
    assert "Published" not in render(find([tmp_path / "other"]), "markdown")


def printed(text: str, task: str) -> tuple[list[str], dict[str, list[str]]]:
    """Header and cells by method of the published figures of a task, as Markdown."""
    block = text[text.index(f"Published, not run here: {task}") :].split("\n\n")[1]
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
    return header, {line[0]: line[1:] for line in lines}


def test_published_figures_stand_across_in_the_columns_of_the_table(tmp_path: Path) -> None:
    for data_set, sigma in (("McMaster", 25), ("CBSD68", 25), ("CBSD68", 15)):
        store(tmp_path, "kit", 30.0, data_set=data_set, sigma=sigma)
    text = render(find([tmp_path]), "markdown")
    header, figures = printed(text, "denoise")
    columns = [title.partition(":")[0] for title in text.splitlines()[2].split("|")[2:5]]
    assert [title.strip() for title in columns] == header[3:]
    cells = {method: dict(zip(header, [method, *line], strict=True)) for method, line in figures.items()}
    assert {method: line["CBSD68 σ25"] for method, line in cells.items()} == {
        "CBM3D": "30.71", "CDnCNN": "31.23", "FFDNet": "31.21", "KiT": "n/a"
    }  # fmt: skip
    assert cells["CDnCNN"] == {
        "Method": "CDnCNN", "Metric": "PSNR RGB", "Read in": "[1]",
        "McMaster σ25": "31.51", "CBSD68 σ25": "31.23", "CBSD68 σ15": "33.89",
    }  # fmt: skip
    assert "[1] FFDNet paper, arXiv 1710.04026, colour table" in text


def test_a_model_read_in_two_places_has_a_row_of_each_source(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = published.Figure(data_set="CBSD68", sigma=25, psnr_db=31.0, metric="PSNR RGB")
    shared = {"method": "net", "task": "denoise", "paper": "p", "figures": (figure,)}
    models = tuple(published.Published(source=source, **shared) for source in ("first", "second"))
    monkeypatch.setattr(published, "published", lambda: models)
    (sheet,) = published.sheets([("CBSD68", "σ25")])
    assert sheet.lines == (("net", "PSNR RGB", "[1]", "31.00"), ("net", "PSNR RGB", "[2]", "31.00"))
    assert "Read in: [1] first; [2] second." in sheet.notes


@pytest.mark.parametrize("form", ["markdown", "latex", "terminal", "csv", "json"])
def test_published_figures_stand_beside_a_table_in_every_format(tmp_path: Path, form: str) -> None:
    for data_set, sigma, protocol in (("CBSD68", 15, "awgn8"), ("Rain100L", None, "rain-y8-ssim2d")):
        run = store(tmp_path / data_set, "kit", 30.0, data_set=data_set, sigma=sigma, protocol=protocol)
        text = render([run], form)
        for model in published.published():
            for figure in model.figures:
                expected = (figure.data_set, figure.sigma) == (data_set, sigma)
                found = [line for line in text.splitlines() if model.method in line and f"{figure.psnr_db:g}" in line]
                if form == "json":
                    found = [
                        r for r in json.loads(text) if (r["method"], r["psnr_db"]) == (model.method, figure.psnr_db)
                    ]
                assert bool(found) == expected, (model.method, figure)


def test_published_rows_of_the_long_form_say_where_they_were_read(tmp_path: Path) -> None:
    run = store(tmp_path, "kit", 30.123456789, data_set="CBSD68", sigma=25)
    own, *printed = csv.DictReader(io.StringIO(render([run], "csv")))
    assert (own["method"], own["psnr_db"], own["read_in"]) == ("kit", "30.12345679", "")
    assert {(r["method"], r["psnr_db"]) for r in printed} == {
        ("CBM3D", "30.71"),
        ("CDnCNN", "31.23"),
        ("FFDNet", "31.21"),
    }
    assert {r["protocol"] for r in printed} == {"PSNR RGB, as printed"}
    assert all(r["read_in"] and not r["runs"] and not r["comparison"] for r in printed)
    assert set(own) == set(json.loads(render([run], "json"))[-1])


def test_every_published_figure_has_a_source_and_a_plausible_value_on_a_set_that_has_a_card() -> None:
    assert {model.task for model in published.published()} == {"denoise", "deblur", "derain", "denoise-real"}
    cards = {tomllib.loads(path.read_text("utf-8"))["name"]: path for path in (ROOT / "datasets").glob("*.toml")}
    for model in published.published():
        assert model.source
        assert (model.protocol in builtin("protocols")) == bool(model.weights_sha256)
        for figure in model.figures:
            assert 20 < figure.psnr_db < 45
            card = tomllib.loads(cards[figure.data_set].read_text("utf-8"))  # else it would stand beside no table
            assert model.task in card["tasks"]
            assert (figure.metric == "PSNR gray") == (not card["colour"])
            assert (figure.sigma is None) == (model.task != "denoise")
