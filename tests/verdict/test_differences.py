"""How a difference between two runs is printed."""

from __future__ import annotations

from kitbench.verdict.differences import RunDifference, unequal_fields


def test_unequal_values_are_never_printed_alike() -> None:
    shown = {str(RunDifference("numbers", "loss", a, b)) for a, b in ((0.5, 0.25), (0.0251236001, 0.0251236002))}
    assert shown == {"numbers: loss: 0.5 and 0.25", "numbers: loss: 0.0251236001 and 0.0251236002"}
    assert unequal_fields({"lr": 1e-3}, {"lr": 1.0000001e-3}) == ["lr (0.001 and 0.0010000001)"]
    assert unequal_fields({"sum": "a" * 64}, {"sum": "b" * 64}) == [f"sum ({'a' * 10} and {'b' * 10})"]
