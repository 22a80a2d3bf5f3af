"""Gradient error by layer as a picture, on a log axis, and what each rank holds.

Drawn without a display. Needs matplotlib, which the extra [report] brings; ``ladder_plot.missing`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_gputrain.report.picture import canvas, save
from pytest_gputrain.report.tp_report import SMALLEST, RankMemory, Report

RIGHT, WRONG, LIMIT = "#0072B2", "#D55E00", "#444444"
MIB = 2**20
MOST_NAMES = 40  # beyond, only every second, third, … layer has its name


def draw(report: Report, path: Path) -> None:
    """Write the picture, PNG or SVG by the file's suffix, whole or not at all. Raises OSError."""
    height = 2.2 + 0.17 * max(8, min(len(report.layers), 2 * MOST_NAMES))
    figure = canvas(11, height)
    left, right = figure.subplots(1, 2, width_ratios=(4, 1))
    _errors(left, report)
    _memory(right, report.memory, report.whole)
    figure.suptitle(f"{report.title}, {report.ranks}", x=0.01, ha="left", fontsize=12)
    footnote = ", ".join(f"{name} {value}" for name, value in report.origin.items() if value is not None)
    save(figure, path, footnote, fontsize=6.5)


def _errors(axes: Any, report: Report) -> None:
    names = list(report.layers)
    values = [min(max(report.layers[name], SMALLEST), 1e3) for name in names]
    limit = report.tolerance
    colours = [WRONG if limit is not None and not value <= limit else RIGHT for value in values]
    places = range(len(names))
    axes.hlines(places, SMALLEST / 10, values, color="#D8D8D8", linewidth=1)
    axes.scatter(values, places, c=colours, s=16, zorder=3)
    axes.set_xscale("log")
    axes.set_xlim(min([*values, 1e-8]) / 3, max([*values, (limit or 1e-4)]) * 5)
    if limit is not None:
        axes.axvline(limit, color=LIMIT, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"allowed {limit:.0e}", (limit, 1), (3, -3), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=8, color=LIMIT, va="top",
        )  # fmt: skip
    step = -(-len(names) // MOST_NAMES) if names else 1
    axes.set_yticks(list(places)[::step], names[::step], fontsize=6.5)
    axes.invert_yaxis()  # the model's first layer on top
    axes.set_xlabel("relative error of the gradient against a single process")
    _frame(axes)


def _memory(axes: Any, memory: Sequence[RankMemory], whole: RankMemory | None) -> None:
    places = range(len(memory))
    axes.bar(places, [held.bytes / MIB for held in memory], color=RIGHT, width=0.7)
    if whole is not None and memory:
        axes.axhline(whole.bytes / MIB, color=LIMIT, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(
            "whole model", (0, whole.bytes / MIB), (2, -3), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=8, color=LIMIT, va="top",
        )  # fmt: skip
    axes.set_xticks(list(places))
    axes.set_xlabel("rank")
    axes.set_ylabel("parameters, MiB")
    _frame(axes)


def _frame(axes: Any) -> None:
    axes.grid(color="#EFEFEF", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
