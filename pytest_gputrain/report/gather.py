"""From the records of a session to its report. Pure.

Nothing is green without having run: a process without its last line, a test that was collected and has no
outcome, and a session that ran nothing are no pass.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pytest_gputrain.report.codec import decode
from pytest_gputrain.report.model import (
    Ending,
    Machine,
    NotRun,
    Report,
    ReportVerdict,
    Session,
    Test,
    Totals,
)
from pytest_gputrain.report.reading import ReportError
from pytest_gputrain.report.records import COLLECTED, CRASH, DESELECTED, DONE, MAIN, START, Records

NAMED = 5  # tests that a reason names; the others are counted
CUT_SHORT = "the process that ran it ended without a word while it ran"


def gather(records: Sequence[Records], session: str | None = None) -> Report:
    """The report of one session; where none is named, of the one that was written to last.

    Raises ReportError, one line, where there is no record of it or a line is not what it should be.
    """
    sessions = {one.session: one for one in sorted(records, key=_age) if one.process == MAIN}
    chosen = session or next(reversed(sessions), None)
    if chosen is None or chosen not in sessions:
        raise ReportError("no records of a session are there; give a folder that --gputrain-report wrote")
    mine = [one for one in records if one.session == chosen]
    others = [one for one in sessions.values() if one.session != chosen]
    return _Gathering(sessions[chosen], mine, others).report()


def _age(records: Records) -> tuple[bool, float]:
    """A session inside of a test of another one comes before that one, whatever its clock."""
    return not records.begin.get("inside"), records.last


class _Gathering:
    """One session's records; what they come to, part by part."""

    def __init__(self, main: Records, mine: Sequence[Records], others: Sequence[Records]) -> None:
        self.main = main
        self.files = mine
        self.others = others
        self.machines: list[Machine] = []
        self.interrupted = bool(main.end and main.end.get("interrupted"))
        self.notes = [note for one in mine for note in one.notes]

    def report(self) -> Report:
        tests, running = self._tests()
        never = self._never_run(tests, running)
        ending = self._ending()
        complete = not self.notes_of_missing() and not never and not running and ending == "finished"
        totals = totals_of(tests)
        not_run = [*reasons(tests), *never, *self._running(running), *self._deselected()]
        verdict = verdict_of(totals, complete, ending, self._exit_code())
        return Report(
            verdict,
            self._session(complete, ending),
            tuple(self.machines),
            totals,
            tuple(tests),
            tuple(not_run),
        )

    def _tests(self) -> tuple[list[Test], list[str]]:
        """Every test with an outcome, and those that an interruption took it from."""
        crashed = {(line.get("worker"), line["id"]) for one in self.files for line in one.of(CRASH)}
        tests: list[tuple[float, Test]] = []
        running: list[str] = []
        broken: set[str] = set()  # files that could not be collected: every worker tells of them
        for one in self.files:
            machine = self._machine(one)
            begun: dict[str, Any] = {}
            for line in one.lines:
                if line["event"] == START:
                    begun[str(line["id"])] = line
                elif line["event"] == DONE:
                    test = replace(_test(line, one), machine=machine)
                    begun.pop(test.id, None)
                    if line.get("collecting") and test.id in broken:
                        continue
                    broken.update([test.id] if line.get("collecting") else [])
                    tests.append((float(line["at"]), test))
            for test_id, line in begun.items():
                worker = None if one.process == MAIN else one.process
                if self.interrupted and (worker, test_id) not in crashed:
                    running.append(test_id)
                else:
                    tests.append((float(line["at"]), _crashed(line, worker, machine, one.last)))
        known = {(test.worker, test.id) for _, test in tests}
        for line in [line for one in self.files for line in one.of(CRASH)]:
            worker = str(line["worker"])
            if (worker, line["id"]) not in known:  # it died before it could say that it had begun
                tests.append((float(line["at"]), _crashed(line, worker, 0, float(line["at"]))))
        return [test for _, test in sorted(tests, key=lambda row: row[0])], running

    def _machine(self, one: Records) -> int:
        told = one.begin.get("machine") or self.main.begin.get("machine")
        machine = decode(Machine, told, f"{one.name}: machine")
        if machine not in self.machines:
            self.machines.append(machine)
        return self.machines.index(machine)

    def _never_run(self, tests: Sequence[Test], running: Sequence[str]) -> list[NotRun]:
        """Tests that were collected and never came to an outcome."""
        known = {test.id for test in tests} | {*running}
        collected = dict.fromkeys(str(name) for one in self.files for line in one.of(COLLECTED)
                                  for name in line["ids"])  # fmt: skip
        lost = [name for name in collected if name not in known]
        return [NotRun(f"never begun: {self._why_ended()}", len(lost), tuple(lost[:NAMED]))] if lost else []

    def _why_ended(self) -> str:
        end = self.main.end
        if end is None:
            return "the session was killed"
        return str(end.get("reason") or "the session ended before")

    def _running(self, running: Sequence[str]) -> list[NotRun]:
        if not running:
            return []
        return [NotRun(f"did not finish: {self._why_ended()}", len(running), tuple(running[:NAMED]))]

    def _deselected(self) -> list[NotRun]:
        """Every worker deselects the same."""
        told = max((one.of(DESELECTED) for one in self.files), key=len, default=[])
        return [NotRun(str(line["reason"]), line["count"], tuple(line["ids"][:NAMED])) for line in told]

    def notes_of_missing(self) -> list[str]:
        """Why the records are not the whole session; empty where they are."""
        there = {one.process for one in self.files}
        workers = [str(name) for one in self.files for name in (one.end or {}).get("workers", ())]
        lacking = [name for name in workers if name not in there]
        found = [f"the records of worker {name} are missing" for name in lacking]
        return found + [
            f"{one.name}: {len(one.of(DONE))} outcomes are there, its process wrote {one.end['outcomes']}"
            for one in self.files
            if one.end is not None and one.end.get("outcomes") not in (None, len(one.of(DONE)))
        ]

    def _ending(self) -> Ending:
        if self.main.end is None:
            return "killed"
        if self.interrupted:
            return "interrupted"
        return "finished" if all(one.end is not None for one in self.files) else "worker_died"

    def _exit_code(self) -> int | None:
        code = (self.main.end or {}).get("exit_code")
        return None if code is None else int(code)

    def _session(self, complete: bool, ending: Ending) -> Session:
        begin, end = self.main.begin, self.main.end
        last = max(one.last for one in self.files)
        dead = [one.process for one in self.files if one.end is None and one.process != MAIN]
        notes = [*self.notes, *self.notes_of_missing()]
        notes += [f"worker {name} ended without a word" for name in dead if ending == "worker_died"]
        notes += [
            f"records of another session are left out ({moment(float(one.begin['at']))})"
            for one in self.others
        ]
        return Session(
            id=self.main.session,
            started=moment(float(begin["at"])),
            ended=None if end is None else moment(float(end["at"])),
            seconds=round(last - float(begin["at"]), 3),
            complete=complete,
            ending=ending,
            exit_code=self._exit_code(),
            reason=None if end is None or not end.get("reason") else str(end["reason"]),
            command=tuple(map(str, begin.get("command") or ())),
            workers=tuple(sorted(one.process for one in self.files if one.process != MAIN)),
            notes=tuple(notes),
        )


def _test(line: Any, one: Records) -> Test:
    return decode(Test, line["test"], f"{one.name}: a test")


def _crashed(line: Any, worker: str | None, machine: int, last: float) -> Test:
    who = f"worker {worker}" if worker else "the session's process"
    message = f"{CUT_SHORT} ({who}): a signal, os._exit, or the kernel's out-of-memory killer"
    return Test(
        id=str(line["id"]),
        kind=line.get("kind", "test"),
        outcome="crashed",
        message=message,
        seconds=round(max(0.0, last - float(line["at"])), 3),
        case=line.get("case"),
        check=line.get("check"),
        device=line.get("device"),
        machine=machine,
        worker=worker,
    )


def totals_of(tests: Iterable[Test]) -> Totals:
    """The tests by outcome."""
    counts = dict.fromkeys(("passed", "failed", "skipped", "error", "crashed"), 0)
    seconds = 0.0
    for test in tests:
        counts[test.outcome] += 1
        seconds += test.seconds
    return Totals(**counts, seconds=round(seconds, 3))


def reasons(tests: Iterable[Test]) -> list[NotRun]:
    """The skipped tests by reason, the most frequent first."""
    found: dict[str, list[str]] = {}
    for test in tests:
        if test.outcome == "skipped":
            found.setdefault(test.headline or "no reason given", []).append(test.id)
    ordered = sorted(found.items(), key=lambda row: -len(row[1]))
    return [NotRun(reason, len(ids), tuple(ids[:NAMED])) for reason, ids in ordered]


def verdict_of(totals: Totals, complete: bool, ending: Ending, exit_code: int | None) -> ReportVerdict:
    """What it comes to. What failed, failed, however the session ended.

    A crash alone, of a session that was killed, is the kill: it proves nothing about that test.
    """
    crashed = 0 if ending == "killed" else totals.crashed
    if totals.failed or totals.error or crashed:
        return "failed"
    if ending == "interrupted":
        return "interrupted"
    if not complete:
        return "incomplete"
    if not totals.passed:
        return "nothing_ran" if exit_code in (None, 0, 5) else "failed"
    return "passed" if exit_code in (None, 0) else "failed"


def moment(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
