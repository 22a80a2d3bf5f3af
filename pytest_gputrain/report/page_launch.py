"""A launch as the page shows it: its ranks, grouped where they are alike, their stacks and logs, once each.

1,024 ranks that all wait at one line are one row and one stack, not 1,024.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_gputrain.report.page_text import clean, cut, cut_line, link, ranges
from pytest_gputrain.report.page_timeline import timeline
from pytest_gputrain.report.quantities import duration, quantity

_MOST_ROWS, _MOST_TEXTS = 40, 4
_STACK, _LOG, _LAST = 4000, 2500, 300


@dataclass(frozen=True)
class RankRow:
    ranks: str
    outcome: str
    culprit: bool
    seconds: str
    peak: str
    hosts: str
    last: str


@dataclass(frozen=True)
class Text:
    """A stack or the end of a log, and whose it is."""

    ranks: str
    text: str


@dataclass(frozen=True)
class Launch:
    verdict: str
    cause: str
    location: str
    likely: str
    ranks: Sequence[RankRow]
    stacks: Sequence[Text]
    logs: Sequence[Text]
    timeline: str | None
    artifacts: str | None
    timeline_file: str | None
    notes: Sequence[str]

    @property
    def peaks(self) -> bool:
        """Whether memory was measured, so that it gets a column."""
        return any(row.peak for row in self.ranks)

    @property
    def hosts(self) -> bool:
        """Whether hosts are known, so that they get a column."""
        return any(row.hosts for row in self.ranks)

    def __len__(self) -> int:
        """About how many characters it takes on the page."""
        texts = sum(len(one.text) for one in (*self.stacks, *self.logs))
        return 600 + 150 * len(self.ranks) + texts + len(self.timeline or "") + len(self.cause)


def launch_of(told: Mapping[str, Any]) -> Launch:
    """A launch of the report."""
    cause = told.get("cause") or {}
    culprit = cause.get("rank")
    # The rank at fault first: what is read first is the cause, not the victims.
    ranks = sorted(
        told.get("ranks") or (), key=lambda one: (one.get("rank") != culprit, one.get("rank") or 0)
    )
    rows, stacks, logs = (
        _rows(ranks, culprit),
        _texts(ranks, "stack", _STACK),
        _texts(ranks, "log_tail", _LOG),
    )
    notes = [
        f"{len(found) - most:,} more {word} in report.json."
        for found, most, word in (
            (rows, _MOST_ROWS, "rows"),
            (stacks, _MOST_TEXTS, "stacks"),
            (logs, _MOST_TEXTS, "logs"),
        )
        if len(found) > most
    ]
    said = clean(cause.get("message") or cause.get("kind") or "")
    where = "" if culprit is None or said.startswith(f"rank {culprit} ") else f"rank {culprit}: "
    return Launch(
        clean(told.get("verdict") or ""),
        cut_line(where + said, 1000) if cause else "",
        cut_line(clean(cause.get("location") or ""), 300),
        cut(clean(told.get("likely") or ""), 1000),
        rows[:_MOST_ROWS],
        stacks[:_MOST_TEXTS],
        logs[:_MOST_TEXTS],
        timeline(told.get("timeline"), ranks, culprit),
        link(told.get("artifacts")),
        link(told.get("timeline")),
        notes,
    )


def _rows(ranks: Sequence[Mapping[str, Any]], culprit: object) -> list[RankRow]:
    groups: dict[tuple[object, ...], list[Mapping[str, Any]]] = {}
    for one in ranks:
        key = (one.get("rank") == culprit and culprit is not None, one.get("outcome"), one.get("last"))
        groups.setdefault(key, []).append(one)
    return [
        RankRow(
            _whose(group),
            _outcome(outcome, bool(guilty)),
            bool(guilty),
            _span([one["seconds"] for one in group if one.get("seconds") is not None], duration),
            _span(
                [one["peak_bytes"] for one in group if one.get("peak_bytes")], lambda b: quantity(b, "bytes")
            ),
            cut_line(", ".join(sorted({clean(one["host"]) for one in group if one.get("host")})), 120),
            cut_line(clean(last or ""), _LAST),
        )
        for (guilty, outcome, last), group in groups.items()
    ]


def _outcome(outcome: object, guilty: bool) -> str:
    """A rank that returned, and by that kept the others waiting, has not passed anything."""
    return "returned" if guilty and outcome == "passed" else clean(outcome or "unknown")


def _texts(ranks: Sequence[Mapping[str, Any]], field: str, most: int) -> list[Text]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in ranks:
        if text := str(one.get(field) or "").strip("\n"):
            groups.setdefault(text, []).append(one)
    return [Text(_whose(group), cut(clean(text), most)) for text, group in groups.items()]


def _whose(group: Sequence[Mapping[str, Any]]) -> str:
    return ranges([one["rank"] for one in group if isinstance(one.get("rank"), int)])


def _span(values: Sequence[float], show: Any) -> str:
    if not values:
        return ""
    low, high = show(min(values)), show(max(values))
    return str(low) if low == high else f"{low} – {high}"
