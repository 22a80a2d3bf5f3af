"""A sweep as a picture: loss against tokens by k, and the final loss against k.

Drawn without a display. Needs matplotlib, which the extra [report] brings; ``ladder_plot.missing`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.report.picture import GREY, canvas, save

# Ordered as k is, and apart in grey and for colour-blind readers; without viridis' end, too light on white.
COLOURS, LIGHTEST = "viridis", 0.85
FAILED = "#D55E00"
MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Curve:
    """A branch. points: (tokens, loss); final_loss, eval_loss: None where the script did not say."""

    k: int
    points: Sequence[tuple[int, float]]
    final_loss: float | None
    eval_loss: float | None = None
    passed: bool = True


@dataclass(frozen=True)
class Sweep:
    """curves: in the order of the legend. footnote: where this comes from."""

    title: str
    curves: Sequence[Curve]
    footnote: str = ""


def draw(sweep: Sweep, path: Path) -> None:
    """Write the picture, PNG or SVG by the file's suffix, whole or not at all. Raises OSError."""
    figure = canvas(11, 5)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _by_tokens(left, sweep.curves)
    _by_k(right, sweep.curves)
    figure.suptitle(sweep.title, x=0.01, ha="left", fontsize=12)
    save(figure, path, sweep.footnote)


def _by_tokens(axes: Any, curves: Sequence[Curve]) -> None:
    from matplotlib import colormaps

    drawn = [curve for curve in curves if curve.points]
    for number, curve in enumerate(drawn):
        colour = colormaps[COLOURS](LIGHTEST * number / max(1, len(drawn) - 1))
        tokens, losses = zip(*curve.points, strict=True)
        label = f"k={curve.k}" + ("" if curve.passed else " (not passed)")
        axes.plot(
            tokens, losses, color=colour, linewidth=1.5, label=label,
            linestyle="-" if curve.passed else (0, (2, 2)),
            marker=MARKERS[number % len(MARKERS)], markersize=4, markevery=[len(tokens) - 1],
        )  # fmt: skip
    _frame(axes, "tokens seen", "loss of the step")
    if drawn:
        axes.legend(fontsize=8.5, frameon=False)
    else:
        _say(axes, "no branch reports the loss of its steps")


def _by_k(axes: Any, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    series = (
        ("final loss", "o", "-", [(c.k, c.final_loss) for c in curves if c.passed]),
        ("evaluation", "s", "--", [(c.k, c.eval_loss) for c in curves if c.passed]),
    )
    for label, marker, line, pairs in series:
        shown = sorted((k, loss) for k, loss in pairs if loss is not None and math.isfinite(loss))
        if shown:
            places, losses = zip(*shown, strict=True)
            colour = "#0072B2" if marker == "o" else "#009E73"
            axes.plot(places, losses, marker=marker, linestyle=line, color=colour, markersize=5, label=label)
    _frame(axes, "k (batch by base batch)", "loss")
    axes.set_xscale("log", base=2)
    ks = [curve.k for curve in curves]
    axes.set_xlim(min(ks) / 1.2, max(ks) * 1.2)  # of a branch without a loss too
    axes.xaxis.set_major_locator(FixedLocator(ks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda k, _place: f"{k:g}")
    if axes.lines:
        axes.legend(fontsize=8.5, frameon=False)
    else:
        _say(axes, "no branch that passed reports a loss")


def _frame(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)
