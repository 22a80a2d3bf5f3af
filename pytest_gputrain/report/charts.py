"""The plots of the page, from the series of the report: the form of each, its legend, its numbers. Pure.

A drawing is SVG text in the page, so that nothing is fetched, and is sharp and readable at any width. Colours
are told apart by colour-blind readers as well (Okabe and Ito), and lines by their dashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pytest_gputrain.report import chart_svg as svg
from pytest_gputrain.report.chart_lines import LOG, Line, limits_of, notes, numbers
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
_MOST_MARKS = 80

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
_X = {"ladder": "batch size"}
_NAMED_X = {"tp_gradient_error": "layer", "memory": "rank"}
_FROM_ZERO = {"step_seconds", "tokens_per_second", "mfu", "memory", "ladder", "recompiles"}


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


def charts(plot: str, lines: Sequence[Line], earlier: Sequence[Line] = ()) -> list[Chart]:
    """The drawings of the lines of one plot: one, and for several losses their distance as well.

    ``earlier``: the lines of an earlier report; those of the same label are drawn along, and of losses the
    distance from them.
    """
    title = TITLES.get(plot, plot.replace("_", " ").capitalize())
    was = {one.label: one for one in earlier}
    before = [
        replace(was[one.label], label=f"{one.label}, earlier", before=True)
        for one in lines if one.label in was
    ]  # fmt: skip
    drawn = [_chart(plot, title, lines, before)]
    if plot != "loss":
        return drawn
    apart = _distances(lines[0], lines[1 : MOST_LINES + 1]) if lines else []
    moved = [one for new in lines if new.label in was for one in _distances(was[new.label], [new])]
    notes = [*drawn[0].notes]
    for found, of, first in ((apart, lines[0].label if lines else "", 1), (moved, "the earlier report", 0)):
        if any(y for one in found for _, y in one.points):
            drawn.append(_chart("distance", f"|Δ loss| from {of}", found, first=first))
        elif found:
            notes.append(f"No step differs from {of}.")
    return [replace(drawn[0], notes=notes), *drawn[1:]]


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


def _chart(
    plot: str, title: str, lines: Sequence[Line], before: Sequence[Line] = (), first: int = 0
) -> Chart:
    """``first``: the place in the colours of the first line; each line of ``before`` has that of its own."""
    shown, log = lines[:MOST_LINES], plot in LOG
    # What was is drawn first, so that what is lies over it.
    colours = {one.label: place for place, one in enumerate(shown, first)}
    was = [(colours[own], one) for one in before if (own := one.label.removesuffix(", earlier")) in colours]
    drawn = [*was, *((colours[one.label], one) for one in shown)]
    values = [y for _, one in drawn for _, y in one.points]
    limits = limits_of(shown, values, log=log)
    unit = next((one.unit for one in shown if one.unit), "")
    reach = [*values, *limits]
    divisor, name = (1.0, unit) if log else fitting(unit, max(map(abs, reach), default=0.0))
    if name == "fraction":
        divisor, name = 0.01, "%"
    low, high = spread([value / divisor for value in reach], log=log, zero=plot in _FROM_ZERO)
    x_values = [x for _, one in drawn for x in (*(x for x, _ in one.points), *one.gaps)]
    x_low, x_high = spread(x_values)
    x = Scale(x_low, x_high, svg.LEFT + 4, svg.WIDTH - svg.RIGHT - 4)
    y = Scale(low, high, svg.HEIGHT - svg.BOTTOM, svg.TOP, log)
    named = any(one.names for one in shown)
    across = log_ticks(low, high) if log else (whole_ticks if plot == "recompiles" else ticks)(low, high)
    parts = [svg.axis_y(y, across, name)]
    parts += [svg.limit(value / divisor, y, label) for value, label in limits.items()]
    for place, one in drawn:
        scaled = [(at, value / divisor) for at, value in one.points]
        if one.before:
            parts.append(svg.line(thin(_on_paper(scaled, y), MOST_POINTS), x, y, place, before=True))
            continue
        parts.append(_body(plot, scaled, x, y, place, alone=len(drawn) == 1, named=named))
        parts.append(svg.crosses(one.gaps[:MOST_DOTS], x, y.end + 6))
    if not values:
        parts.append(svg.say("no number to draw"))
    of_x = _NAMED_X.get(plot, "place") if named else _X.get(plot, "step")
    parts.append(svg.axis_x(x, whole_ticks(x_low, x_high), of_x))
    legend = [Key(svg.swatch(place, before=one.before), one.label, numbers(plot, one)) for place, one in
              sorted(drawn, key=lambda pair: (pair[0], pair[1].before))]  # fmt: skip
    described = f"{title}. " + ". ".join(f"{one.label}: {numbers(plot, one)}" for _, one in drawn)
    return Chart(title, svg.picture(parts, described), legend, notes(plot, lines, shown, log=log))


def _body(
    plot: str, points: Sequence[Point], x: Scale, y: Scale, place: int, *, alone: bool, named: bool
) -> str:
    if plot == "recompiles":
        made = [point for point in points if point[1]]
        return svg.stems(made, x, y, place) + svg.marks(made, x, y, place)
    if named and len(points) <= _MOST_MARKS:
        return svg.marks(_on_paper(points, y), x, y, place)
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


def _range(values: Sequence[float], unit: str) -> str:
    low, high = quantity(min(values), unit), quantity(max(values), unit)
    return low if low == high else f"{low} to {high}"
