"""When is a change more than noise? The arithmetic, its properties, and how often it is wrong."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.report.compare_metrics import Metric
from pytest_gputrain.report.metrics import measured, robust_sigma, spread_of
from pytest_gputrain.report.noise import STUDENT, TRIMMED, Kind, judge

POSITIVE = st.floats(min_value=1e-3, max_value=1e9)


def rate(value: float, spread: float = 0.0, better: str = "higher") -> Metric:
    return Metric(value, "tokens/s", better, spread)


@given(st.lists(POSITIVE, min_size=1, max_size=12), POSITIVE, st.floats(0, 0.3))
def test_the_direction_is_the_metrics(values: list[float], new: float, share: float) -> None:
    opposite: dict[Kind, Kind] = {"worse": "better", "better": "worse", "same": "same"}
    up, down = (
        judge("x", [rate(value, value * share, better) for value in values], rate(new, new * share, better))
        for better in ("higher", "lower")
    )
    assert up.kind == opposite[down.kind]


@given(st.lists(POSITIVE, min_size=1, max_size=12))
def test_the_same_again_is_the_same(values: list[float]) -> None:
    last = judge("x", [rate(value) for value in values], rate(values[-1]))
    again = judge("x", [rate(last.old)], rate(last.old))
    assert again.kind == "same"


@given(st.lists(POSITIVE, min_size=1, max_size=12), POSITIVE, st.floats(1e-3, 1e3))
def test_units_do_not_matter(values: list[float], new: float, times: float) -> None:
    one = judge("x", [rate(value) for value in values], rate(new))
    other = judge("x", [rate(value * times) for value in values], rate(new * times))
    assert one.noise == pytest.approx(other.noise, rel=1e-6, abs=1e-9)
    assert one.change == pytest.approx(other.change, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ([1000], 940, "same"),  # one night: up to 10 % is not told
        ([1000], 880, "worse"),
        ([1000], 1150, "better"),
        ([1000, 1005, 995], 970, "same"),
        ([1000, 1005, 995], 880, "worse"),
        ([1000, 1300, 800], 850, "same"),  # nights that differ so much explain it
        ([1000, 1005, 995, 1002, 998, 1001, 999, 500], 900, "worse"),  # one bad night does not blind it
        ([500, 500, 500, 1000, 1000, 1000, 1000, 1000], 1000, "same"),
        ([1000], 0, "worse"),
    ],
)
def test_rates(old: list[float], new: float, kind: Kind) -> None:
    assert judge("tokens_per_second", [rate(value) for value in old], rate(new)).kind == kind


def test_a_runs_own_spread_explains_as_much() -> None:
    quiet, busy = rate(850, 8), rate(850, 100)
    assert judge("x", [rate(1000, 10)], quiet).kind == "worse"
    assert judge("x", [rate(1000, 10)], busy).kind == "same"
    assert judge("x", [rate(value, 10) for value in (1000, 1001, 999)], busy).kind == "same"


def test_kinds_have_their_own_least_change() -> None:
    def kind(name: str, unit: str, old: float, new: float, spread: float | None = 0.0) -> Kind:
        return judge(name, [Metric(old, unit, "lower", spread)], Metric(new, unit, "lower", spread)).kind

    assert kind("peak_bytes", "bytes", 1e9, 1.02e9) == "same"
    assert kind("peak_bytes", "bytes", 1e9, 1.05e9) == "worse"
    assert kind("first_compile_seconds", "s", 30, 36, None) == "same"  # measured once
    assert kind("first_compile_seconds", "s", 30, 40, None) == "worse"
    assert kind("final_loss", "", 2.0, 2.03) == "same"
    assert kind("final_loss", "", -2.0, -1.9) == "worse"
    assert kind("final_loss", "", 0.0, 0.1) == "worse"
    assert kind("recompiles", "count", 0, 0) == "same"
    assert kind("recompiles", "count", 0, 1) == "worse"


def test_what_is_no_number() -> None:
    assert judge("final_loss", [rate(1)], rate(math.nan)).kind == "worse"
    with pytest.raises(ValueError, match="the earlier value is not a number"):
        judge("final_loss", [rate(math.nan)], rate(1))
    with pytest.raises(ValueError, match="it was in s, better lower; now tokens/s, better higher"):
        judge("x", [Metric(1, "s", "lower", 0)], rate(1))


def test_constants_reach_as_far_as_nights() -> None:
    assert len(STUDENT) == 11 and list(STUDENT) == sorted(STUDENT, reverse=True)
    assert sorted(TRIMMED) == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("nights", [3, 6, 10])
def test_false_alarms_and_what_is_found(nights: int) -> None:
    """2 % from night to night: of 2,000 healthy ones at most 1 in 200 fails; 15 % less is found."""
    draw = random.Random(nights)

    def share_of_alarms(times: float, number: int) -> float:
        def value(mean: float) -> Metric:
            return rate(mean * math.exp(draw.gauss(0, 0.02)), 5)

        alarms = 0
        for _ in range(number):
            alarms += judge("x", [value(1000) for _ in range(nights)], value(1000 * times)).kind == "worse"
        return alarms / number

    assert share_of_alarms(1.0, 2000) <= 1 / 200
    assert share_of_alarms(0.85, 400) > 0.85


def test_the_spread_is_that_of_blocks() -> None:
    """Steps that are slow together tell less than as many by themselves."""
    draw = random.Random(1)
    white = [draw.gauss(100, 10) for _ in range(240)]
    waves = [100 + 10 * math.sin(step / 20) for step in range(240)]
    assert (spread_of(white) or 0) < 5 < (spread_of(waves) or 0)
    assert spread_of([1.0, 2.0]) is None
    assert robust_sigma([1.0, 1.0, 1.0, 9.0]) == 0


def test_measured() -> None:
    metric = measured([1.0, math.nan, 3.0, 2.0], unit="s", better="lower")
    assert (metric["value"], metric["samples"], metric["spread"]) == (2.0, 3, pytest.approx(1.4826))
    with pytest.raises(ValueError, match="1 samples, none of them finite; a metric needs at least one"):
        measured([math.inf], unit="s", better="lower")
