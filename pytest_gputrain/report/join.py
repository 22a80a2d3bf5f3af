"""Several reports as one: the shards of a CI job, the machines of a night. Pure.

The same test on two machines stays two tests. The whole is complete only where every part is, and its verdict
is that of all tests together.
"""

from __future__ import annotations

import datetime
import posixpath
from collections.abc import Sequence
from dataclasses import replace

from pytest_gputrain.report.gather import NAMED, reasons, totals_of, verdict_of
from pytest_gputrain.report.model import Ending, File, Launch, Machine, NotRun, Report, Session, Test
from pytest_gputrain.report.reading import ReportError

# The worst of the parts is the whole's.
_ENDINGS: tuple[Ending, ...] = ("killed", "worker_died", "interrupted", "finished")


def join(reports: Sequence[Report], places: Sequence[str]) -> Report:
    """The reports as one; ``places``: the folder of each, from that of the whole, with slashes.

    Raises ReportError, one line, where one session is given twice.
    """
    seen: dict[tuple[str, tuple[str, ...]], str] = {}
    for report, place in zip(reports, places, strict=True):
        which = report.session.id, tuple(machine.host for machine in report.machines)
        if which in seen:
            raise ReportError(f"{place} and {seen[which]} hold the same session, {which[0]}; give it once")
        seen[which] = place
    machines = [*dict.fromkeys(machine for report in reports for machine in report.machines)]
    tests = [
        _placed(test, machines.index(report.machines[test.machine]), place)
        for report, place in zip(reports, places, strict=True)
        for test in report.tests
    ]
    session = _session(reports)
    totals = totals_of(tests)
    skipped = reasons(tests)
    known = {one.reason for report in reports for one in reasons(report.tests)}
    others = [one for report in reports for one in report.not_run if one.reason not in known]
    verdict = verdict_of(totals, session.complete, session.ending, session.exit_code)
    # A part that says it did not pass is not overruled: its reason may be no test (--require-gpus).
    if verdict == "passed" and (worse := [r.verdict for r in reports if r.verdict != "passed"]):
        verdict = "failed" if "failed" in worse else "incomplete" if "incomplete" in worse else verdict
        verdict = verdict if verdict != "passed" else worse[0]
    return Report(
        verdict, session, tuple(machines), totals, tuple(tests), (*skipped, *_added(others)),
        tuple(File(one.title, posixpath.join(place, one.path))
              for report, place in zip(reports, places, strict=True) for one in report.files),
    )  # fmt: skip


def _placed(test: Test, machine: int, place: str) -> Test:
    launches = tuple(_launch(launch, place) for launch in test.launches)
    return replace(test, machine=machine, launches=launches)


def _launch(launch: Launch, place: str) -> Launch:
    if launch.artifacts is None:
        return launch
    return replace(launch, artifacts=posixpath.normpath(posixpath.join(place, launch.artifacts)))


def _added(not_run: Sequence[NotRun]) -> list[NotRun]:
    """The same reason once, with all its tests."""
    found: dict[str, NotRun] = {}
    for one in not_run:
        before = found.get(one.reason, NotRun(one.reason, 0))
        found[one.reason] = NotRun(one.reason, before.count + one.count, (*before.tests, *one.tests)[:NAMED])
    return [*found.values()]


def _session(reports: Sequence[Report]) -> Session:
    sessions = [report.session for report in reports]
    several = len(reports) > 1
    ended = [session.ended for session in sessions]
    codes = [session.exit_code for session in sessions]
    started = min(session.started for session in sessions)
    return Session(
        id="+".join(session.id for session in sessions),
        started=started,
        ended=None if None in ended else max(end for end in ended if end is not None),
        seconds=round(max(_since(started, session) for session in sessions), 3),
        complete=all(session.complete for session in sessions),
        ending=next(ending for ending in _ENDINGS if any(session.ending == ending for session in sessions)),
        exit_code=None if None in codes else max(code for code in codes if code is not None),
        reason=next((session.reason for session in sessions if session.reason), None),
        command=sessions[0].command,
        workers=tuple(worker for session in sessions for worker in session.workers),
        notes=tuple(
            f"{_hosts(report)}: {note}" if several else note
            for report in reports
            for note in report.session.notes
        ),
    )


def _since(started: str, session: Session) -> float:
    """Seconds from the first of all to the end of this one."""
    try:
        begun = datetime.datetime.fromisoformat(session.started) - datetime.datetime.fromisoformat(started)
    except ValueError:
        return session.seconds
    return begun.total_seconds() + session.seconds


def _hosts(report: Report) -> str:
    machines: tuple[Machine, ...] = report.machines
    return ", ".join(dict.fromkeys(machine.host for machine in machines)) or "a machine"
