"""The plots of the page, from the series of the report: the form of each, its legend, its numbers. Pure.

A drawing is SVG text in the page, so that nothing is fetched, and is sharp and readable at any width. Colours
are told apart by colour-blind readers as well (Okabe and Ito), and lines by their dashes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.report import chart_svg as svg
from pytest_gputrain.report.chart_scale import (
    Point,
    Scale,
    log_ticks,
    percentile,
    spread,
    thin,
    ticks,
    whole_ticks,
)
from pytest_gputrain.report.quantities import fitting, quantity

MOST_LINES = 8  # in one drawing; more is a tangle, and is counted instead
MOST_POINTS = 240  # a line: one a pixel and a half
MOST_DOTS = 200

TITLES = {
    "loss": "Loss",
    "step_seconds": "Step time",
    "tokens_per_second": "Tokens a second",
    "mfu": "Model FLOP utilisation",
    "memory": "Memory",
    "ladder": "Batch-size ladder",
    "recompiles": "Recompiles",
    "tp_gradient_error": "Tensor-parallel gradient error",
}
_X = {"ladder": "batch size", "tp_gradient_error": "parameter", "memory": "step"}
_LOG = {"tp_gradient_error", "distance"}
_FROM_ZERO = {"step_seconds", "tokens_per_second", "mfu", "memory", "ladder", "recompiles"}


@dataclass(frozen=True)
class Line:
    """``points`` by x, finite; ``gaps``: the x at which there is no number (None, NaN, infinite)."""

    label: str
    unit: str
    points: Sequence[Point]
    gaps: Sequence[float] = ()


@dataclass(frozen=True)
class Key:
    """An entry of a legend: its line, its name, its numbers in words."""

    swatch: str
    label: str
    numbers: str


@dataclass(frozen=True)
class Chart:
    """``drawing``: SVG, safe to put into a page. ``notes``: what the drawing leaves out or cannot show."""

    title: str
    drawing: str
    legend: Sequence[Key] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def line_of(series: Mapping[str, Any]) -> Line:
    """A line of a series of the report; what is not a pair of numbers is a gap, or is left out."""
    points, gaps = [], []
    for x, y in zip(series.get("x") or (), series.get("y") or (), strict=False):
        if not _finite(x):
            continue
        if _finite(y):
            points.append((float(x), float(y)))
        else:
            gaps.append(float(x))
    return Line(str(series.get("label") or ""), str(series.get("unit") or ""), sorted(points), sorted(gaps))


def charts(plot: str, lines: Sequence[Line]) -> list[Chart]:
    """The drawings of the lines of one plot: one, and for several losses their distance as well."""
    title = TITLES.get(plot, plot.replace("_", " ").capitalize())
    drawn = [_chart(plot, title, lines)]
    if plot == "loss" and len(lines) > 1 and (apart := _distances(lines[0], lines[1 : MOST_LINES + 1])):
        drawn.append(_chart("distance", f"Loss: distance from {lines[0].label}", apart, first=1))
    return drawn


def peaks(by_rank: Sequence[float | None], title: str = "Peak memory by rank") -> Chart:
    """A bar a rank, in bytes; None where it was not measured."""
    known = [value for value in by_rank if value is not None]
    divisor, name = fitting("bytes", max(known, default=0))
    _, high = spread([value / divisor for value in known], zero=True)
    y = Scale(0, high, svg.HEIGHT - svg.BOTTOM, svg.TOP)
    x = Scale(-0.5, max(1, len(by_rank)) - 0.5, svg.LEFT, svg.WIDTH - svg.RIGHT)
    parts = [
        svg.axis_y(y, ticks(0, high), name),
        svg.bars([None if value is None else value / divisor for value in by_rank], y, 0),
        svg.axis_x(x, whole_ticks(0, max(1, len(by_rank) - 1), min(8, len(by_rank))), "rank"),
    ]
    words = "no rank measured" if not known else f"{_range(known, 'bytes')} over {len(known)} ranks"
    return Chart(title, svg.picture(parts, f"{title}: {words}"), [Key("", "", words)])


def _chart(plot: str, title: str, lines: Sequence[Line], first: int = 0) -> Chart:
    """``first``: the place in the colours of the first line."""
    shown, log = lines[:MOST_LINES], plot in _LOG
    values = [y for one in shown for _, y in one.points]
    unit = next((one.unit for one in shown if one.unit), "")
    divisor, name = (1.0, unit) if log else fitting(unit, max(map(abs, values), default=0.0))
    if name == "fraction":
        divisor, name = 0.01, "%"
    low, high = spread([value / divisor for value in values], log=log, zero=plot in _FROM_ZERO)
    x_values = [x for one in shown for x in (*(x for x, _ in one.points), *one.gaps)]
    x_low, x_high = spread(x_values)
    x = Scale(x_low, x_high, svg.LEFT + 4, svg.WIDTH - svg.RIGHT - 4)
    y = Scale(low, high, svg.HEIGHT - svg.BOTTOM, svg.TOP, log)
    parts = [svg.axis_y(y, log_ticks(low, high) if log else ticks(low, high), name)]
    for place, one in enumerate(shown, first):
        scaled = [(at, value / divisor) for at, value in one.points]
        parts.append(_body(plot, scaled, x, y, place, alone=len(shown) == 1))
        parts.append(svg.crosses(one.gaps[:MOST_DOTS], x, y.end + 6))
    if not values:
        parts.append(svg.say("no number to draw"))
    parts.append(svg.axis_x(x, whole_ticks(x_low, x_high), _X.get(plot, "step")))
    legend = [
        Key(svg.swatch(place), one.label, _numbers(plot, one)) for place, one in enumerate(shown, first)
    ]
    described = f"{title}. " + ". ".join(f"{one.label}: {_numbers(plot, one)}" for one in shown)
    return Chart(title, svg.picture(parts, described), legend, _notes(plot, lines, shown))


def _body(plot: str, points: Sequence[Point], x: Scale, y: Scale, place: int, *, alone: bool) -> str:
    if plot == "recompiles":
        return svg.stems(points, x, y, place) + svg.marks(points, x, y, place)
    if plot == "step_seconds" and alone and points:
        values = [value for _, value in points]
        return (
            svg.dots(thin(points, MOST_DOTS), x, y, place)
            + svg.level(percentile(values, 0.95), y, "p95", 1)
            + svg.level(percentile(values, 0.5), y, "p50", 0, below=True)
        )
    if plot == "tp_gradient_error":
        return svg.dots(_on_paper(thin(points, 2 * MOST_DOTS), y), x, y, place)
    drawn = svg.line(thin(_on_paper(points, y), MOST_POINTS), x, y, place)
    return drawn + svg.marks(points, x, y, place) if plot == "ladder" or len(points) < 3 else drawn


def _on_paper(points: Sequence[Point], y: Scale) -> list[Point]:
    """On a log axis a zero has no place: it is put at the lower edge."""
    return [(x, max(value, y.low)) for x, value in points]


def _distances(base: Line, others: Sequence[Line]) -> list[Line]:
    """|Δ| at the steps that both have."""
    known = dict(base.points)
    lines = [
        Line(one.label, "", [(x, abs(y - known[x])) for x, y in one.points if x in known]) for one in others
    ]
    return [one for one in lines if one.points]


def _numbers(plot: str, line: Line) -> str:
    """The few numbers of a line, for its legend."""
    values = [value for _, value in line.points]
    lost = f"{len(line.gaps)} without a number, the first at {line.gaps[0]:g}" if line.gaps else ""
    if not values:
        return lost or "no numbers"
    if plot == "step_seconds":
        middle, late = (_show(percentile(values, part), line.unit) for part in (0.5, 0.95))
        told = f"p50 {middle}, p95 {late}"
    elif plot in _LOG:
        told = "no difference" if not any(values) else f"at most {_show(max(values), line.unit)}"
    elif plot in ("memory", "ladder"):
        told = f"at most {_show(max(values), line.unit)}"
    elif plot == "recompiles":
        told = f"{sum(values):g} in all"
    elif plot in ("tokens_per_second", "mfu"):
        told = f"median {_show(percentile(values, 0.5), line.unit)}"
    else:
        told = f"{_show(values[0], line.unit)} → {_show(values[-1], line.unit)}"
    return f"{told}; {lost}" if lost else told


def _notes(plot: str, lines: Sequence[Line], shown: Sequence[Line]) -> list[str]:
    notes = []
    if len(lines) > len(shown):
        notes.append(f"{len(lines) - len(shown)} more lines are in report.json.")
    if plot in _LOG and any(not value > 0 for one in shown for _, value in one.points):
        notes.append("Zeros are at the lower edge.")
    if any(one.gaps for one in shown):
        what = "ran out of memory" if plot == "ladder" else "no finite number"
        notes.append(f"✕: {what}.")
    return notes


def _range(values: Sequence[float], unit: str) -> str:
    low, high = quantity(min(values), unit), quantity(max(values), unit)
    return low if low == high else f"{low} to {high}"


def _show(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "fraction" else quantity(value, unit)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
