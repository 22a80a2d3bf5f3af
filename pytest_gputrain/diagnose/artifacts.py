"""The files of a report: a folder a phase, and above them what all phases say together."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gputrain.diagnose import readings, summary, timeline
from pytest_gputrain.diagnose.records import PhaseResult
from pytest_gputrain.diagnose.report import Report

if TYPE_CHECKING:
    from pytest_gputrain.launch.result import LaunchResult

TIMELINE = "timeline.svg"


class ExecutionLog:
    """``test_execution.log``: what the plan did, when. Written line by line, so that it outlives a kill."""

    def __init__(self, out: Path) -> None:
        self._path = out / "test_execution.log"

    def line(self, text: str) -> None:
        """Adds a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(text.split())}\n")

    def result(self, result: PhaseResult) -> None:
        """Adds what a launch or a phase came to."""
        self.line(f"{result.phase.name}: {result.outcome} in {result.seconds:.1f} s {result.cause}".rstrip())


def line_of(result: PhaseResult) -> str:
    """A phase in a line of a terminal."""
    said = summary.cut(summary.said(result))
    return f"{result.phase.name:20} {result.outcome!s:8} {result.seconds:6.1f} s  {said}"


def write_launch(launched: LaunchResult, folder: Path) -> None:
    """``output.log`` of all ranks, ``summary.txt`` (the launch's own words) and the rank timeline."""
    parts = [f"--- rank {rank.rank} {name}\n{text}" for rank in launched.ranks
             for name, text in (("stdout", rank.stdout), ("stderr", rank.stderr)) if text]  # fmt: skip
    if launched.agent_output:
        parts.append(f"--- torchrun\n{launched.agent_output}")
    _text(folder / "output.log", "\n".join(parts))
    _text(folder / "summary.txt", launched.summary() + "\n")
    _write_timeline(folder)


def write_phase(result: PhaseResult, folder: Path) -> None:
    """``result.txt``, ``traces.log`` of all ranks, ``environment.json``."""
    lines = [f"{result.outcome} {result.phase.name}: {result.phase.title}"]
    lines += [f"cause: {result.cause}"] if result.cause else []
    lines += [f"at: {result.location}"] if result.location else []
    lines += [f"where the time goes: {result.profile}"] if result.profile else []
    lines += [f"note: {note}" for note in result.notes]
    _text(folder / "result.txt", "\n".join(lines) + "\n\n" + readings.text_of(folder / "summary.txt"))
    (folder / "summary.txt").unlink(missing_ok=True)
    traced = readings.traces(folder)
    _text(folder / "traces.log", "".join(f"--- rank {rank}\n{text}" for rank, text in traced.items()))
    _json(folder / "environment.json", dict(result.environment))


def _write_timeline(folder: Path) -> None:
    found = timeline.bars(readings.collectives(folder), time.time())
    if found:
        _json(folder / "timeline.json", timeline.chrome_trace(found))
        _text(folder / TIMELINE, timeline.svg(found, folder.name.partition("-")[2]))


def write(report: Report, out: Path) -> None:
    """``SUMMARY.md``, ``report.json``, ``all_missing_params.txt``, ``ddp_buckets.txt`` and the timeline."""
    picture = _most_telling_timeline(report, out)
    _text(out / "SUMMARY.md", summary.summary(report, picture))
    _json(out / "report.json", report.document())
    missing = [
        f"{result.phase.name} {parameter.name} ranks={','.join(map(str, parameter.ranks))} "
        f"steps={','.join(map(str, parameter.steps))}\n"
        for result in report.results
        for parameter in result.missing
    ]
    _text(out / "all_missing_params.txt", "".join(missing))
    buckets = []
    for result in report.results:
        found = readings.buckets(readings.traces(out / result.folder)) if result.folder else []
        buckets += [f"{result.phase.name} {line}\n" for line in found]
    _text(out / "ddp_buckets.txt", "".join(buckets))


def _most_telling_timeline(report: Report, out: Path) -> str | None:
    """That of the phase whose cause is told, else of the longest run; by its path below ``out``."""
    order = [report.culprit] if report.culprit else []
    for result in [*order, *sorted(report.results, key=lambda one: -one.seconds)]:
        if result is not None and result.folder and (out / result.folder / TIMELINE).is_file():
            return f"{result.folder}/{TIMELINE}"
    return None


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _json(path: Path, document: object) -> None:
    _text(path, json.dumps(document, indent=2) + "\n")
