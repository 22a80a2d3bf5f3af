"""Which plots the page has: a panel a test, with where its numbers come from; failed tests first.

Before them, for each case that several tests trained, their losses and speeds over each other. With an
earlier report a test's lines are drawn over what they were in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_gputrain.report.chart_lines import Line, line_of
from pytest_gputrain.report.charts import TITLES, Chart, charts, peaks
from pytest_gputrain.report.likeness import key
from pytest_gputrain.report.mfu import with_mfu
from pytest_gputrain.report.page_failures import BAD
from pytest_gputrain.report.page_text import anchor, clean, cut_line

_MOST_CHARACTERS = 900_000
_MOST_TESTS, _MOST_OVERLAYS = 60, 12
_OVERLAID = ("loss", "tokens_per_second", "mfu")
_HELD_AGAINST = ("loss", "step_seconds", "tokens_per_second", "mfu", "memory")

_Json = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """The drawings of one test, or of several (``target`` and ``outcome`` are then empty).

    ``origin``: the line of the machine, ``labels``: simulated and such, ``notes``: what could not be drawn.
    """

    name: str
    target: str
    outcome: str
    origin: str
    labels: Sequence[str]
    charts: Sequence[Chart]
    notes: Sequence[str] = ()


def panels(
    tests: Sequence[_Json], machines: Sequence[_Json], labels: Sequence[str], earlier: Sequence[_Json] = ()
) -> tuple[list[Panel], int]:
    """The panels, and how many there was no room for. labels: of the machines, fit for the page."""
    worth = [_told(test, machines) for test in tests if _draws(test)]
    worth.sort(key=lambda one: (one.test.get("outcome") not in BAD, one.test.get("kind") != "stability"))
    before = {key(test): test for test in earlier if test.get("series")}
    found: list[Panel] = []
    room = _MOST_CHARACTERS
    wanted = [*_overlays(worth, labels), *(_panel(one, labels, before) for one in worth[:_MOST_TESTS])]
    for panel in wanted:
        room -= sum(len(chart.drawing) for chart in panel.charts)
        if room < 0:
            break
        found.append(panel)
    return found, len(worth) - sum(bool(panel.target) for panel in found)


@dataclass(frozen=True)
class _Told:
    """A test, its series with those of MFU, and why some are missing."""

    test: _Json
    series: Sequence[_Json]
    notes: Sequence[str]


def _told(test: _Json, machines: Sequence[_Json]) -> _Told:
    place = test.get("machine") or 0
    series, notes = with_mfu(test, machines[place] if place < len(machines) else {})
    return _Told(test, series, [clean(note) for note in notes])


def _draws(test: _Json) -> bool:
    return bool(test.get("series")) or (bool(test.get("check")) and len(_peaks(test)) > 1)


def _panel(told: _Told, labels: Sequence[str], before: Mapping[Any, _Json]) -> Panel:
    test = told.test
    drawn: list[Chart] = []
    was = _by_plot((before.get(key(test)) or {}).get("series") or ())
    for (plot, unit), lines in _by_plot(told.series).items():
        then = was.get((plot, unit), ()) if plot in _HELD_AGAINST else ()
        drawn += charts(clean(plot), lines, then)
    if len(by_rank := _peaks(test)) > 1:
        drawn.append(peaks(by_rank))
    return Panel(
        cut_line(clean(test["id"]), 200),
        anchor(test["id"]),
        str(test.get("outcome")),
        _origin(test, labels),
        [cut_line(clean(label), 40) for label in test.get("labels") or ()],
        drawn,
        told.notes,
    )


def _overlays(worth: Sequence[_Told], labels: Sequence[str]) -> list[Panel]:
    """Of tests of one case, or that differ by their parameters alone, on one machine, a panel each group."""
    groups: dict[tuple[str, int], list[_Told]] = {}
    for one in worth:
        of = str(one.test.get("case") or str(one.test["id"]).partition("[")[0])
        groups.setdefault((of, one.test.get("machine") or 0), []).append(one)
    found = []
    for (of, _), members in groups.items():
        drawn: list[Chart] = []
        laid: set[str] = set()
        for plot in _OVERLAID:
            lines = [
                replace(line, label=f"{_short(one.test, of)}: {line.label}".removesuffix(": "))
                for one in members
                for (name, _), some in _by_plot(one.series).items() if name == plot
                for line in some
            ]  # fmt: skip
            whose = {line.label.partition(":")[0] for line in lines}
            if len(whose) > 1:
                drawn += charts(plot, lines)[:1]
                laid |= whose
        if drawn:
            name = f"{cut_line(clean(of), 120)}: {len(laid)} tests over each other"
            found.append(Panel(name, "", "", _origin(members[0].test, labels), (), drawn))
    return found[:_MOST_OVERLAYS]


def _short(test: _Json, group: str) -> str:
    """What tells a test from the others of its group."""
    if test.get("check"):
        device = test.get("device")
        return cut_line(clean(test["check"]) + (f" on {clean(device)}" if device else ""), 60)
    return cut_line(clean(str(test["id"]).removeprefix(group)), 60)


def _by_plot(series: Sequence[_Json]) -> dict[tuple[str, str], list[Line]]:
    """Lines by plot and unit, in the order of the plots' titles."""
    order = list(TITLES)
    found: dict[tuple[str, str], list[Line]] = {}
    for one in series:
        line = line_of(_shown(one))
        found.setdefault((str(one.get("plot")), line.unit), []).append(line)
    places = sorted(found, key=lambda key: order.index(key[0]) if key[0] in order else len(order))
    return {place: found[place] for place in places}


def _origin(test: _Json, labels: Sequence[str]) -> str:
    place = test.get("machine") or 0
    return labels[place] if place < len(labels) else ""


def _shown(series: _Json) -> dict[str, Any]:
    return {
        **series,
        "label": cut_line(clean(series.get("label") or ""), 80),
        "unit": clean(series.get("unit") or ""),
        "limit_label": cut_line(clean(series.get("limit_label") or ""), 40),
        "names": [cut_line(clean(name), 60) for name in series.get("names") or ()],
    }


def _peaks(test: _Json) -> list[float | None]:
    """Of the launch with the most ranks that were measured, by rank."""
    found: list[float | None] = []
    for launch in test.get("launches") or ():
        ranks = sorted(launch.get("ranks") or (), key=lambda one: one.get("rank") or 0)
        values = [one.get("peak_bytes") for one in ranks]
        if any(values) and len(values) > len(found):
            found = values
    return found
