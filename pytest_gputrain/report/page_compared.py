"""The page's part about an earlier report: what differs from it, by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pytest_gputrain.report.page_text import clean, cut_line

_FEW_MARKS = 12


class Difference(Protocol):
    """One thing that differs from an earlier report. ``kind``: worse, better, new, gone or not comparable."""

    @property
    def kind(self) -> str: ...
    @property
    def test(self) -> str: ...
    @property
    def text(self) -> str: ...


class Differences(Protocol):
    """What a comparison has to say. ``other``: with which report; ``notes``: what hinders the comparison."""

    @property
    def other(self) -> str: ...
    @property
    def marks(self) -> Sequence[Difference]: ...
    @property
    def notes(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Mark:
    """A difference as the page shows it."""

    kind: str
    test: str
    text: str


@dataclass(frozen=True)
class Marks:
    """Differences of one kind. ``opened``: they are worth a look, or few."""

    kind: str
    marks: Sequence[Mark]
    opened: bool


@dataclass(frozen=True)
class Compared:
    """A comparison as the page shows it."""

    other: str
    marks: Sequence[Mark] = ()
    notes: Sequence[str] = ()

    @property
    def kinds(self) -> list[Marks]:
        """By kind, in the order in which they come."""
        by_kind: dict[str, list[Mark]] = {}
        for mark in self.marks:
            by_kind.setdefault(mark.kind, []).append(mark)
        return [
            Marks(kind, marks, kind == "worse" or (len(marks) <= _FEW_MARKS and kind in ("gone", "better")))
            for kind, marks in by_kind.items()
        ]


def _without_name(mark: Difference) -> str:
    """What is said of the test, which is named beside it."""
    return clean(mark.text.removeprefix(f"{mark.test}: "))


def compared_shown(compared: Differences) -> Compared:
    """A comparison, cut to what a page can hold."""
    order = {"worse": 0, "gone": 1, "better": 2}
    marks = sorted(compared.marks, key=lambda mark: order.get(mark.kind, 3))
    shown = [
        Mark(mark.kind, cut_line(clean(mark.test), 200), cut_line(_without_name(mark), 400))
        for mark in marks[:300]
    ]
    notes = [cut_line(clean(note), 600) for note in compared.notes]
    if len(marks) > len(shown):
        notes.append(f"{len(marks) - len(shown):,} more differences are not shown.")
    return Compared(cut_line(clean(compared.other), 200), shown, notes)
