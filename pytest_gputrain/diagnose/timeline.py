"""The ranks of a launch on one time axis: a Chrome trace (opens in Perfetto) and an SVG. Pure.

A lane a rank, a bar a collective. A bar begins where the collective was called. Records do not tell when a
finished one ended, so its bar ends at the rank's next call, or after a sixtieth of the picture; the bar of
one that the rank still waited in runs to the end and is red.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Records = Sequence[Mapping[str, Any]]

_SHARE = 60  # a finished collective is at most this part of the whole
_SHOWN = 200  # bars a rank in the SVG, the latest: more are a grey smear, and megabytes
_WIDTH, _LEFT, _TOP, _LANE, _BAR = 960, 70, 34, 34, 20
_COLOURS = {"done": "#4c78a8", "waiting": "#d62728"}


@dataclass(frozen=True)
class Bar:
    """One collective on one rank; times in seconds from the first call of any rank."""

    rank: int
    label: str
    start: float
    end: float
    stuck: bool
    details: Mapping[str, Any]


def bars(records: Mapping[int, Records], end: float | None = None) -> list[Bar]:
    """The bars of all ranks by time; ``end`` (seconds since the epoch) is when the launch was ended."""
    times = [record["at"] for told in records.values() for record in told if record.get("at")]
    if not times:
        return []
    first = min(times)
    last = max(end or 0.0, *times)
    longest = max(last - first, 1e-3) / _SHARE
    return [
        bar
        for rank, told in sorted(records.items())
        for bar in _lane(rank, [record for record in told if record.get("at")], first, last, longest)
    ]


def _lane(rank: int, told: Records, first: float, last: float, longest: float) -> list[Bar]:
    found = []
    for index, record in enumerate(told):
        stuck = record.get("state") == "waiting"
        following = told[index + 1]["at"] if index + 1 < len(told) else last
        start = record["at"] - first
        end = last - first if stuck else min(following - first, start + longest)
        details = {key: record[key] for key in ("sizes", "dtypes", "group", "location") if record.get(key)}
        found.append(Bar(rank, _label(record), start, max(end, start), stuck, details))
    return found


def _label(record: Mapping[str, Any]) -> str:
    number = record.get("seq")
    return str(record.get("op", "?")) + ("" if number is None else f" #{number}")


def chrome_trace(found: Sequence[Bar]) -> dict[str, Any]:
    """As chrome://tracing and ui.perfetto.dev read it; microseconds."""
    names = [
        {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}}
        for rank in sorted({bar.rank for bar in found})
    ]
    events = [
        {
            "ph": "X",
            "cat": "stuck" if bar.stuck else "collective",
            "name": bar.label,
            "pid": 0,
            "tid": bar.rank,
            "ts": round(bar.start * 1e6),
            "dur": max(1, round((bar.end - bar.start) * 1e6)),
            "args": {**bar.details, "state": "waiting" if bar.stuck else "done"},
            **({"cname": "terrible"} if bar.stuck else {}),
        }
        for bar in found
    ]
    return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


def svg(found: Sequence[Bar], title: str) -> str:
    """The same as a picture; each bar says on hover what it is."""
    ranks = sorted({bar.rank for bar in found})
    height = _TOP + _LANE * len(ranks) + 26
    shown = [bar for rank in ranks for bar in [b for b in found if b.rank == rank][-_SHOWN:]]
    start = min((bar.start for bar in shown), default=0.0)
    span = max((bar.end for bar in shown), default=1.0) - start or 1.0

    def x(seconds: float) -> float:
        return _LEFT + (seconds - start) / span * (_WIDTH - _LEFT - 20)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for lane, rank in enumerate(ranks):
        y = _TOP + lane * _LANE
        lines.append(f'<text x="10" y="{y + 15}">rank {rank}</text>')
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y + 10}" y2="{y + 10}" stroke="#ddd"/>')
    # What is stuck comes last, so that nothing is drawn over it.
    for bar in sorted(shown, key=lambda bar: bar.stuck):
        lines += _bar(bar, x(bar.start), x(bar.end), _TOP + ranks.index(bar.rank) * _LANE)
    axis = f"0 to {span:.3g} s, from the first collective shown; red: a rank still waited in it at the end"
    lines += [f'<text x="{_LEFT}" y="{height - 8}" fill="#666">{axis}</text>', "</svg>"]
    return "\n".join(lines) + "\n"


def _bar(bar: Bar, left: float, right: float, y: int) -> list[str]:
    colour = _COLOURS["waiting" if bar.stuck else "done"]
    where = bar.details.get("location")
    said = escape(f"rank {bar.rank}: {bar.label}" + (f" at {where}" if where else ""))
    width = max(1.5, right - left)
    lines = [
        f'<rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}" '
        f'stroke="white" stroke-width="0.5"><title>{said}</title></rect>'
    ]
    if bar.stuck and width > 7 * len(bar.label):
        lines.append(f'<text x="{left + 4:.1f}" y="{y + 14}" fill="white">{escape(bar.label)}</text>')
    return lines
