"""``--gputrain-report``: records every test as it runs, and makes the report when the session ends.

Registered only when a folder is given. Each process that runs tests writes a file of its own
(``report/records.py``); the one that began the session gathers them. What a test is, its launches and its
checks' figures are known only where it runs; so nothing of it has to cross from an xdist worker.

Not covered: workers on other machines (``--tx ssh=…``), whose files stay there; the report then says that
their tests have no outcome.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gputrain.plugin import properties
from pytest_gputrain.plugin.leasing import say
from pytest_gputrain.plugin.recorded import TestRecord
from pytest_gputrain.report import records
from pytest_gputrain.report.earlier import clear
from pytest_gputrain.report.machine import this_machine
from pytest_gputrain.report.reading import VERSION, ReportError

if TYPE_CHECKING:
    from pytest_gputrain.launch import LaunchResult

NAME = "gputrain-recording"
SESSION = "gputrain_session"  # in what xdist hands to its workers
_NO_SESSION = ("collectonly", "showfixtures", "show_fixtures_per_test", "setuponly", "setupplan")


class Recording:
    """One process's part of a session's records."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        workerinput: dict[str, Any] = getattr(config, "workerinput", {})  # set by xdist
        self.folder = folder
        self.worker: str | None = workerinput.get("workerid")
        self.session = workerinput.get(SESSION) or records.new_session()
        self._config = config
        self._recorder: records.Recorder | None = None
        self._test: TestRecord | None = None
        self._outcomes = 0
        self._workers: list[str] = []
        self._reason: str | None = None
        self._interrupted = False
        self._terminated: Any = None  # who answered SIGTERM before

    # --- the session

    # Before the session is refused for a lack of GPUs, which is something to report.
    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if any(session.config.getoption(name, False) for name in _NO_SESSION):
            return
        try:
            self._begin(session.config)
        except OSError as error:
            raise pytest.UsageError(f"--gputrain-report: {self.folder} cannot be written: {error}") from None

    def _begin(self, config: pytest.Config) -> None:
        host = platform.node()
        if self.worker is None:
            clear(self.folder, host)
        self._recorder = recorder = records.Recorder(self.folder, host, self.worker or records.MAIN)
        fields: dict[str, Any] = {
            "version": VERSION,
            "session": self.session,
            "host": host,
            "pid": os.getpid(),
        }
        if self.worker is None:
            # A session inside of a test of another one, which may have the same folder from the environment.
            fields["inside"] = os.environ.get("PYTEST_CURRENT_TEST") or None
            fields["command"] = ["pytest", *config.invocation_params.args]
            fields["machine"] = _json(this_machine(config.rootpath))
        recorder.line(records.BEGIN, at=time.time(), process=self.worker or records.MAIN, **fields)
        self._listen()

    def _listen(self) -> None:
        if sys.platform == "linux":  # elsewhere nothing is launched
            from pytest_gputrain.launch.told import listeners

            listeners.append(self._launched)
        here = self.worker is None and threading.current_thread() is threading.main_thread()
        # CI cancels with it, and Python would end at once, without a report.
        if here and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._terminated = signal.signal(signal.SIGTERM, _on_sigterm)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Also of pytest.exit, and of what a plugin or too many failures stop."""
        self._interrupted = True
        said = str(excinfo.value).strip().partition("\n")[0]
        self._reason = said or "interrupted (Ctrl-C)"

    # Around all others: xdist has ended its workers by then, and --require-gpus has had its say.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        stopped = session.shouldfail or session.shouldstop
        if stopped and not self._reason:
            self._reason = str(stopped)
        try:
            return (yield)
        finally:
            self._end(int(session.exitstatus))

    def pytest_unconfigure(self) -> None:
        """Where the session was refused before it began, nobody asks for its end."""
        self._end(None)

    def _end(self, exit_code: int | None) -> None:
        if self._recorder is None:
            return
        recorder, self._recorder = self._recorder, None
        self._unlisten()
        try:
            fields = {"interrupted": self._interrupted, "reason": self._reason, "outcomes": self._outcomes}
            recorder.line(records.END, at=time.time(), exit_code=exit_code, workers=self._workers, **fields)
            recorder.close()
            if recorder.broken:
                say(self._config, f"gputrain: the records end too early: {recorder.broken}")
            if self.worker is None:
                self._write()
        except (OSError, ReportError) as error:  # a full disk at the end of the night takes no verdict away
            say(self._config, f"gputrain: the report could not be written: {error}")

    def _unlisten(self) -> None:
        if sys.platform == "linux":
            from pytest_gputrain.launch.told import listeners

            if self._launched in listeners:
                listeners.remove(self._launched)
        if self._terminated is not None:
            signal.signal(signal.SIGTERM, self._terminated)
            self._terminated = None

    def _write(self) -> None:
        from pytest_gputrain.report.page import PAGE
        from pytest_gputrain.report.summary import line_of
        from pytest_gputrain.report.write import write_gathered

        report = write_gathered(self.folder, self.session)
        say(self._config, f"gputrain: report {self.folder / PAGE}: {line_of(report)}")

    # --- its tests

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        # Of xdist's workers all collect the same; the controller is told once.
        if self.worker is None and session.items:
            self._line(records.COLLECTED, ids=[item.nodeid for item in session.items])

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        ids = [item.nodeid for item in items]
        if ids:
            self._line(records.DESELECTED, reason="deselected (-m, -k or another plugin)", count=len(ids),
                       ids=ids[:5])  # fmt: skip

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not hasattr(report, "node"):
            message = f"could not be collected: {_last_line(report.longreprtext)}\n{report.longreprtext}"
            test = {"id": report.nodeid or ".", "kind": "test", "outcome": "error", "message": message,
                    "worker": self.worker}  # fmt: skip
            self._done(test, collecting=True)

    # Outermost, so that what a test waits for its GPUs, and whatever ends it meanwhile, is within.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        if self._recorder is None:
            return (yield)
        self._test = test = TestRecord(item, self.worker)
        self._line(records.START, **test.start())
        with test.listening(self.folder):
            result = yield
        self._test = None
        self._done(test.done())
        return result

    # Before the report is made, of which JUnit writes what the item has said by then.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "teardown" and self._test is not None:
            outcome = self._test.outcome_with(report)
            report.user_properties.append((properties.OUTCOME, outcome))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Reports of workers, which the controller shows, are recorded where they were made.
        if self._test is not None and not hasattr(report, "node"):
            self._test.add(report)

    def _launched(self, result: LaunchResult) -> None:
        if self._test is not None:
            from pytest_gputrain.report.launches import launch_of

            self._test.known.add_launch(launch_of(result, self.folder))
            if result.shared_gpu:
                self._test.known.label("shared GPU")

    def _done(self, test: dict[str, Any], **more: Any) -> None:
        self._line(records.DONE, test=test, **more)
        self._outcomes += 1

    def _line(self, event: str, **fields: Any) -> None:
        if self._recorder is not None:
            self._recorder.line(event, at=time.time(), **fields)

    # --- xdist's controller; called by ``plugin/xdist.py``, whose hooks are unknown without it

    def worker_begins(self, node: Any) -> None:
        """Tell a worker whose part its records are."""
        node.workerinput[SESSION] = self.session
        self._workers.append(str(node.gateway.id))

    def worker_collected(self, ids: list[str]) -> None:
        """What the workers are going to run, once."""
        if not getattr(self, "_collected", False):
            self._collected = True
            self._line(records.COLLECTED, ids=[*ids])

    def worker_died(self, node: Any, test: str) -> None:
        """A worker ended while it ran a test."""
        self._line(records.CRASH, id=test, worker=str(node.gateway.id))


def _on_sigterm(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends at once
    pytest.exit("terminated (SIGTERM)", returncode=128 + signal.SIGTERM)


def _json(value: Any) -> Any:
    from pytest_gputrain.report.codec import encode

    return encode(value)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    said = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return (said or lines or ["no reason given"])[-1]
