"""How a difference between two runs is printed."""

from __future__ import annotations

from pathlib import Path

from kitbench.verdict.differences import RunDifference, differences, unequal_fields
from tests.stored import rewrite, store


def test_unequal_values_are_never_printed_alike() -> None:
    shown = {str(RunDifference("numbers", "loss", a, b)) for a, b in ((0.5, 0.25), (0.0251236001, 0.0251236002))}
    assert shown == {"numbers: loss: 0.5 and 0.25", "numbers: loss: 0.0251236001 and 0.0251236002"}
    assert unequal_fields({"lr": 1e-3}, {"lr": 1.0000001e-3}) == ["lr (0.001 and 0.0010000001)"]
    assert unequal_fields({"sum": "a" * 64}, {"sum": "b" * 64}) == [f"sum ({'a' * 10} and {'b' * 10})"]


def test_scores_that_differ_in_lpips_alone_say_so(tmp_path: Path) -> None:
    one, other = (store(tmp_path / name, "kit", 30.0, lpips=0.1) for name in ("one", "other"))
    [path] = (other.path / "eval").iterdir()
    rewrite(path, lambda raw: raw["scores"][1].update(lpips=0.3))
    mean, most = map(str, differences(one, other))
    assert "of which 1 differ" in mean
    assert mean.endswith("30.00 and 30.00 (equal) dB, SSIM 0.5000 and 0.5000 (equal), LPIPS 0.1000 and 0.2000 (+0.1)")
    assert "most of all 1: " in most
    assert most.endswith("LPIPS 0.1000 and 0.3000 (+0.2)")
