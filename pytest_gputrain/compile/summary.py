"""A monitor's report in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_gputrain.compile.records import Moment

if TYPE_CHECKING:
    from pytest_gputrain.compile.records import CompileReport, LimitHit

_SHOWN = 8
"""Lines of one kind: a loop that recompiles in each step has hundreds that say the same."""


def summary(report: CompileReport) -> str:
    """The verdict, then a line for each limit hit, error, recompile and break."""
    lines = [verdict(report), *_eager(report)]
    lines += _few([f"  {_limit(hit)}" for hit in report.limit_hits], "limit hits")
    lines += _few(
        [
            f"  failed compilation, swallowed by {e.swallowed_by}{_when(e.phase, e.step)}: {e.message}"
            f"   at {e.location}"
            for e in report.suppressed
        ],
        "failed compilations",
    )
    lines += _few(
        [
            f"  recompile {r.number} of {r.function}{_when(r.phase, r.step)}: {r.reason}   at {r.location}"
            for r in report.recompiles
        ],
        "recompiles",
    )
    lines += _few(
        [
            f"  graph break{' (function skipped)' if b.skipped else ''}{_when(b.phase, b.step)}: {b.reason}"
            f"   at {b.location}"
            for b in report.breaks
        ],
        "graph breaks",
    )
    return "\n".join([*lines, *(f"  note: {note}" for note in report.notes)])


def verdict(report: CompileReport) -> str:
    """One line: whether it is compiled, and the numbers."""
    figures = (
        f"{_count(len(report.graphs), 'graph')} in {report.compile_seconds:.1f} s, run "
        f"{_count(report.graph_runs, 'time')}; {_count(len(report.recompiles), 'recompile')}, "
        f"{_count(len(report.breaks), 'graph break')}, {_count(report.cache_hits, 'cache hit')}"
    )
    if report.is_compiled():
        return f"compiled: {figures}"
    return f"NOT compiled: {why_not(report)} ({figures})"


def why_not(report: CompileReport) -> str:
    """Why a report does not say that it is compiled."""
    if report.limit_hits:
        hit = report.limit_hits[0]
        return f"{hit.kind} was hit" + ("" if hit.raised else ", and what fits no graph runs eager since")
    if report.suppressed:
        return f"a failed compilation was swallowed by {report.suppressed[0].swallowed_by}"
    if not report.graphs and not report.graph_runs:
        return "no graph was captured"
    if not report.graph_runs:
        return "no compiled graph ran"
    return "no compiled graph ran in some of the steps"


def _eager(report: CompileReport) -> list[str]:
    if not report.graph_runs or not (steps := report.eager_steps()):
        return []
    shown = ", ".join(map(str, steps[:_SHOWN])) + (", …" if len(steps) > _SHOWN else "")
    return [f"  no compiled graph ran in {_count(len(steps), 'step')}: {shown}"]


def _limit(hit: LimitHit) -> str:
    return (
        f"{hit.kind} ({hit.limit}) hit by {hit.function}{_when(hit.phase, hit.step)}: {hit.reason}"
        f"   at {hit.location}"
    )


def _when(phase: str, step: int | None) -> str:
    return "" if step is None and phase == "train" else f" in {Moment(phase, step)}"


def _few(lines: Sequence[str], kind: str) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], *([f"  … and {more} more {kind}"] if more > 0 else [])]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
