"""Two reports side by side: what got worse, what got better, and what cannot be compared. Pure.

A test that passed and fails is worse; so is one that passed and is skipped or gone, for it tells nothing any
more. A metric is worse where it changed by more than noise (``noise``), in tests that passed both times, ran
on like hardware and under like settings (``likeness``); where they did not, that is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from pytest_gputrain.report.compare_metrics import Held, hold
from pytest_gputrain.report.likeness import apart, key, machine_of, settings_apart
from pytest_gputrain.report.nights import Night, night_of
from pytest_gputrain.report.quantities import plural
from pytest_gputrain.report.reading import Json

Kind = Literal["worse", "better", "same", "new", "gone", "not comparable"]
BAD = ("failed", "error", "crashed")
MOST_LINES = 50


@dataclass(frozen=True)
class Change:
    """One test, or one metric of it. text: a line; relative, noise: of a metric, 0.1 is 10 %."""

    kind: Kind
    test: str
    text: str
    metric: str | None = None
    old: float | None = None
    new: float | None = None
    relative: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class Comparison:
    """other: the earlier report, in words. notes: what hinders the comparison, hardware first.

    before: the tests of the earlier report, whose plots the later one's are drawn over.
    """

    other: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    before: Sequence[Json] = field(default=(), repr=False, compare=False)

    def of(self, *kinds: Kind) -> list[Change]:
        return [change for change in self.changes if change.kind in kinds]

    @property
    def worse(self) -> list[Change]:
        """What is gone as well: a test that is not there finds nothing."""
        return self.of("worse", "gone")

    @property
    def metrics_compared(self) -> int:
        return sum(change.metric is not None for change in self.of("worse", "better", "same"))

    @property
    def marks(self) -> list[Change]:
        """All but what is the same."""
        return self.of("worse", "gone", "better", "new", "not comparable")

    def __str__(self) -> str:
        lines = [*self.notes, f"compared with {self.other}: {self.summary}"]
        for heading, kinds in _HEADINGS:
            found = self.of(*kinds)
            if found:
                lines += [f"{heading}:", *(f"  {change.text}" for change in found[:MOST_LINES])]
            if len(found) > MOST_LINES:
                lines.append(f"  and {len(found) - MOST_LINES:,} more")
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """``2 worse, 1 better, 14 the same (6 metrics compared)``."""
        counts = [
            (len(self.worse), "worse"),
            (len(self.of("better")), "better"),
            (len(self.of("same")), "the same"),
            (len(self.of("new")), "new"),
            (len(self.of("not comparable")), "not comparable"),
        ]
        told = ", ".join(f"{count:,} {word}" for count, word in counts if count or word == "worse")
        return f"{told} ({plural(self.metrics_compared, 'metric')} compared)"


_HEADINGS: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    ("worse", ("worse", "gone")),
    ("better", ("better",)),
    ("new", ("new",)),
    ("not compared", ("not comparable",)),
)


def compare(old: Json, new: Json, *, earlier: Sequence[Json] = ()) -> Comparison:
    """The later report by the earlier one. earlier: good nights before ``old``, which tell the spread."""
    nights = [*(night_of(report) for report in earlier), night_of(old)]
    where = f"the report of {nights[-1].when}"
    pairs, gone = _paired(old, new)
    changes = list(chain.from_iterable(compare_test(test, new, nights, where) for test, _ in pairs))
    hindered = apart(next(iter(old["machines"]), None), next(iter(new["machines"]), None))
    notes = []
    if hindered:
        notes.append(
            f"different hardware or torch: {'; '.join(hindered)}: verdicts are compared, figures are not"
        )
    unlike = sorted({why for test, before in pairs if before for why in settings_apart(before, test)})
    if unlike:
        notes.append(f"different settings: {'; '.join(unlike)}: figures of those tests are not compared")
    return Comparison(where, (*changes, *(_gone(test, new) for test in gone)), tuple(notes), old["tests"])


def compare_test(test: Json, new: Json, nights: Sequence[Night], where: str) -> list[Change]:
    """One test of the report ``new`` by what it was in the nights; the last of them is the earlier report."""
    found = [(night, one) for night in nights if (one := night.tests.get(key(test))) is not None]
    # By the last night alone: a test that had vanished then is new.
    before = found[-1][1] if found and found[-1][0] is nights[-1] else None
    verdict = _verdict(test, before)
    if before is None or (test["outcome"], before["outcome"]) != ("passed", "passed"):
        return [verdict]
    held = Held(
        test,
        machine_of(new, test),
        [(night, one) for night, one in found if one["outcome"] == "passed"],
        where,
    )
    return [verdict, *(Change(**told) for told in hold(held))]


def _verdict(test: Json, before: Json | None) -> Change:
    now, name, line = test["outcome"], test["id"], first_line(test.get("message"))
    if before is None:
        if now in BAD:
            return Change("worse", name, f"{name}: {now}, and was not there before: {line}")
        return Change("new", name, f"{name}: {now}, and was not there before")
    was = before["outcome"]
    if now in BAD:
        if was in BAD:
            return Change("same", name, f"{name}: {now}, as before: {line}")
        return Change("worse", name, f"{name}: {now}, was {was}: {line}")
    if now == "skipped" and was != "skipped":
        return Change("worse", name, f"{name}: no longer runs, was {was}: {line}")
    if now == "passed" and was != "passed":
        return Change("better", name, f"{name}: passed, was {was}")
    return Change("same", name, f"{name}: {now}, as before")


def _gone(test: Json, new: Json) -> Change:
    name, was = test["id"], test["outcome"]
    if new["verdict"] in ("incomplete", "interrupted") or not new["session"].get("complete", True):
        return Change("gone", name, f"{name}: not reached before the session ended, was {was}")
    return Change("gone", name, f"{name}: gone, was {was}")


def _paired(old: Json, new: Json) -> tuple[list[tuple[Json, Json | None]], list[Json]]:
    """Each new test with the old one, and the old ones without a new one."""
    before = {key(test): test for test in old["tests"]}
    pairs = [(test, before.pop(key(test), None)) for test in new["tests"]]
    return pairs, list(before.values())


def first_line(message: object) -> str:
    return str(message or "no message").strip().partition("\n")[0]
