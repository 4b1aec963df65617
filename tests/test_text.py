"""Numbers as text."""

from __future__ import annotations

import pytest

from kitbench.text import significant


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (2.5, 3, "2.5"), (0.08402, 4, "0.08402"), (999.6, 3, "1,000"), (1013.0, 3, "1,010"), (32_768, 3, "32,800"),
        (1.8014e7, 4, "18,010,000"), (0.0, 3, "0"), (-2041.0, 3, "-2,040"),
    ],
)  # fmt: skip
def test_significant_digits_never_come_as_a_power_of_ten(value: float, digits: int, expected: str) -> None:
    assert significant(value, digits) == expected
