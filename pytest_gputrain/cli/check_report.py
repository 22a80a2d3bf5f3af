"""``gputrain check --report``: the report that pytest leaves with ``--gputrain-report``, without pytest."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gputrain.cli.arguments import UsageError, folder
from pytest_gputrain.report import records
from pytest_gputrain.report.codec import encode
from pytest_gputrain.report.known import Known, bounded, kind_of
from pytest_gputrain.report.model import Test
from pytest_gputrain.report.reading import VERSION

if TYPE_CHECKING:
    from pytest_gputrain.case import TrainingCase
    from pytest_gputrain.checks import CheckResult
    from pytest_gputrain.launch import LaunchResult
    from pytest_gputrain.report.gate import Gate

_TENSOR_PARALLEL = "tp_"


def declare(check: argparse.ArgumentParser) -> None:
    """Add the option."""
    check.add_argument(
        "--report",
        type=folder,
        metavar="DIR",
        help="report.json, summary.md, index.html and the artifacts of launches there; with it come "
        "--compile-report DIR/compile and --tp-report DIR",
    )


def implied(options: argparse.Namespace) -> None:
    """What a report has in it unless it is asked for elsewhere."""
    if options.report is not None:
        options.report = Path(options.report).absolute()
        try:
            options.report.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=options.report):
                pass
        except OSError as error:
            raise UsageError(f"--report: {options.report} cannot be written: {error.strerror}") from None
        options.compile_report = options.compile_report or options.report / "compile"
        options.tp_report = options.tp_report or options.report


@contextlib.contextmanager
def recording(options: argparse.Namespace, cases: Sequence[str], ids: Sequence[str]) -> Iterator[Recording]:
    """The records of this run; the report is written at the end, however it comes. Raises UsageError."""
    found = Recording(options, cases, ids)
    before = signal.getsignal(signal.SIGTERM)
    if found.on and before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: CI cancels with it
    try:
        yield found
    except KeyboardInterrupt:
        found.end(None, reason="interrupted")
        raise
    except BaseException as error:
        found.end(None, reason=" ".join(str(error).split()) or type(error).__name__)
        raise
    finally:
        if found.on and before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Recording:
    """One run of the command line; does nothing where no report is asked for."""

    def __init__(self, options: argparse.Namespace, cases: Sequence[str], ids: Sequence[str]) -> None:
        self.on = options.report is not None
        if not self.on:
            return
        self._options = options
        self._folder: Path = options.report
        self._known = Known()
        self._outcomes = 0
        if options.simulated and options.checks is None:
            ids = [check_id for check_id in ids if check_id.startswith(_TENSOR_PARALLEL)]
        self._ids = list(ids)
        try:
            self._begin([f"{case}::{check_id}" for case in cases for check_id in self._ids])
        except OSError as error:
            raise UsageError(f"--report: {self._folder} cannot be written: {error}") from None

    def _begin(self, collected: list[str]) -> None:
        from pytest_gputrain.checks.context import SESSION_REPORT
        from pytest_gputrain.report.earlier import clear
        from pytest_gputrain.report.machine import this_machine

        host, now = platform.node(), time.time()
        clear(self._folder, host)
        self.session = records.new_session()
        self._recorder = records.Recorder(self._folder, host, records.MAIN)
        command = ["gputrain", *sys.argv[1:]]
        begin = {"version": VERSION, "session": self.session, "process": records.MAIN, "host": host}
        machine = encode(this_machine(Path.cwd()))
        self._line(records.BEGIN, at=now, pid=os.getpid(), command=command, machine=machine, **begin)
        self._line(records.COLLECTED, ids=collected)
        SESSION_REPORT.set(str(self._folder))
        if sys.platform == "linux":
            from pytest_gputrain.launch.told import listeners

            listeners.append(self._launched)

    def begin_case(self, case: TrainingCase) -> None:
        """Its first check runs now."""
        if self.on:
            self._start(case.name, self._ids[0])

    def result(self, result: CheckResult) -> None:
        """A check came to an end, and the next one of its case begins."""
        if not self.on:
            return
        self._known.add_figures(result.figures, simulated=self._options.simulated)
        self._done(encode(test_of(result, self._options.device, self._known)))
        self._known = Known()
        following = self._ids[self._ids.index(result.check) + 1 :]
        if following:
            self._start(result.case, following[0])

    def end(self, exit_code: int | None, *, reason: str | None = None, gate: Gate | None = None) -> None:
        """The report is written, with what the gate came to, and said where."""
        if not self.on or self._recorder.closed:
            return
        from pytest_gputrain.report.gather import gather
        from pytest_gputrain.report.page import PAGE
        from pytest_gputrain.report.summary import line_of
        from pytest_gputrain.report.write import write_all

        if sys.platform == "linux":
            from pytest_gputrain.launch.told import listeners

            listeners.remove(self._launched)
        if gate is not None:
            self._done(gate.entry())
        ending = {"interrupted": exit_code is None, "reason": reason, "outcomes": self._outcomes}
        try:
            self._line(records.END, exit_code=exit_code, **ending)
            self._recorder.close()
            if self._recorder.broken:
                print(f"gputrain check: the records end too early: {self._recorder.broken}", file=sys.stderr)
            found = gather(records.read_records(self._folder), self.session)
            report = write_all(found, self._folder, compared=gate.comparison if gate else None)
            print(f"report {self._folder / PAGE}: {line_of(report)}", flush=True)
        except OSError as error:  # a full disk takes no verdict away
            print(f"gputrain check: the report could not be written: {error}", file=sys.stderr)

    def _launched(self, result: LaunchResult) -> None:
        from pytest_gputrain.report.launches import launch_of

        self._known.add_launch(launch_of(result, self._folder))

    def _start(self, case: str, check: str) -> None:
        named = {"case": case, "check": check, "device": self._options.device}
        self._line(records.START, id=f"{case}::{check}", kind=kind_of(check, False), **named)

    def _done(self, test: dict[str, Any]) -> None:
        self._line(records.DONE, test=test)
        self._outcomes += 1

    def _line(self, event: str, **fields: Any) -> None:
        self._recorder.line(event, **{"at": time.time(), **fields})


def test_of(result: CheckResult, device: str, known: Known) -> Test:
    """The result as a test of a report."""
    return Test(
        id=f"{result.case}::{result.check}",
        kind=kind_of(result.check, False),
        outcome=result.outcome,
        message=bounded(result.message),
        seconds=round(result.seconds, 4),
        case=result.case,
        check=result.check,
        device=device,
        **known.parts(),
    )
