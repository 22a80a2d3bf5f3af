"""Which plots the page has: a panel a test, with where its numbers come from; failed tests first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.report.charts import TITLES, Chart, charts, line_of, peaks
from pytest_gputrain.report.page_failures import BAD
from pytest_gputrain.report.page_text import anchor, clean, cut_line

_MOST_CHARACTERS = 900_000
_MOST_TESTS = 60


@dataclass(frozen=True)
class Panel:
    """The drawings of one test. ``origin``: the line of the machine, ``labels``: simulated and such."""

    name: str
    target: str
    outcome: str
    origin: str
    labels: Sequence[str]
    charts: Sequence[Chart]


def panels(tests: Sequence[Mapping[str, Any]], machines: Sequence[str]) -> tuple[list[Panel], int]:
    """The panels, and how many there was no room for."""
    worth = [test for test in tests if _draws(test)]
    worth.sort(key=lambda test: (test.get("outcome") not in BAD, test.get("kind") != "stability"))
    found: list[Panel] = []
    room = _MOST_CHARACTERS
    for test in worth[:_MOST_TESTS]:
        panel = _panel(test, machines)
        room -= sum(len(chart.drawing) for chart in panel.charts)
        if room < 0:
            break
        found.append(panel)
    return found, len(worth) - len(found)


def _draws(test: Mapping[str, Any]) -> bool:
    return bool(test.get("series")) or (bool(test.get("check")) and len(_peaks(test)) > 1)


def _panel(test: Mapping[str, Any], machines: Sequence[str]) -> Panel:
    drawn: list[Chart] = []
    by_plot: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for series in test.get("series") or ():
        by_plot.setdefault((str(series.get("plot")), str(series.get("unit") or "")), []).append(series)
    order = list(TITLES)
    for plot, unit in sorted(by_plot, key=lambda key: order.index(key[0]) if key[0] in order else len(order)):
        drawn += charts(clean(plot), [line_of(_shown(one)) for one in by_plot[plot, unit]])
    if len(by_rank := _peaks(test)) > 1:
        drawn.append(peaks(by_rank))
    place = test.get("machine") or 0
    return Panel(
        cut_line(clean(test["id"]), 200),
        anchor(test["id"]),
        str(test.get("outcome")),
        machines[place] if place < len(machines) else "",
        [cut_line(clean(label), 40) for label in test.get("labels") or ()],
        drawn,
    )


def _shown(series: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **series,
        "label": cut_line(clean(series.get("label") or ""), 80),
        "unit": clean(series.get("unit") or ""),
    }


def _peaks(test: Mapping[str, Any]) -> list[float | None]:
    """Of the launch with the most ranks that were measured, by rank."""
    found: list[float | None] = []
    for launch in test.get("launches") or ():
        ranks = sorted(launch.get("ranks") or (), key=lambda one: one.get("rank") or 0)
        values = [one.get("peak_bytes") for one in ranks]
        if any(values) and len(values) > len(found):
            found = values
    return found
