"""The strip of nights: a bar a night, as high as it took, coloured and marked by how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from pytest_gputrain.report.chart_scale import Scale, ticks
from pytest_gputrain.report.chart_svg import axis_y, picture
from pytest_gputrain.report.page_text import clean
from pytest_gputrain.report.quantities import duration, plural

_WIDTH, _LEFT, _TOP, _HIGH, _MOST = 720, 46, 26, 90, 60


class NightLike(Protocol):
    """What the strip shows of a night: `nights.Night` has it."""

    @property
    def date(self) -> str: ...
    @property
    def verdict(self) -> str: ...
    @property
    def passed(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def took(self) -> str: ...


@dataclass(frozen=True)
class NightBar:
    """``date`` as it is shown, ``verdict`` as in report.json."""

    date: str
    verdict: str
    passed: int
    failed: int
    skipped: int
    seconds: float

    @property
    def took(self) -> str:
        return duration(self.seconds)


def strip(nights: Sequence[NightLike]) -> str:
    """SVG of the latest nights, oldest first."""
    shown = nights[-_MOST:]
    longest = max((night.seconds for night in shown), default=0.0) or 1.0
    step = min((_WIDTH - _LEFT) / max(1, len(shown)), 48.0)
    wide, foot = step * 0.8, _TOP + _HIGH
    divisor, unit = (3600, "h") if longest >= 7200 else (60, "min") if longest >= 120 else (1, "s")
    y = Scale(0, longest / divisor, foot, _TOP)
    parts = [axis_y(y, ticks(0, longest / divisor, 3), f"took, {unit}", _WIDTH, _LEFT)]
    for place, night in enumerate(shown):
        high = max(4.0, night.seconds / longest * _HIGH)
        left, top = _LEFT + place * step + step * 0.1, foot - high
        kind = {"passed": "", "failed": " failed"}.get(night.verdict, " other")
        sign = {"passed": "✓", "failed": "✕"}.get(night.verdict, "–")
        told = f"{clean(night.date)}: {night.verdict}, {plural(night.failed, 'failure')}, {night.took}"
        parts.append(
            f'<path class="nb{kind}" d="M{left:.1f},{top:.1f}h{wide:.1f}V{foot}h{-wide:.1f}z">'
            f"<title>{escape(told)}</title></path>"
            f'<text class="xm" x="{left + step * 0.4:.1f}" y="{top - 4:.1f}">{sign}</text>'
        )
    if shown:
        right = _LEFT + max(step * len(shown), 160)
        parts.append(f'<text x="{_LEFT}" y="{foot + 16}">{escape(clean(shown[0].date))}</text>')
        if len(shown) > 1:
            last = escape(clean(shown[-1].date))
            parts.append(f'<text class="xe" x="{right:.1f}" y="{foot + 16}">{last}</text>')
    failed = sum(night.verdict == "failed" for night in shown)
    described = f"{plural(len(shown), 'night')}, {failed} failed, the longest {duration(longest)}"
    return picture(parts, described, _WIDTH, foot + 22)
