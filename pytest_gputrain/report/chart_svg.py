"""The pieces of a picture as SVG text: axes, lines, marks, bars. Colours are classes of the style sheet.

No ``style`` attribute anywhere: the page's content policy forbids them. Every text from outside is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pytest_gputrain.report.chart_scale import Point, Scale
from pytest_gputrain.report.quantities import number

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 18, 30
# Circle, square, triangle, diamond, from their middle.
SHAPES = (
    "m-4,0a4,4 0 1 0 8,0a4,4 0 1 0 -8,0",
    "m-3.5,-3.5h7v7h-7z",
    "m0,-4.5l4,7h-8z",
    "m0,-5l4,5l-4,5l-4,-5z",
)
PLACES = 6  # colours and dashes of lines before they come again


def picture(parts: Sequence[str], described: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """The whole drawing. ``described`` is what it shows in a sentence, for those who do not see it."""
    text = escape(described)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text}">{"".join(parts)}</svg>'


def axis_y(
    scale: Scale, at: Sequence[float], unit: str, right: float = WIDTH - RIGHT, left: float = LEFT
) -> str:
    """Hairlines across with their numbers, the unit on top."""
    lines = "".join(f"M{_n(left)},{_n(scale(tick))}H{_n(right)}" for tick in at)
    numbers = "".join(_text(left - 6, scale(tick) + 4, _tick(tick, scale), "ye") for tick in at)
    return f'<path class="gr" d="{lines}"/>{numbers}' + (_text(2, 11, unit, "yu") if unit else "")


def axis_x(scale: Scale, at: Sequence[float], label: str, bottom: float = HEIGHT - BOTTOM) -> str:
    """Numbers below, the label at the right end under them."""
    marks = "".join(f"M{_n(scale(tick))},{_n(bottom)}v4" for tick in at)
    numbers = "".join(_text(scale(tick), bottom + 15, number(tick), "xm") for tick in at)
    return f'<path class="ax" d="M{_n(scale.start)},{_n(bottom)}H{_n(scale.end)}{marks}"/>{numbers}' + _text(
        scale.end, bottom + 28, label, "xe"
    )


def line(points: Sequence[Point], x: Scale, y: Scale, place: int, *, before: bool = False) -> str:
    """A line through ``points``; ``place`` chooses colour and dashes. ``before``: broad and pale, behind."""
    kind = "was" if before else "ln"
    return f'<path class="{kind} s{place % PLACES}" d="{_path(points, x, y)}"/>' if len(points) > 1 else ""


def dots(points: Sequence[Point], x: Scale, y: Scale, place: int) -> str:
    """Round dots: lines of no length with round ends."""
    d = "".join(f"M{_n(x(one))},{_n(y(other))}h0" for one, other in points)
    return f'<path class="dt s{place % PLACES}" d="{d}"/>' if d else ""


def marks(points: Sequence[Point], x: Scale, y: Scale, place: int) -> str:
    """A shape a point: circle, square, triangle, diamond by ``place``."""
    shape = SHAPES[place % len(SHAPES)]
    d = "".join(f"M{_n(x(one))},{_n(y(other))}{shape}" for one, other in points)
    return f'<path class="mk s{place % PLACES}" d="{d}"/>' if d else ""


def stems(points: Sequence[Point], x: Scale, y: Scale, place: int) -> str:
    """A line up from the axis to each point."""
    d = "".join(f"M{_n(x(one))},{_n(y.start)}V{_n(y(other))}" for one, other in points)
    return f'<path class="ln s{place % PLACES}" d="{d}"/>' if d else ""


def level(value: float, y: Scale, label: str, place: int, *, below: bool = False) -> str:
    """A thin line across at ``value`` with its label above, or below, its right end."""
    at = y(value)
    foot = at + 11 if below else max(at - 4, TOP - 4)
    across = f'<path class="lv s{place % PLACES}" d="M{LEFT},{_n(at)}H{WIDTH - RIGHT}"/>'
    return across + _text(WIDTH - RIGHT, foot, label, "lb")


def limit(value: float, y: Scale, label: str) -> str:
    """A line across that the values have to stay below, its label above its left end."""
    at = y(value)
    foot = at - 4 if at > TOP + 10 else at + 12
    across = f'<path class="lm" d="M{LEFT},{_n(at)}H{WIDTH - RIGHT}"/>'
    return across + _text(LEFT + 4, foot, label, "ll")


def crosses(xs: Sequence[float], x: Scale, at: float) -> str:
    """Where there is no number (out of memory, not finite): a cross at height ``at`` (pixels)."""
    d = "".join(f"M{_n(x(one))},{_n(at)}m-4,-4l8,8m0,-8l-8,8" for one in xs)
    return f'<path class="no" d="{d}"/>' if d else ""


def bars(heights: Sequence[float | None], y: Scale, place: int, right: float = WIDTH - RIGHT) -> str:
    """Upright bars side by side; None leaves a gap. Below three pixels a bar there is no space between."""
    step = (right - LEFT) / max(1, len(heights))
    # Few bars are not made as broad as houses.
    wide = min(step * 0.72, 34) if step > 3 else step
    foot, first = _n(y.start), LEFT + (step - wide) / 2
    d = "".join(
        f"M{_n(first + index * step)},{foot}V{_n(y(high))}h{_n(wide)}V{foot}z"
        for index, high in enumerate(heights)
        if high is not None
    )
    return f'<path class="br s{place % PLACES}" d="{d}"/>'


def swatch(place: int, *, before: bool = False) -> str:
    """What stands for a line in a legend."""
    return (
        f'<svg class="sw" viewBox="0 0 26 10" aria-hidden="true">'
        f'<path class="{"was" if before else "ln"} s{place % PLACES}" d="M1,5H25"/></svg>'
    )


def say(text: str) -> str:
    """In the middle of the drawing, where there is nothing to draw."""
    return _text((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2, text, "xm")


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Relative moves in tenths of a pixel, which are the shortest to write."""
    parts, before = [], (0.0, 0.0)
    for index, (one, other) in enumerate(points):
        place = round(x(one), 1), round(y(other), 1)
        step = place[0] - before[0], place[1] - before[1]
        parts.append(f"{'l' if index else 'M'}{_n(step[0])},{_n(step[1])}")
        before = place
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}">{escape(text)}</text>'


def _tick(value: float, scale: Scale) -> str:
    """On a log axis as a power: 1e-7."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if scale.log else number(value)


def _n(value: float) -> str:
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text
