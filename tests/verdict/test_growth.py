"""What sweeps say about the claims on cost: exponents in pixels, and for which sizes."""

from __future__ import annotations

from pathlib import Path

from kitbench.store.sweeps import Sweep
from tests.stored import evidence_of
from tests.verdict.test_claims import page, sweep


def test_a_longer_sweep_of_a_variant_or_of_the_network_does_not_speak_for_kit(tmp_path: Path) -> None:
    default = sweep(tmp_path / "default", {"kit": 1.0})
    others = sweep(tmp_path / "exact", {"kit": 2.0}, (64, 128, 256, 512, 1024))
    record = Sweep.model_validate_json((others / "scale.json").read_bytes())
    for change in ({"methods": {"kit": ("kit", {"retrieval": "exact"})}}, {"scope": "model"}):
        (others / "scale.json").write_text(record.model_copy(update=change).model_dump_json())
        assert page(default, others)[4].parts[3].words == "supported (by construction)"


def test_the_whole_interval_of_an_exponent_lies_below_its_bound(tmp_path: Path) -> None:
    """.74 +- .37 and 1.04 +- 1.40 once passed for "at most 1.1"."""
    for name, sizes, spread_over, words in (
        ("few", (64, 128, 256), 1.5, "not decided: an interval holds the bound"),
        ("exact", (64, 128, 256), 1.001, "supported"),
        ("beyond", (64, 128, 256), 0.0, "not supported"),
    ):
        folder = sweep(tmp_path / name, {"kit": 1.0 if spread_over else 1.5}, sizes)
        record = Sweep.model_validate_json((folder / "scale.json").read_bytes())
        points = [
            p.model_copy(update={"seconds": (p.seconds or 0) * (spread_over or 1.0) ** (p.size == 128)})
            for p in record.points
        ]
        (folder / "scale.json").write_text(record.model_copy(update={"points": tuple(points)}).model_dump_json())
        assert page(folder)[4].parts[4].words == words


def test_an_exponent_is_stated_for_the_sizes_that_it_was_fitted_to(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "scale", {"kit": 1.0})
    record = Sweep.model_validate_json((folder / "scale.json").read_bytes())
    beyond = record.points[-1].model_copy(
        update={"size": 4096, "status": "predicted", "macs": 10**14, "peak_bytes": None, "seconds": None}
    )
    points = (*record.points, beyond)
    (folder / "scale.json").write_text(record.model_copy(update={"points": points}).model_dump_json())
    operations, measured = page(folder)[4].parts[3:]
    assert "(5 sizes from 64 to 4096 px)" in evidence_of(operations)
    assert evidence_of(measured).count("(4 sizes from 64 to 512 px)") == 2


def test_curves_without_a_common_size_decide_nothing_about_cost(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "scale", {"window": 1.0, "global": 2.0})
    record = Sweep.model_validate_json((folder / "scale.json").read_bytes())
    points = tuple(p for p in record.points if (p.size < 256) == (p.method == "window"))
    (folder / "scale.json").write_text(record.model_copy(update={"points": points}).model_dump_json())
    [cost] = page(folder)[6].parts
    assert cost.words == "not decided: no sweep of both global and window attention is stored"


def test_predicted_points_decide_no_time_and_a_longer_sweep_of_them_hides_none(tmp_path: Path) -> None:
    predicted = sweep(tmp_path / "predicted", {"kit": 1.0, "global": 2.0}, (64, 128, 256, 512, 1024), "predicted")
    words = page(predicted)[4].parts[4].words
    assert words == "not decided: no sweep with the memory and time of kit at three sizes is stored"
    measured = sweep(tmp_path / "measured", {"kit": 1.0})
    assert {page(*both)[4].parts[4].words for both in ((measured, predicted), (predicted, measured))} == {"supported"}
