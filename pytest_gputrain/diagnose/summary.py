"""SUMMARY.md: verdict, cause, what to change, then how that was found. Pure."""

from __future__ import annotations

from pytest_gputrain.diagnose.records import Outcome, PhaseResult
from pytest_gputrain.diagnose.report import Report

_CELL = 160


def summary(report: Report, picture: str | None = None) -> str:
    """The text; ``picture``: the rank timeline's file, if there is one."""
    decision = report.decision
    lines = [
        f"# {report.verdict}: {report.program}",
        "",
        f"**{report.headline}**",
        "",
        "## What to change",
        "",
    ]
    lines += [f"{number}. {one.text}" for number, one in enumerate(decision.advice, start=1)]
    lines += ["", "## Phases", "", "| phase | result | seconds | |", "|---|---|---|---|"]
    lines += [_row(result) for result in report.results]
    if report.interrupted:
        lines += ["", f"Interrupted: {report.planned - len(report.results)} phases were not run."]
    if report.also_seen:
        seen = "; ".join(f"{r.phase.name} {r.outcome} ({r.cause})" for r in report.also_seen)
        lines += ["", f"Also seen, in phases that accuse nobody by themselves: {seen}."]
    if picture is not None:
        lines += ["", "## Ranks over time", "", f"![ranks as lanes, collectives as bars]({picture})", ""]
        lines += [f"`{picture.removesuffix('.svg')}.json` is the same for <https://ui.perfetto.dev>."]
    lines += ["", "## How that was decided", ""]
    lines += [f"- {step}" for step in decision.path]
    lines += ["", *_origin(report)]
    return "\n".join(lines) + "\n"


def _row(result: PhaseResult) -> str:
    name = f"[{result.phase.name}]({result.folder}/)" if result.folder else result.phase.name
    seconds = "" if result.outcome is Outcome.SKIPPED else f"{result.seconds:.1f}"
    text = cut(said(result)).replace("|", "\\|")
    return f"| {name} | {result.outcome} | {seconds} | {text} |"


def said(result: PhaseResult) -> str:
    """What one line can say of a phase."""
    if result.outcome is Outcome.SKIPPED:
        return result.cause
    if result.range is not None:
        start, end = result.range
        smallest = f"smallest range that fails: {start}:{end}; "
    else:
        smallest = ""
    parts = [smallest + result.cause] if result.cause else []
    where = f"at {result.location}" if result.cause and result.location else ""
    return "; ".join(part for part in (*parts, where, *result.notes) if part) or result.phase.title


def cut(text: str) -> str:
    """On one line, and not a long one."""
    text = " ".join(text.split())
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."


def _origin(report: Report) -> list[str]:
    """Where it ran: no figure without it."""
    told = ", ".join(f"{name} {value}" for name, value in report.origin.items() if value is not None)
    notes = "".join(f" {note}." for note in (*report.shared_gpu, *report.notes))
    return [f"Ran on {report.device}.{notes} {told}".rstrip()]
