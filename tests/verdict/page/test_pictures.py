"""Figures: which ones stored runs give, and how they are drawn."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from kitbench.errors import InputError
from kitbench.spec import loading
from kitbench.store.folder import find
from kitbench.verdict.page import pictures
from kitbench.verdict.page.report import figures
from tests.stored import store
from tests.verdict.test_contrasts import LR, QUICK


def test_figures_of_several_comparisons_do_not_replace_each_other(tmp_path: Path) -> None:
    of_width = loading.load_suite("denoise", "quick", ["backbone.width=32"])
    for rate, suite in ((LR, QUICK), (2 * LR, QUICK), (LR, of_width)):
        for method in ("conv", "kit"):
            store(tmp_path, method, [30.0, 31.0], 0, lr=rate, of=suite)
    kinds = ("psnr-multiply-adds", "psnr-memory", "differences")
    stems = [f"denoise-colour-quick-700-lr{rate:g}" for rate in (LR, 2 * LR)]
    expected = {f"{stem}-{kind}" for stem in stems for kind in kinds} | {f"{stems[0]}-{kind}+2" for kind in kinds}
    assert set(figures(find([tmp_path]), [])) == expected


def test_the_figure_of_costs_is_of_the_set_that_most_methods_have(tmp_path: Path) -> None:
    """Neither a set that one run was scored on later, nor one of references alone, which sort before it."""
    for method in ("conv", "kit"):
        store(tmp_path, method, [30.0, 31.0], 0, data_set="Set_C")
    store(tmp_path, "kit", [30.0, 31.0], 0, data_set="Set_B")
    store(tmp_path, "input", [20.0, 20.0], None, data_set="Set_A")
    [drawn] = [image.decode() for name, image in figures(find([tmp_path]), []).items() if name.endswith("psnr-memory")]
    assert "PSNR, dB: Set_C" in drawn
    assert all(method in drawn for method in ("conv", "kit"))


def test_runs_without_a_figure_are_refused(tmp_path: Path) -> None:
    store(tmp_path, "input", 20.0, seed=None)
    with pytest.raises(InputError, match="These runs give no figure"):
        figures(find([tmp_path]), [])


def test_a_method_with_one_seed_is_hollow_in_the_figure_of_costs_and_others_have_intervals() -> None:
    points = {"kit": pictures.Quality(1.2, 30.9, 0.05), "global": pictures.Quality(37.0, 30.8, None)}
    look = pictures.Look(pictures.styles(sorted(points)))
    text = pictures.pareto(points, "GMACs", "CBSD68", look).decode()
    assert text.count("fill: #ffffff; stroke: " + look["global"][0].lower()) == 1
    assert "fill: #ffffff; stroke: " + look["kit"][0].lower() not in text


def test_a_method_looks_the_same_in_all_figures_and_like_no_other() -> None:
    look = pictures.styles([f"method {number}" for number in range(20)])
    assert len(set(look.values())) == 20


def test_labels_of_a_logarithmic_axis_do_not_touch() -> None:
    for high in (4.0, 30.0, 400.0, 90_000.0):
        with pictures.new_figure(4.5, 4.0) as (figure, axes, _):
            axes.plot([1.0, high], [0, 1])
            pictures.logarithmic(axes)
            figure.canvas.draw()
            boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
            inside = sorted((b.x0, b.x1) for b in boxes if axes.bbox.x0 - 1 <= (b.x0 + b.x1) / 2 <= axes.bbox.x1 + 1)
            assert len(inside) >= 2
            assert all(a[1] < b[0] for a, b in itertools.pairwise(inside))
