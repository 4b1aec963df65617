"""What the points of a sweep are said to mean."""

from __future__ import annotations

import math

import pytest

from kitbench.store.sweeps import Point
from kitbench.verdict.scaling.fit import crossings, exponent, largest


def points(sizes, value, what="infer", **others):
    base = {"method": "m", "what": what, "macs_closed": None, "comparisons": 0, "exponentials": 0, "gathered_bytes": 0}
    return [
        Point(
            **base,
            size=s,
            status="measured",
            macs=1,
            raw_bytes=1,
            predicted_bytes=round(value(s)),
            seconds=value(s),
            **others,
        )
        for s in sizes
    ]


SIZES = (64, 128, 256, 512)


def test_exponents_are_in_pixels_with_their_interval():
    exact = exponent(points(SIZES, lambda s: 3.0 * s**4), lambda p: p.seconds)
    assert exact is not None
    assert exact.value == pytest.approx(2)
    assert exact.half_width == pytest.approx(0, abs=1e-9)
    bent = exponent(points(SIZES, lambda s: s**2 * (1.3 if s == 256 else 1)), lambda p: p.seconds)
    assert bent is not None
    assert bent.half_width is not None
    assert abs(bent.value - 1) < bent.half_width
    two = exponent(points(SIZES[:2], lambda s: s**2), lambda p: p.seconds)
    assert two is not None
    assert two.half_width is None
    assert exponent(points(SIZES[:1], lambda s: s), lambda p: p.seconds) is None


def test_crossings_lie_where_power_laws_cross():
    linear, quadratic = points(SIZES, lambda s: 100.0 * s**2), points(SIZES, lambda s: s**4 / 400)
    (found,) = crossings(linear, quadratic, lambda p: p.seconds)
    assert found.size == pytest.approx(200)
    assert found.cheaper_above
    assert crossings(linear, linear, lambda p: p.seconds) == []


@pytest.mark.parametrize("budget", [64**2 * 7, 300**2 * 7, 5000**2 * 7])
def test_the_largest_image_within_a_budget(budget):
    assert largest(points(SIZES, lambda s: 7.0 * s**2), budget) == pytest.approx(math.sqrt(budget / 7), rel=1e-3)
