"""``--baseline``: the checks just run, held against the last good night. Pure.

A baseline is a report.json, a report's folder, or a folder of nights. Good is a night that passed, came to
its end, ran the asked case and ran on hardware like this; the last one of them is the baseline, and from
three on they say how much nights differ. A night that failed by nothing but its own gate is taken where its
report.json is named: that is how a change for the worse is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_gputrain.report.compare import BAD, Change, Comparison, compare_test
from pytest_gputrain.report.likeness import apart
from pytest_gputrain.report.nights import Night, read_nights
from pytest_gputrain.report.quantities import plural
from pytest_gputrain.report.reading import Json, ReportError

# The entry that a gate leaves in its own night's report.
GATE = "baseline"


@dataclass(frozen=True)
class Baseline:
    """nights: the good ones, the oldest first, at least one. notes: what was set aside, and why."""

    path: Path
    nights: tuple[Night, ...]
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> Night:
        return self.nights[-1]

    def judge(self, tests: Sequence[Json], machine: Json) -> Gate:
        """tests: entries as in report.json, all run on ``machine``."""
        report: Json = {"machines": [machine], "tests": tests}
        where = f"the last good night ({self.last.when})"
        changes = [change for test in tests for change in compare_test(test, report, self.nights, where)]
        # What fails is red by itself, and told as that; the gate adds what passed and got worse.
        failed = {test["id"] for test in tests if test["outcome"] in BAD}
        kept = [change for change in changes if change.metric is not None or change.test not in failed]
        return Gate(Comparison(where, tuple(kept), self.notes, self.last.report["tests"]))


@dataclass(frozen=True)
class Gate:
    """What a run comes to by its baseline."""

    comparison: Comparison

    @property
    def regressions(self) -> list[Change]:
        return self.comparison.worse

    @property
    def nothing_compared(self) -> bool:
        return not self.comparison.metrics_compared

    @property
    def outcome(self) -> str:
        """``failed``, ``passed``, or ``skipped`` where no metric could be compared."""
        if self.regressions:
            return "failed"
        return "skipped" if self.nothing_compared else "passed"

    @property
    def message(self) -> str:
        """The first line is the worst regression; with none, that nothing was compared, or that all held."""
        if not self.regressions:
            return self._headline()
        ordered = sorted(self.regressions, key=lambda change: -abs(change.relative or 0.0))
        return "\n  ".join([change.text for change in ordered])

    def _headline(self) -> str:
        comparison = self.comparison
        if self.nothing_compared:
            why = next(
                iter(change.text for change in comparison.of("not comparable")), "no check measured any"
            )
            return f"nothing was compared with {comparison.other}: {why}"
        return f"no regression from {comparison.other}: {comparison.summary}"

    @property
    def lines(self) -> list[str]:
        """For the console: the verdict first, then what is better and what was not compared."""
        lines = [self.message, *self.comparison.notes]
        lines += [f"better: {change.text}" for change in self.comparison.of("better")]
        lines += [f"not compared: {change.text}" for change in self.comparison.of("not comparable")]
        return lines

    def entry(self, machine: int = 0, seconds: float = 0.0) -> dict[str, object]:
        """The gate as a test of its own night's report, so that this night is not the next one's baseline."""
        return {
            "id": GATE, "kind": "check", "case": None, "check": GATE, "device": None, "outcome": self.outcome,
            "message": self.message, "seconds": seconds, "machine": machine, "worker": None, "labels": [],
            "figures": {}, "metrics": {}, "series": [], "launches": [],
        }  # fmt: skip


def open_baseline(
    path: Path, *, cases: Iterable[str], checks: Iterable[str], machine: Json, device: str
) -> Baseline:
    """The good nights at ``path`` for what is about to run.

    Raises ReportError, one line, where there are none: not there, corrupt, of another version, failed or
    incomplete, on other hardware, without the asked case, or without any metric of the asked checks.
    """
    nights, unread = read_nights([path])
    if not nights:
        raise ReportError(f"--baseline: {unread[0]}")
    asked = [*dict.fromkeys(cases)]
    wanted = {*checks}
    good, aside = [], []
    for night in nights:
        accepted = path.is_file() and _only_the_gate_failed(night.report)
        if why := _unfit(night, asked, wanted, machine, device, accepted=accepted):
            aside.append((night, why))
        else:
            good.append(night)
    if not good:
        night, why = aside[-1]
        which = (
            "" if len(nights) == 1 else f" (the latest of {plural(len(nights), 'night')}, none of which is)"
        )
        raise ReportError(f"--baseline {path} is no good night for this run{which}: {why}")
    notes = [
        *(f"baseline: {line}" for line in unread),
        *(f"baseline: left out {n.when}: {w}" for n, w in aside),
    ]
    return Baseline(path, tuple(good), tuple(notes))


def _unfit(
    night: Night, cases: list[str], checks: set[str], machine: Json, device: str, *, accepted: bool
) -> str:
    """Why the night is nothing to hold this run against; empty where it is."""
    if not night.good and not accepted:
        words = {"failed": "it failed", "nothing_ran": "nothing ran in it"}
        return f"{words.get(night.verdict, f'it is {night.verdict}')} ({night.when}); give one that passed"
    tests = [test for test in night.report["tests"] if test.get("case") and test.get("check")]
    there = {str(test["case"]) for test in tests}
    if lacking := [case for case in cases if case not in there]:
        return f"it has no case {lacking[0]!r}; it has {', '.join(sorted(there)) or 'none'} ({night.when})"
    if different := apart(next(iter(night.report["machines"]), None), machine):
        return f"it is of other hardware or torch: {'; '.join(different)} ({night.when})"
    asked = [test for test in tests if test["case"] in cases and test["check"] in checks]
    if not any(test.get("device") in (None, device) for test in asked):
        return f"it has none of the asked checks on {device} ({night.when})"
    if not any(test.get("metrics") for test in asked):
        return (
            f"none of the asked checks measured anything in it ({night.when}); "
            "batch_size_found, tp_memory and, on a GPU, compile_speed do"
        )
    return ""


def _only_the_gate_failed(report: Json) -> bool:
    failed = [test for test in report["tests"] if test["outcome"] in BAD]
    complete = report["session"].get("complete", True)
    return bool(failed) and complete and all(test.get("check") == GATE for test in failed)
