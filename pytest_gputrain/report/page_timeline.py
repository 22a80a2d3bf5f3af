"""The ranks of a launch on one time axis, as SVG of the page's colours.

From Chrome trace events where the report holds them: a bar a collective, what a rank still waited in is
marked. Without them a bar a rank, as long as it ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pytest_gputrain.report.chart_scale import Scale, ticks
from pytest_gputrain.report.chart_svg import picture
from pytest_gputrain.report.page_text import clean
from pytest_gputrain.report.quantities import duration, fitting, number

_WIDTH, _LEFT, _LANE, _TOP = 720, 74, 22, 6
_MOST_LANES = 16
_MOST_BARS = 150  # a lane, the latest: more are a grey smear
_BAD = ("waiting", "hung", "stuck")


def timeline(events: object, ranks: Sequence[Mapping[str, Any]], culprit: object) -> str | None:
    """SVG, or None where nothing is known. ``ranks`` with the one at fault first."""
    lanes = _lanes_of_events(events) or {
        one["rank"]: [(0.0, float(one["seconds"]), one.get("rank") == culprit, str(one.get("outcome")))]
        for one in ranks
        if isinstance(one.get("rank"), int) and one.get("seconds") is not None
    }
    if not lanes:
        return None
    first = [one["rank"] for one in ranks if one.get("rank") in lanes] or list(lanes)
    shown = sorted(first[:_MOST_LANES])
    last = next((clean(one.get("last") or "") for one in ranks if one.get("rank") == culprit), "")
    return _draw({rank: lanes[rank][-_MOST_BARS:] for rank in shown}, len(lanes), culprit, last)


_Bar = tuple[float, float, bool, str]  # start and length in seconds, marked, what it says


def _lanes_of_events(events: object) -> dict[int, list[_Bar]]:
    """Of Chrome trace events (microseconds), as a list or an object that holds them."""
    if isinstance(events, Mapping):
        events = events.get("traceEvents")
    lanes: dict[int, list[_Bar]] = {}
    for event in events if isinstance(events, list) else ():
        try:
            if event["ph"] != "X":
                continue
            state = str((event.get("args") or {}).get("state") or event.get("cat"))
            bar = (event["ts"] / 1e6, event["dur"] / 1e6, state in _BAD, f"{event['name']} {state}")
            lanes.setdefault(int(event["tid"]), []).append(bar)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # from another tool; a bar less
    return lanes


def _draw(lanes: Mapping[int, Sequence[_Bar]], of: int, culprit: object, last: str) -> str:
    """``last``: what the rank at fault did last, written where its bars end."""
    start = min(bar[0] for lane in lanes.values() for bar in lane)
    end = max(bar[0] + bar[1] for lane in lanes.values() for bar in lane)
    span = max(end - start, 1e-6)
    divisor, unit = fitting("s", span)
    x = Scale(0, span / divisor, _LEFT, _WIDTH - 16)
    foot = _TOP + _LANE * len(lanes)
    parts = []
    for place, (rank, lane) in enumerate(lanes.items()):
        top = _TOP + _LANE * place
        kind = "tr bad" if rank == culprit else "tr"
        parts.append(f'<text class="{kind}" x="0" y="{top + 15}">rank {rank}</text>')
        parts += _bars(lane, start, divisor, x, top)
        if rank == culprit and not lane[-1][2]:
            parts += _stopped(x((lane[-1][0] + lane[-1][1] - start) / divisor), top, last)
    at = [tick for tick in ticks(0, span / divisor, 6) if tick >= 0]
    grid = "".join(f"M{x(tick):.1f},{_TOP}V{foot}" for tick in at)
    numbers = "".join(
        f'<text class="xm" x="{x(tick):.1f}" y="{foot + 14}">{number(tick)}</text>' for tick in at
    )
    more = f" of {of}" if of > len(lanes) else ""
    label = f"{unit} of {'the launch' if not more else f'{len(lanes)}{more} ranks'}"
    last = f'<text class="xe" x="{_WIDTH - 16}" y="{foot + 28}">{label}</text>'
    described = f"Timeline of {len(lanes)}{more} ranks over {duration(span)}"
    return picture([f'<path class="gr" d="{grid}"/>', *parts, numbers, last], described, _WIDTH, foot + 32)


def _stopped(at: float, top: int, last: str) -> list[str]:
    """A cross where a rank's bars end, and what it did then, on the side that has room."""
    told = last.partition("   ")[0]
    told = told if len(told) <= 60 else f"{told[:59]}…"
    left = at > _WIDTH / 2
    mark = f'<path class="no" d="M{at + 8:.1f},{top + 11}m-4,-4l8,8m0,-8l-8,8"/>'
    place = at - 4 if left else at + 18
    anchor = ' class="tl"' if left else ' class="tl from"'
    return [mark, f'<text{anchor} x="{place:.1f}" y="{top + 15}">{escape(told)}</text>'] if told else [mark]


def _bars(lane: Sequence[_Bar], start: float, divisor: float, x: Scale, top: int) -> list[str]:
    """Those that are marked say what they are; the others are one path, to be short."""
    plain, marked = "", []
    for begin, length, bad, told in lane:
        left, right = x((begin - start) / divisor), x((begin - start + length) / divisor)
        d = f"M{left:.1f},{top + 4}h{max(1.2, right - left - 0.6):.1f}v14H{left:.1f}z"
        if bad:
            marked.append(f'<path class="tb bad" d="{d}"><title>{escape(clean(told))}</title></path>')
            marked.append(
                f'<text class="tl" x="{right - 4:.1f}" y="{top + 15}">{escape(clean(told)[:60])}</text>'
            )
        else:
            plain += d
    return ([f'<path class="tb" d="{plain}"/>'] if plain else []) + marked
