"""Which test held which GPU when: ``leases.trace.json`` in the report folder, for Perfetto or chrome://tracing.

Drawn from reports alone, so in the process that has all of them: under xdist the controller, whatever became
of the workers. Not covered: a worker that dies before its test's setup has been reported leaves no trace of
it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pytest_gputrain.plugin import lease_order, properties
from pytest_gputrain.plugin.leasing import say

FILE_NAME = "leases.trace.json"
_HELD_PID, _WAITING_PID = 1, 2  # two groups of rows; these are no processes


class Span(NamedTuple):
    """One test's hold on its GPUs; times are seconds since the epoch."""

    nodeid: str
    gpus: tuple[tuple[int, str], ...]
    since: float
    until: float
    waited: float
    worker: str
    outcome: str


class LeaseTimeline:
    """Follows the reports of a session."""

    def __init__(self, report: Path | None) -> None:
        self._report = report
        self._open: dict[tuple[str, str], dict[str, Any]] = {}
        self.spans: list[Span] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        key = (report.nodeid, _worker(report))
        if report.when == "setup":
            if text := dict(report.user_properties).get(properties.LEASE):
                self._open[key] = {**json.loads(str(text)), "outcome": report.outcome}
        elif (record := self._open.get(key)) is not None:
            if report.when == "call" or report.failed:
                record["outcome"] = report.outcome
            if report.when == "teardown":
                self._close(key, report.stop)
            elif report.when != "call":  # xdist's report of a worker that died
                self._close(key, time.time(), outcome="worker died")

    def _close(self, key: tuple[str, str], until: float, outcome: str | None = None) -> None:
        record = self._open.pop(key)
        gpus = tuple((int(index), str(uuid)) for index, uuid in record["gpus"])
        said = outcome or record["outcome"]
        span = Span(key[0], gpus, record["since"], until, record["waited"], record["worker"], said)
        self.spans.append(span)

    # Before the terminal's summary, in every process that reports.
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for key in [*self._open]:
            self._close(key, time.time(), outcome="interrupted")
        if not self.spans:
            return
        passed = {
            span.nodeid: round(span.until - span.since, 3) for span in self.spans if span.outcome == "passed"
        }
        lease_order.remember(session.config, passed)
        if self._report is not None:
            self._write(session.config, self._report)

    def _write(self, config: pytest.Config, folder: Path) -> None:
        text = json.dumps(chrome_trace(self.spans)) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE_NAME).write_text(text, encoding="utf-8")
        except OSError as error:  # a full disk at the end of the night takes no verdict away
            say(config, f"gputrain: the lease timeline could not be written: {error}")


def _worker(report: pytest.TestReport) -> str:
    """Which worker a report is from: with ``--dist each`` every one of them runs the test."""
    node = getattr(report, "node", None)  # set by xdist
    return str(node.gateway.id) if node is not None else ""


def chrome_trace(spans: list[Span]) -> dict[str, Any]:
    """Return the spans in Chrome's trace format: a row a GPU, and below a row a worker that waits."""
    gpus = sorted({gpu for span in spans for gpu in span.gpus})
    workers = sorted({span.worker for span in spans})
    events: list[dict[str, Any]] = [
        _name("process_name", _HELD_PID, 0, "GPUs held"),
        _name("process_name", _WAITING_PID, 0, "waiting for GPUs"),
        *(
            _name("thread_name", _HELD_PID, row, f"GPU {index} ({uuid})")
            for row, (index, uuid) in enumerate(gpus)
        ),
        *(_name("thread_name", _WAITING_PID, row, worker) for row, worker in enumerate(workers)),
    ]
    for span in spans:
        args = {
            "worker": span.worker,
            "outcome": span.outcome,
            "num_gpus": len(span.gpus),
            "waited_s": span.waited,
        }
        for gpu in span.gpus:
            events.append(_bar(span.nodeid, _HELD_PID, gpus.index(gpu), span.since, span.until, args))
        if span.waited > 0:
            row = workers.index(span.worker)
            events.append(_bar(span.nodeid, _WAITING_PID, row, span.since - span.waited, span.since, args))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _bar(name: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    """One bar; times in microseconds, as the format wants them."""
    begin = round(start * 1e6)
    return {"ph": "X", "name": name, "cat": "lease", "pid": pid, "tid": tid, "ts": begin,
            "dur": max(0, round(end * 1e6) - begin), "args": args}  # fmt: skip
