"""What failed, by cause: tests whose first line says the same but for its numbers are one cause.

In full while the page has room for it, the first test of each cause before the second of any. What then
remains is a line, and what remains of those is counted. All is in ``report.json``, and the page says so.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.report.page_launch import Launch, launch_of
from pytest_gputrain.report.page_text import anchor, clean, cut, cut_line, first_line, signature
from pytest_gputrain.report.quantities import duration

BAD = ("failed", "error", "crashed")
_FULL_CHARACTERS = 900_000  # all failures in full together
_LINES = 300  # failures by a line
_TITLE, _MESSAGE, _FIGURES = 2000, 8000, 3000
_LAUNCHES = 4
_RESERVED = ("metrics", "series")


@dataclass(frozen=True)
class Failure:
    """A test that failed, in full."""

    anchor: str
    test: str
    outcome: str
    line: str
    message: str
    seconds: str
    machine: int
    worker: str
    labels: Sequence[str]
    figures: Sequence[tuple[str, str]]
    launches: Sequence[Launch]
    more_launches: int

    def __len__(self) -> int:
        """About how many characters it takes on the page."""
        texts = sum(len(name) + len(value) + 30 for name, value in self.figures)
        return 900 + len(self.line) + len(self.message) + texts + sum(map(len, self.launches))


@dataclass
class Cause:
    """Tests that failed alike, ``count`` in all; ``lines``: (anchor, test, first line) of others."""

    line: str
    count: int = 0
    full: list[Failure] = field(default_factory=list)
    lines: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def more(self) -> int:
        """How many are only in the table of all tests."""
        return self.count - len(self.full) - len(self.lines)


def causes(tests: Sequence[Mapping[str, Any]]) -> list[Cause]:
    """The causes behind failed tests, that of the most tests first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for test in tests:
        if test.get("outcome") in BAD:
            key = str(test["outcome"]), signature(title(test))
            groups.setdefault(key, []).append(test)
    ordered = sorted(groups.values(), key=len, reverse=True)
    found = [Cause(cut_line(title(group[0]), _TITLE), len(group)) for group in ordered]
    taken = _fill(found, ordered)
    room = _LINES
    for cause, group, first in zip(found, ordered, taken, strict=True):
        rest = group[first : first + room]
        cause.lines = [_line(test) for test in rest]
        room -= len(rest)
    return found


def title(test: Mapping[str, Any]) -> str:
    """The first line of a failure: of its message, else its launch's cause."""
    line, _ = first_line(clean(test.get("message") or ""))
    if line:
        return line
    told: Mapping[str, Any] = next(
        (one["cause"] for one in test.get("launches") or () if one.get("cause")), {}
    )
    return clean(told.get("message") or f"{test.get('outcome')} without a message")


def _fill(found: Sequence[Cause], groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """Put failures in full into ``found``, one of each cause in turn; how many of each were taken."""
    room, taken = _FULL_CHARACTERS, [0] * len(found)
    for turn in range(max(map(len, groups), default=0)):
        for place, group in enumerate(groups):
            if turn < len(group) and taken[place] == turn and room > 0:
                failure = _in_full(group[turn])
                room -= len(failure)
                found[place].full.append(failure)
                taken[place] += 1
        if room <= 0:
            break
    return taken


def _in_full(test: Mapping[str, Any]) -> Failure:
    head, rest = first_line(clean(test.get("message") or ""))
    launches = test.get("launches") or ()
    if any(rank.get("stack") or rank.get("log_tail") for one in launches for rank in one.get("ranks") or ()):
        rest = _without_sections(rest)
    return Failure(
        anchor(test["id"]),
        cut_line(clean(test["id"]), 600),
        test["outcome"],
        cut_line(head or title(test), _TITLE),
        cut(textwrap.dedent(rest.strip("\n")), _MESSAGE),
        duration(test.get("seconds") or 0.0),
        test.get("machine") or 0,
        clean(test.get("worker") or ""),
        [clean(label) for label in test.get("labels") or ()],
        figures_of(test),
        [launch_of(one) for one in launches[:_LAUNCHES]],
        max(0, len(launches) - _LAUNCHES),
    )


_SECTION = re.compile(r"^--- rank \d.*$", re.MULTILINE)


def _without_sections(message: str) -> str:
    """A launch's message without its ranks' stacks and output, which stand below by themselves."""
    found = _SECTION.search(message)
    return message[: found.start()] if found else message


def figures_of(test: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values for people; what is nested is JSON."""
    found = []
    for name, value in (test.get("figures") or {}).items():
        if name not in _RESERVED:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((cut_line(clean(name), 120), cut(clean(text), _FIGURES // 4)))
    return found[:40]


def _line(test: Mapping[str, Any]) -> tuple[str, str, str]:
    return anchor(test["id"]), cut_line(clean(test["id"]), 300), cut_line(title(test), 600)
