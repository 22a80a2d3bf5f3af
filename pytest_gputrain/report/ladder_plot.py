"""The memory ladder as a picture: peak by batch size, the line through it, the capacity and the answer.

Drawn without a display. Needs matplotlib, which the extra [report] brings; ``missing`` says so beforehand.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.report.picture import GREY, canvas, save

SUFFIXES = (".png", ".svg")
GIB, MIB = 2**30, 2**20

# Told apart by colour-blind readers as well (Okabe and Ito); the shapes differ too.
FITS, RAN_OUT, LINE, LIMIT, ANSWER = "#0072B2", "#D55E00", GREY, "#444444", "#009E73"


@dataclass(frozen=True)
class Ladder:
    """points: (batch size, peak in bytes or None where memory ran out). law: (fixed bytes, bytes a sample).

    floor: bytes that it needs whatever the size. capacity, limit: bytes; the limit is what was searched
    against. size: the answer, 0 for none. error_bar: how far the truth may be below and above predicted
    peaks, as fractions; None where they were measured. footnote: where this comes from.
    """

    title: str
    points: Sequence[tuple[int, float | None]]
    law: tuple[float, float] | None
    capacity: int
    limit: int
    size: int
    floor: float = 0.0
    error_bar: tuple[float, float] | None = None
    footnote: str = ""


def missing() -> str | None:
    """One line where matplotlib is not installed; None where it is."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "a plot needs matplotlib, which is not installed: pip install 'pytest-gputrain[report]'"


def draw(ladder: Ladder, path: Path) -> None:
    """Write the picture, PNG or SVG by the file's suffix, whole or not at all. Raises OSError."""
    figure = canvas(8, 5)
    axes = figure.add_subplot()
    _Picture(axes, ladder).draw()
    save(figure, path, ladder.footnote)


class _Picture:
    def __init__(self, axes: Any, ladder: Ladder) -> None:
        self.axes, self.ladder = axes, ladder
        self.unit, self.unit_name = (GIB, "GiB") if ladder.capacity >= GIB else (MIB, "MiB")
        self.fitting = [(size, peak / self.unit) for size, peak in ladder.points if peak is not None]
        self.ran_out = [size for size, peak in ladder.points if peak is None]
        largest = max((size for size, _ in self.fitting), default=0)
        # A search that began with a wild guess would squeeze what matters into a corner.
        self.right = 1.35 * largest if largest else 1.08 * max(self.ran_out, default=1)

    def draw(self) -> None:
        self._limits()
        self._law()
        self._points()
        self._answer()
        self._frame()

    def _limits(self) -> None:
        limit, capacity = self.ladder.limit / self.unit, self.ladder.capacity / self.unit
        self.axes.axhspan(limit, 10 * capacity, color=RAN_OUT, alpha=0.06, linewidth=0)
        self.axes.axhline(limit, color=LIMIT, linewidth=1.2)
        texts = [(limit, f"limit {limit:.3g} {self.unit_name} ({limit / capacity:.0%} of capacity)")]
        if limit < capacity:
            self.axes.axhline(capacity, color=LIMIT, linewidth=1.2, linestyle=(0, (4, 3)))
            texts.append((capacity, f"capacity {capacity:.3g} {self.unit_name}"))
        for height, text in texts:
            self.axes.annotate(
                text, (0, height), (4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                fontsize=8.5, color=LIMIT, va="bottom",
            )  # fmt: skip

    def _law(self) -> None:
        if self.ladder.law is None:
            return
        fixed, slope, floor = (part / self.unit for part in (*self.ladder.law, self.ladder.floor))
        bend = [(floor - fixed) / slope] if slope > 0 and floor > fixed else []
        sizes = [0.0, *(size for size in bend if size < self.right), self.right]
        heights = [max(fixed + slope * size, floor) for size in sizes]
        label = f"line: {_size(fixed, self.unit_name)} + {_size(slope, self.unit_name)} a sample"
        self.axes.plot(sizes, heights, color=LINE, linewidth=1.4, zorder=2, label=label)
        if bar := self.ladder.error_bar:
            low, high = ([height * (1 + part) for height in heights] for part in bar)
            text = f"error bar, {bar[0]:+.0%} to {bar[1]:+.0%}"
            self.axes.fill_between(sizes, low, high, color=LINE, alpha=0.15, linewidth=0, label=text)

    def _points(self) -> None:
        predicted = self.ladder.error_bar is not None
        if self.fitting:
            sizes, peaks = zip(*self.fitting, strict=True)
            word = "predicted" if predicted else "measured"
            face = "white" if predicted else FITS
            look = {"s": 42, "facecolor": face, "edgecolor": FITS, "linewidth": 1.6, "zorder": 4}
            self.axes.scatter(sizes, peaks, label=f"{word} peak", **look)
        if shown := [size for size in self.ran_out if size <= self.right]:
            heights = [self.ladder.limit / self.unit] * len(shown)
            look = {"s": 60, "marker": "x", "color": RAN_OUT, "linewidth": 2, "zorder": 5}
            self.axes.scatter(shown, heights, label="out of memory", **look)

        if beyond := sorted(set(self.ran_out) - set(shown)):
            self.axes.annotate(
                f"{', '.join(map(str, beyond))} too \N{RIGHTWARDS ARROW}", (1, self.ladder.limit / self.unit),
                (-4, -4), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8.5,
                color=RAN_OUT, ha="right", va="top",
            )  # fmt: skip

    def _answer(self) -> None:
        size = self.ladder.size
        if not size:
            return
        self.axes.axvline(size, color=ANSWER, linewidth=1.2, linestyle=(0, (1, 1.5)), zorder=1)
        height = dict(self.fitting).get(size)
        if height is not None:
            self.axes.scatter(
                [size], [height], s=130, facecolor="none", edgecolor=ANSWER, linewidth=2, zorder=6
            )
        side, shift = ("right", -5) if size > self.right / 2 else ("left", 5)  # where there is room
        self.axes.annotate(
            f"batch size {size}", (size, 1), (shift, -5), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha=side, va="top", color=ANSWER, fontsize=9.5, fontweight="bold",
        )  # fmt: skip

    def _frame(self) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = self.axes
        highest = max([self.ladder.capacity / self.unit, *(peak for _, peak in self.fitting)])
        axes.set_xlim(0, self.right)
        axes.set_ylim(0, 1.16 * highest)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.set_xlabel("device batch size")
        axes.set_ylabel(f"peak memory, {self.unit_name}")
        axes.set_title(self.ladder.title, loc="left", fontsize=12)
        axes.grid(color="#E6E6E6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Below the axes: inside, there is no corner that the points of no ladder reach.
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.11), ncols=4, fontsize=8.5, frameon=False)


def _size(value: float, unit: str) -> str:
    """A size in the axis' unit; what would be 0.00… in it in the next smaller one."""
    if unit == "GiB" and abs(value) < 0.1:
        return f"{1024 * value:.3g} MiB"
    return f"{value:.3g} {unit}"
