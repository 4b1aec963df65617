"""What the points of a sweep are said to mean."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from kitbench.store.sweeps import Point, Sweep
from kitbench.verdict.scaling.fit import crossings, exponent, largest
from kitbench.verdict.scaling.page import words


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


def swept(budget: float, **curves) -> Sweep:
    """A sweep of one method from its curves, `infer` and `train`."""
    found = [point for what, own in curves.items() for point in (p.model_copy(update={"what": what}) for p in own)]
    return Sweep.model_construct(budget=round(budget), points=tuple(found))


@pytest.mark.parametrize("side", [70, 300, 500])
def test_the_largest_image_within_a_budget(side):
    found = largest(swept(7 * side**2, infer=points(SIZES, lambda s: 7.0 * s**2)), "m", "infer")
    assert found is not None
    assert found.side == pytest.approx(side, rel=1e-3)
    assert found.low == pytest.approx(side, rel=1e-3)
    assert found.high == pytest.approx(side, rel=1e-3) if side > SIZES[1] else SIZES[1]


def test_outside_the_sizes_of_a_sweep_no_side_is_named():
    curve = points(SIZES, lambda s: 7.0 * s**2)
    assert str(largest(swept(7 * 5000**2, infer=curve), "m", "infer")) == "at least 512"
    assert str(largest(swept(7 * 63**2, infer=curve), "m", "infer")) == "below 64"
    assert largest(swept(1, infer=curve), "m", "train") is None


@pytest.mark.parametrize("sizes", [(64, 128, 256, 3200), (64, 512, 4096), (64, 65536)])
@pytest.mark.parametrize("memory", [lambda s: 3e7 + 700.0 * s**2, lambda s: 2e6 * s + 50.0 * s**2 + 1e-4 * s**4])
def test_the_interval_holds_the_side_of_any_sum_of_powers(sizes, memory):
    """By bisection of the same function, at budgets all along the sweep."""
    for budget in np.geomspace(memory(70), 0.99 * memory(sizes[-1]), 9):
        low, high = 64.0, float(sizes[-1])
        for _ in range(60):
            low, high = ((low + high) / 2, high) if memory((low + high) / 2) <= budget else (low, (low + high) / 2)
        found = largest(swept(budget, infer=points(sizes, memory)), "m", "infer")
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert found.low * (1 - 1e-5) <= low <= found.high * (1 + 1e-5)


def test_the_interval_is_as_wide_as_predictions_were_wrong():
    exact = points(SIZES, lambda s: 700.0 * s**2)
    wrong = [p.model_copy(update={"peak_bytes": round(1.2 * p.predicted_bytes)}) for p in exact[2:3]]
    sure, unsure = (
        largest(swept(700 * 400**2, infer=own), "m", "infer") for own in (exact, [*exact[:2], *wrong, *exact[3:]])
    )
    assert sure is not None
    assert unsure is not None
    assert sure.high - sure.low < 1
    assert unsure.high - unsure.low > 400 * (math.sqrt(1.2) - 1 / math.sqrt(1.2)) * 0.8


def test_training_never_fits_a_larger_image_than_inference():
    infer, train = points(SIZES, lambda s: 700.0 * s**2), points(SIZES, lambda s: 600.0 * s**2)
    sweep = swept(700 * 300**2, infer=infer, train=train)
    assert largest(sweep, "m", "train") == largest(sweep, "m", "infer")
    much = points(SIZES, lambda s: 7e6 * s**2)
    assert str(largest(swept(700 * 300**2, infer=infer, train=much), "m", "train")) == "below 64"
    assert str(largest(swept(700 * 300**2, infer=infer, train=points(SIZES, lambda s: 1.0)), "m", "train")).startswith(
        "3"
    )


def test_a_growth_that_the_interval_leaves_open_is_not_called_linear():
    growth = {
        "steep": lambda s: 3.0 * s**4, "flat": lambda s: 3.0 * s**2, "bent": lambda s: s**2 * (1.6 if s == 256 else 1)
    }  # fmt: skip
    own = [p.model_copy(update={"method": m}) for m, value in growth.items() for p in points(SIZES, value)]
    sweep = Sweep.model_construct(budget=10**9, methods={m: (m, {}) for m in growth}, points=tuple(own))
    [time] = [sentence for sentence in words(sweep) if "growth of time" in sentence]
    assert re.fullmatch(
        r"inference: growth of time in pixels is faster than linear for steep \(2\.00\); at most about linear for flat; "
        r"not decided for bent \(1\.\d\d ± \d\.\d\d\)\.",
        time,
    )


def test_two_points_decide_no_growth():
    own = [p.model_copy(update={"method": "m"}) for p in points((64, 128), lambda s: 3.0 * s**4)]
    [time] = [
        s
        for s in words(Sweep.model_construct(budget=10**9, methods={"m": ("m", {})}, points=tuple(own)))
        if "time" in s
    ]
    assert time == "inference: growth of time in pixels is not decided for m (2.00 (2 points))."


def test_both_forms_of_global_attention_are_compared_without_a_kit_that_has_too_few_points():
    growth = {"global:form=materialised": 4, "global:form=sdpa": 2, "kit": 2}
    own = [
        p.model_copy(update={"method": m})
        for m, power in growth.items()
        for p in points(SIZES if m != "kit" else SIZES[:2], lambda s, power=power: 3.0 * s**power)
    ]
    methods = {m: (m.partition(":")[0], {"form": m.partition("=")[2]} if "=" in m else {}) for m in growth}
    sentences = words(Sweep.model_construct(budget=10**9, methods=methods, points=tuple(own)))
    assert not any("comes from the kernel" in sentence for sentence in sentences)
