"""The drawings of the page: what is in them, and that no series, however odd, breaks them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gputrain.report.chart_lines import line_of
from pytest_gputrain.report.chart_scale import log_ticks, percentile, spread, thin, ticks
from pytest_gputrain.report.charts import TITLES, charts, peaks
from pytest_gputrain.report.quantities import duration, quantity
from pytest_gputrain.report.series import by_name, series

ANYTHING: st.SearchStrategy[Any] = st.one_of(
    st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans()
)


@given(
    st.sampled_from([*TITLES, "another"]),
    st.lists(st.tuples(st.lists(ANYTHING, max_size=6), st.lists(ANYTHING, max_size=6)), max_size=3),
)
def test_any_series_can_be_drawn(plot: str, given_series: list[tuple[list[Any], list[Any]]]) -> None:
    lines = [line_of({"label": "<a&b>", "unit": "bytes", "x": x, "y": y}) for x, y in given_series]
    for chart in charts(plot, lines):
        drawing = ElementTree.fromstring(chart.drawing)
        assert "nan" not in "".join(path.attrib.get("d", "") for path in drawing.iter("path"))


def test_two_losses_are_laid_over_each_other_and_their_distance_drawn() -> None:
    lines = [
        line_of({"label": name, "x": [0, 1, 2], "y": y}) for name, y in (("a", [3, 2, 1]), ("b", [3, 2.5, 1]))
    ]
    overlay, distance = charts("loss", lines)
    assert [key.label for key in overlay.legend] == ["a", "b"]
    assert (distance.title, distance.legend[0].numbers) == ("|Δ loss| from a", "at most 0.5")
    assert distance.notes == ["Zeros are at the lower edge."]


def test_losses_that_are_the_same_have_no_distance_to_draw() -> None:
    one, other = (line_of({"label": name, "x": [0, 1], "y": [3, 2]}) for name in "ab")
    (overlay,) = charts("loss", [one, other], [one])
    assert [key.label for key in overlay.legend] == ["a", "a, earlier", "b"]
    assert overlay.notes == ["No step differs from a.", "No step differs from the earlier report."]


def test_an_earlier_report_is_drawn_along_by_label() -> None:
    now = [line_of({"label": name, "x": [0, 1], "y": [3, 2]}) for name in "ab"]
    was = [line_of({"label": name, "x": [0, 1], "y": [3, 2.25]}) for name in "bc"]
    _, _, moved = charts("loss", [now[0], replace(now[1], points=[(0, 3), (1, 1)])], was)
    assert (moved.title, moved.legend[0].numbers) == ("|Δ loss| from the earlier report", "at most 1.25")
    (speed,) = charts("tokens_per_second", [now[1]], was)
    assert [key.label for key in speed.legend] == ["b", "b, earlier"]


def test_a_ladder_has_the_line_of_its_budget() -> None:
    tried = {"label": "peak", "unit": "bytes", "x": [1, 2, 4, 8], "y": [2**30, 2**31, 2**32, None]}
    (chart,) = charts("ladder", [line_of({**tried, "limit": 5 * 2**30, "limit_label": "budget"})])
    assert 'class="ll"' in chart.drawing
    assert ">budget 5 GiB</text>" in chart.drawing
    assert chart.notes == ["✕: ran out of memory."]
    (far,) = charts("ladder", [line_of({**tried, "limit": 80 * 2**30, "limit_label": "capacity"})])
    assert 'class="ll"' not in far.drawing
    assert far.notes[0] == "Beyond the drawing: capacity 80 GiB."


def test_places_that_are_no_numbers_are_named() -> None:
    error = by_name("tp_gradient_error", "worst", {"layers.0": 1e-7, "layers.1": 3e-6}, limit=1e-4)
    (chart,) = charts("tp_gradient_error", [line_of(error)])
    assert chart.legend[0].numbers == "at most 3e-6 (layers.1)"
    assert ">1e-4</text>" in chart.drawing  # a logarithmic axis up to the tolerance


def test_series_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="series 'a' has 2 y, 3 x; give as many of each"):
        series("loss", "a", [1, 2], x=[0, 1, 2])


def test_what_is_no_number_is_marked_and_said() -> None:
    (chart,) = charts("loss", [line_of({"label": "a", "x": [0, 1, 2], "y": [3, math.nan, None]})])
    assert chart.legend[0].numbers == "3 → 3; 2 without a number, the first at 1"
    assert chart.notes == ["✕: no finite number."]


def test_step_times_have_their_percentiles() -> None:
    (chart,) = charts(
        "step_seconds", [line_of({"unit": "s", "x": list(range(101)), "y": [n / 1000 for n in range(101)]})]
    )
    assert chart.legend[0].numbers == "p50 50 ms, p95 95 ms"


def test_more_lines_than_can_be_told_apart_are_counted() -> None:
    (chart,) = charts(
        "memory", [line_of({"label": f"rank {n}", "x": [0, 1], "y": [n, n]}) for n in range(11)]
    )
    assert len(chart.legend) == 8
    assert chart.notes == ["3 more lines are in report.json."]


def test_peaks_by_rank_of_a_thousand_ranks() -> None:
    chart = peaks([float(2**30 + rank) if rank else None for rank in range(1024)])
    assert chart.legend[0].numbers == "1 GiB over 1023 ranks"
    assert len(chart.drawing) < 60_000


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=9), st.booleans())
def test_ticks_are_few_and_within(values: list[float], log: bool) -> None:
    low, high = spread(values, log=log)
    found = (log_ticks if log else ticks)(low, high)
    assert low < high
    assert len(found) <= 8
    assert all(low - (high - low) * 1e-6 <= tick <= high + (high - low) * 1e-6 for tick in found)


def test_thinning_keeps_spikes() -> None:
    points = [(float(n), 100.0 if n == 777 else 1.0) for n in range(5000)]
    kept = thin(points, 100)
    assert (777.0, 100.0) in kept
    assert len(kept) <= 102


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (1.5e9, "bytes", "1.4 GiB"),
        (0.0123, "s", "12.3 ms"),
        (45120.4, "tokens/s", "45,120 tokens/s"),
        (0, "s", "0 s"),
    ],
)
def test_quantities_read_well(value: float, unit: str, said: str) -> None:
    assert quantity(value, unit) == said


def test_durations_and_percentiles() -> None:
    assert [duration(seconds) for seconds in (0.031, 4.21, 59, 192, 7500)] == [
        "0.03 s",
        "4.2 s",
        "59 s",
        "3 min 12 s",
        "2 h 5 min",
    ]
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
