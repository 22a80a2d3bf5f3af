"""Eager and compiled training as a picture: both losses, their distance on a log axis, recompiles by step.

Drawn without a display. Needs matplotlib, which the extra [report] brings; ``ladder_plot.missing`` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.report.picture import GREY, canvas, save

# Told apart by colour-blind readers as well (Okabe and Ito); the lines differ too.
EAGER, COMPILED = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Curves:
    """eager, compiled: a loss a step. recompiles, breaks: the steps at which they were, once for each."""

    title: str
    eager: Sequence[float]
    compiled: Sequence[float]
    recompiles: Sequence[int] = ()
    breaks: Sequence[int] = ()
    footnote: str = ""


def draw(curves: Curves, path: Path) -> None:
    """Write the picture, PNG or SVG by the file's suffix, whole or not at all. Raises OSError."""
    figure = canvas(9, 7)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    _losses(top, curves)
    _distance(middle, curves)
    _events(bottom, curves)
    figure.suptitle(curves.title, x=0.01, ha="left", fontsize=12)
    save(figure, path, curves.footnote)


def _losses(axes: Any, curves: Curves) -> None:
    axes.plot(curves.eager, color=EAGER, linewidth=2.2, label="eager")
    axes.plot(curves.compiled, color=COMPILED, linewidth=1.3, linestyle=(0, (4, 2)), label="compiled")
    axes.set_ylabel("loss")
    axes.legend(fontsize=9, frameon=False)
    _frame(axes)


def _distance(axes: Any, curves: Curves) -> None:
    """Steps without a difference have no place on a log axis: they are marked at its lower end."""
    apart = [abs(one - other) for one, other in zip(curves.eager, curves.compiled, strict=True)]
    places = [step for step, value in enumerate(apart) if value > 0]
    axes.set_ylabel("|Δ loss|")
    _frame(axes)
    if not places:
        axes.set_yticks([])
        _say(axes, "no difference in any step")
        return
    axes.set_yscale("log")
    axes.plot(places, [apart[step] for step in places], color=GREY, linewidth=1.2, marker=".", markersize=3)
    if same := [step for step, value in enumerate(apart) if not value > 0]:
        lowest = min(apart[step] for step in places) / 2
        axes.plot(same, [lowest] * len(same), linestyle="", marker="|", color=EAGER, label="equal")
        axes.legend(fontsize=8.5, frameon=False)


def _events(axes: Any, curves: Curves) -> None:
    """A mark at each step with recompiles or graph breaks, as high as there are many."""
    axes.set_xlabel("step")
    axes.set_ylabel("number")
    axes.set_xlim(-0.5, max(1, len(curves.eager)) - 0.5)
    _frame(axes)
    drawn = [
        ("recompiles", curves.recompiles, COMPILED, "o"),
        ("graph breaks", curves.breaks, EAGER, "x"),
    ]
    for name, steps, colour, marker in drawn:
        if counted := Counter(steps):
            places, numbers = zip(*sorted(counted.items()), strict=True)
            axes.vlines(places, 0, numbers, color=colour, linewidth=1.2)
            axes.plot(
                places, numbers, linestyle="", marker=marker, color=colour, label=f"{name}: {len(steps)}"
            )
    if axes.lines:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8.5, frameon=False)
    else:
        axes.set_yticks([])
        _say(axes, "no recompiles, no graph breaks")


def _frame(axes: Any) -> None:
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)
