"""The strip of nights: a bar a night, as high as it took, coloured and marked by how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from pytest_gputrain.report.chart_svg import picture
from pytest_gputrain.report.page_text import clean
from pytest_gputrain.report.quantities import duration, plural

_WIDTH, _HIGH, _MOST = 720, 90, 60


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
    step = min(_WIDTH / max(1, len(shown)), 48.0)
    parts, wide = [], step * 0.8
    for place, night in enumerate(shown):
        high = max(4.0, night.seconds / longest * _HIGH)
        left, top = place * step + step * 0.1, 20 + _HIGH - high
        kind = {"passed": "", "failed": " failed"}.get(night.verdict, " other")
        sign = {"passed": "✓", "failed": "✕"}.get(night.verdict, "–")
        told = f"{clean(night.date)}: {night.verdict}, {plural(night.failed, 'failure')}, {night.took}"
        parts.append(
            f'<path class="nb{kind}" d="M{left:.1f},{top:.1f}h{wide:.1f}V{20 + _HIGH}h{-wide:.1f}z">'
            f"<title>{escape(told)}</title></path>"
            f'<text class="xm" x="{left + step * 0.4:.1f}" y="{top - 4:.1f}">{sign}</text>'
        )
    if shown:
        foot, right = _HIGH + 36, max(step * len(shown), 200)
        parts.append(f'<text x="2" y="{foot}">{escape(clean(shown[0].date))}</text>')
        parts.append(f'<text class="xe" x="{right:.1f}" y="{foot}">{escape(clean(shown[-1].date))}</text>')
    failed = sum(night.verdict == "failed" for night in shown)
    described = f"{plural(len(shown), 'night')}, {failed} failed, the longest {duration(longest)}"
    return picture(parts, described, _WIDTH, _HIGH + 42)
