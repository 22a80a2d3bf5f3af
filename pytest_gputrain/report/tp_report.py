"""The tensor-parallel tests as one text file: totals, a line a test, gradient error by layer, memory by rank.

Pure: takes plain records. Nothing that did not run counts as passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_gputrain.whole_files import replacing

BAR_PER_DECADE = 3  # characters of the table's log bar
SMALLEST = 1e-12  # what a gradient error of zero is drawn as


@dataclass(frozen=True)
class Line:
    """One test. outcome: passed, failed, error or skipped. seconds: with the start of its ranks."""

    name: str
    outcome: str
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)
    message: str = ""


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds: parameters as numbers and as bytes."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Report:
    """title: the model. ranks: how many and of what kind, "2 gloo ranks" or "8 simulated ranks".

    layers: relative gradient error by layer, in the order of the model; tolerance: what it may be.
    memory: by rank; whole: the unsharded model. origin: where it was measured, ``origin()``.
    """

    title: str
    ranks: str
    tests: Sequence[Line]
    date: str
    layers: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    memory: Sequence[RankMemory] = ()
    whole: RankMemory | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def count(self, *outcomes: str) -> int:
        return sum(test.outcome in outcomes for test in self.tests)

    @property
    def exit_code(self) -> int:
        """0 only if something ran and all that ran passed; 1 where something failed; 5 where nothing ran."""
        if self.count("failed", "error"):
            return 1
        return 0 if self.count("passed") else 5

    def text(self) -> str:
        parts = [self._head(), "\n".join(map(_line, self.tests)), _layers(self), _memory(self), _origin(self)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _head(self) -> str:
        passed, failed, skipped = self.count("passed"), self.count("failed", "error"), self.count("skipped")
        ran = passed + failed
        rate = f"{passed / ran:.1%}" if ran else "nothing ran"
        return "\n".join(
            [
                f"Tensor parallel: {self.title}, {self.ranks}",
                f"Date:         {self.date}",
                f"Total:        {len(self.tests)}",
                f"Passed:       {passed}",
                f"Failed:       {failed}",
                f"Skipped:      {skipped}",
                f"Success rate: {rate}",
                f"Time:         {sum(test.seconds for test in self.tests):.1f} s",
            ]
        )


def write(report: Report, path: Path) -> Path:
    """Whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(report.text(), encoding="utf-8")
    return path


def _line(test: Line) -> str:
    said = test.message.partition("\n")[0] if test.outcome != "passed" else _figures(test.figures)
    return f"{test.outcome.upper():7} {test.seconds:7.1f} s  {test.name}  {said}".rstrip()


def _figures(figures: Mapping[str, Any]) -> str:
    """Numbers and words; tables are shown below, on their own."""
    shown = {name: value for name, value in figures.items() if isinstance(value, int | float | str)}
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in shown.items()
    )


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    from math import floor, log10

    width = max(map(len, [*report.layers, "layer"]))
    least = min(max(value, SMALLEST) for value in report.layers.values())
    base = floor(log10(least)) - 1
    rows = [f"Gradient error by layer, relative; a bar of {BAR_PER_DECADE} is a factor of 10 over 1e{base:d}"]
    if report.tolerance is not None:
        rows[0] += f"; allowed {report.tolerance:.0e}"
    for name, value in report.layers.items():
        bar = "#" * round(BAR_PER_DECADE * max(0.0, log10(max(value, SMALLEST)) - base))
        over = "  <- too large" if report.tolerance is not None and not value <= report.tolerance else ""
        rows.append(f"  {name:{width}}  {value:9.2e}  {bar}{over}")
    return "\n".join(rows)


def _memory(report: Report) -> str:
    if not report.memory:
        return ""
    rows = ["Memory by rank", "  rank   parameters        bytes  of the whole"]
    whole = report.whole
    for rank, held in enumerate(report.memory):
        share = f"{held.parameters / whole.parameters:12.1%}" if whole and whole.parameters else ""
        rows.append(f"  {rank:4}  {held.parameters:11,}  {held.bytes:11,}  {share}")
    if whole:
        total = sum(held.parameters for held in report.memory)
        rows.append(f"   sum  {total:11,}  {sum(held.bytes for held in report.memory):11,}")
        rows.append(f"  whole {whole.parameters:11,}  {whole.bytes:11,}")
        rows.append(f"  overhead (sum - whole) / whole = {(total - whole.parameters) / whole.parameters:.1%}")
    return "\n".join(rows)


def _origin(report: Report) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in report.origin.items() if value is not None)
    return f"Measured on: {facts}" if facts else ""
