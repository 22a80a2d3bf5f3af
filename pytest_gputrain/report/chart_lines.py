"""The lines of a plot, from the series of the report, and what a legend says of each in words. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.report.chart_scale import Point, percentile
from pytest_gputrain.report.quantities import quantity

LOG = {"tp_gradient_error", "distance"}  # plots with a logarithmic axis
# A limit so far above all values would press them into the axis; it is told instead.
_FAR = 5.0


@dataclass(frozen=True)
class Line:
    """``points`` by x, finite; ``gaps``: the x at which there is no number (None, NaN, infinite).

    limit: what the points have to stay below, None for nothing; names: what is at an x that is no number.
    before: this is how it was in an earlier report.
    """

    label: str
    unit: str
    points: Sequence[Point]
    gaps: Sequence[float] = ()
    limit: float | None = None
    limit_label: str = ""
    names: Mapping[float, str] = field(default_factory=dict)
    before: bool = False


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
    limit: Any = series.get("limit")
    names = series.get("names") or ()
    return Line(
        str(series.get("label") or ""),
        str(series.get("unit") or ""),
        sorted(points),
        sorted(gaps),
        float(limit) if _finite(limit) else None,
        str(series.get("limit_label") or ""),
        {float(x): str(name) for x, name in zip(series.get("x") or (), names, strict=False) if _finite(x)},
    )


def limits_of(lines: Sequence[Line], values: Sequence[float], *, log: bool) -> dict[float, str]:
    """The limits that the drawing has room for, with their labels."""
    top = max(map(abs, values), default=0.0)
    found = {}
    for one in lines:
        if one.limit is not None and (log or not values or one.limit <= _FAR * top) and one.limit > 0:
            found[one.limit] = f"{one.limit_label or 'limit'} {_show(one.limit, one.unit)}"
    return found


def numbers(plot: str, line: Line) -> str:
    """The few numbers of a line, for its legend."""
    values = [value for _, value in line.points]
    lost = f"{len(line.gaps)} without a number, the first at {line.gaps[0]:g}" if line.gaps else ""
    if not values:
        return lost or "no numbers"
    if plot == "step_seconds":
        middle, late = (_show(percentile(values, part), line.unit) for part in (0.5, 0.95))
        told = f"p50 {middle}, p95 {late}"
    elif plot in LOG:
        told = "no difference" if not any(values) else f"at most {_most(line)}"
    elif plot in ("memory", "ladder"):
        told = f"at most {_most(line)}"
    elif plot == "recompiles":
        told = f"{sum(values):g} in all"
    elif plot in ("tokens_per_second", "mfu"):
        told = f"median {_show(percentile(values, 0.5), line.unit)}"
    else:
        told = f"{_show(values[0], line.unit)} → {_show(values[-1], line.unit)}"
    return f"{told}; {lost}" if lost else told


def _most(line: Line) -> str:
    """The largest value, and where it is if that place has a name."""
    x, value = max(line.points, key=lambda point: point[1])
    return _show(value, line.unit) + (f" ({line.names[x]})" if x in line.names else "")


def notes(plot: str, lines: Sequence[Line], shown: Sequence[Line], *, log: bool) -> list[str]:
    found = []
    for one in shown:
        drawn = limits_of([one], [y for _, y in one.points], log=log)
        if one.limit is not None and not drawn:
            told = f"{one.limit_label or 'limit'} {_show(one.limit, one.unit)}"
            found.append(f"Beyond the drawing: {told}.")
    if len(lines) > len(shown):
        found.append(f"{len(lines) - len(shown)} more lines are in report.json.")
    if plot in LOG and any(not value > 0 for one in shown for _, value in one.points):
        found.append("Zeros are at the lower edge.")
    if any(one.gaps for one in shown):
        what = "ran out of memory" if plot == "ladder" else "no finite number"
        found.append(f"✕: {what}.")
    return found


def _show(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "fraction" else quantity(value, unit)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
