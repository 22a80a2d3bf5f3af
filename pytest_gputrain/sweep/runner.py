"""Runs a sweep: every planned branch from one checkpoint, through the launcher, each with its own verdict.

A branch that fails, hangs or crashes does not stop the others. Results are written after every branch: who
interrupts a sweep has what is done, and who starts it again goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gputrain.sweep.branch_run import CANCELLED, blank, run_branch
from pytest_gputrain.sweep.command import Command
from pytest_gputrain.sweep.findings import Rate
from pytest_gputrain.sweep.manifest import PlannedBranch
from pytest_gputrain.sweep.prepare import Asked, Prepared, prepare
from pytest_gputrain.sweep.results import BranchResult, ResultsFile, hold

Tell = Callable[[str], None]
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
POLL = 0.2
"""Seconds. A signal ends the wait on Linux at once; where it does not, this often is soon enough."""


@dataclass(frozen=True)
class SweepResult:
    """results: of the branches that were to run, in the manifest's order. all_results: with the others' in
    the file. unwritten: why the file could not be written, None where it could.
    """

    results: tuple[BranchResult, ...]
    all_results: tuple[BranchResult, ...]
    interrupted: bool
    seconds: float
    path: Path
    unwritten: str | None = None

    @property
    def passed(self) -> bool:
        """Whether there were branches to run, all are done and that is on the disk."""
        done = bool(self.results) and all(result.success for result in self.results)
        return done and not self.interrupted and self.unwritten is None


def run_sweep(
    folder: Path | str,
    *,
    checkpoint: Path | str,
    script: str,
    args: Sequence[object] = (),
    module: bool = False,
    tell: Tell | None = None,
    **asked: Any,
) -> SweepResult:
    """Run the branches planned in ``folder`` from ``checkpoint``; ``asked``: the other fields of ``Asked``.

    Raises SweepError or LaunchUsageError, one line, before anything has started.
    """
    command = Command(script, tuple(map(str, args)), module)
    request = Asked(folder=Path(folder), checkpoint=Path(checkpoint), command=command, **asked)
    return run_prepared(prepare(request), tell=tell)


def run_prepared(prepared: Prepared, *, tell: Tell | None = None) -> SweepResult:
    """Run what has been checked. A signal to end ends the branches, and what there is is written."""
    return _Sweep(prepared, tell or (lambda line: None)).run()


def done_before(prepared: Prepared) -> dict[int, BranchResult]:
    """Branches that an earlier run has done: PASSED with the same configuration, checkpoint and command."""
    if prepared.asked.rerun:
        return {}
    found = _passed(prepared)
    return {branch.k: found[branch.k] for branch in prepared.branches if branch.k in found}


def _passed(prepared: Prepared) -> dict[int, BranchResult]:
    """What is in the file of all planned branches, by whichever runner: PASSED, with what they have now."""
    found = {entry.k: entry for entry in _file(prepared).read() if entry.success}
    same = (prepared.checkpoint.sha256, prepared.command_text)
    return {
        branch.k: found[branch.k]
        for branch in prepared.manifest
        if branch.k in found and found[branch.k].is_of(branch.sha256, *same)
    }


def _file(prepared: Prepared) -> ResultsFile:
    head = {
        "checkpoint": str(prepared.checkpoint.path),
        "checkpoint_sha256": prepared.checkpoint.sha256,
        "command": prepared.command_text,
        "base": dict(prepared.manifest.base),
    }
    return ResultsFile(prepared.out, head)


class _Sweep:
    def __init__(self, prepared: Prepared, tell: Tell) -> None:
        self._prepared, self._tell = prepared, tell
        self._file = _file(prepared)
        self._cancel, self._lock = threading.Event(), threading.Lock()
        self._results: dict[int, BranchResult] = {}
        self._all: list[BranchResult] = []
        self._unwritten: str | None = None
        self._stop: str | None = None
        self._began = time.monotonic()
        self._timestamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

    def run(self) -> SweepResult:
        from pytest_gputrain.origin import origin

        self._origin = origin()
        done = done_before(self._prepared)
        for branch in self._prepared.branches:
            if branch.k in done:
                self._take_over(branch, done[branch.k])
        todo = [branch for branch in self._prepared.branches if branch.k not in done]
        with contextlib.ExitStack() as locks:
            for branch in todo:
                locks.callback(hold(self._prepared.out, branch.name).release)
            with self._heeding_signals():
                self._run_all(todo)
        order = [branch.k for branch in self._prepared.branches]
        return SweepResult(
            results=tuple(self._results[k] for k in order),
            all_results=tuple(self._all),
            interrupted=self._cancel.is_set(),
            seconds=time.monotonic() - self._began,
            path=self._file.path,
            unwritten=self._unwritten,
        )

    def _take_over(self, branch: PlannedBranch, entry: BranchResult) -> None:
        """An earlier run's result."""
        changed = entry.script_sha256 != self._prepared.script_sha256
        note = ("the script has changed since it ran; --rerun runs it again",) if changed else ()
        kept = tuple(old for old in entry.notes if not old.startswith("the script has changed"))
        self._results[branch.k] = dataclasses.replace(entry, resumed=True, notes=(*kept, *note))
        self._tell(f"{branch.name}: done before, {_figures(entry)}" + (f" ({note[0]})" if note else ""))

    @contextlib.contextmanager
    def _heeding_signals(self) -> Iterator[None]:
        """Signals set a flag that launches look at: an exception could come in the middle of anything."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup, a shell's background job
                    before[number] = signal.signal(number, lambda *_: self._cancel.set())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_all(self, todo: Sequence[PlannedBranch]) -> None:
        with ThreadPoolExecutor(self._prepared.jobs, thread_name_prefix="branch") as pool:
            left: set[Future[None]] = {pool.submit(self._run_one, branch) for branch in todo}
            try:
                while left:
                    ended, left = wait(left, timeout=POLL, return_when=FIRST_COMPLETED)
                    for future in ended:
                        future.result()
            except BaseException:
                self._cancel.set()
                raise
        if not todo:
            self._write()

    def _run_one(self, branch: PlannedBranch) -> None:
        """In a thread of its own."""
        outcome = self._outcome(branch)
        with self._lock:
            self._ended(branch, outcome)

    def _outcome(self, branch: PlannedBranch) -> BranchResult:
        if self._cancel.is_set():
            return blank(self._prepared, branch, CANCELLED, "not started")
        if self._stop is not None:
            return blank(self._prepared, branch, "SKIPPED", self._stop)
        self._tell(f"{branch.name}: started, log in {self._prepared.log(branch)}")
        try:
            outcome = run_branch(self._prepared, branch, self._cancel.is_set, lambda: self._rates(branch))
        except Exception as error:  # a defect of ours must not take the other branches along
            outcome = blank(self._prepared, branch, "FAILED", f"{type(error).__name__}: {error}")
        if self._stop is None and not self._prepared.checkpoint.is_unchanged():
            self._stop = (
                f"{self._prepared.checkpoint.path} has changed while {branch.name} ran, so others would "
                "start from something else; write checkpoints to another file"
            )
            if outcome.success:
                return dataclasses.replace(outcome, success=False, verdict="FAILED", message=self._stop)
        return outcome

    def _rates(self, branch: PlannedBranch) -> list[Rate]:
        """Of the other branches; those of other runners too, as in an array with one branch a task."""
        with self._lock:
            known = {**_passed(self._prepared), **self._results}
            return [
                Rate(entry.k, entry.planned_learning_rate, entry.learning_rate)
                for entry in known.values()
                if entry.success
                and entry.k != branch.k
                and entry.learning_rate is not None
                and entry.planned_learning_rate is not None
            ]

    def _ended(self, branch: PlannedBranch, outcome: BranchResult) -> None:
        self._results[branch.k] = outcome
        self._write()
        when = f"after {outcome.duration:.1f} s: " if outcome.duration else ""  # it may not have started
        said = f"{when}{outcome.message}" if outcome.message else _figures(outcome)
        notes = "".join(f"\n  note: {note}" for note in outcome.notes)
        self._tell(f"{branch.name}: {outcome.verdict} {said}{notes}")

    def _write(self) -> None:
        try:
            self._all = self._file.write(
                self._results.values(),
                self._prepared.order,
                timestamp=self._timestamp,
                total_duration=round(time.monotonic() - self._began, 3),
                origin=self._origin,
            )
            self._unwritten = None
        except OSError as error:  # a full disk, perhaps for a while
            self._unwritten = f"{self._file.path} cannot be written ({error.strerror or error})"
            self._all = list(self._results.values())


def _figures(outcome: BranchResult) -> str:
    loss = "no loss" if outcome.final_loss is None else f"loss {outcome.final_loss:.4f}"
    tokens = "" if outcome.tokens is None else f", {outcome.tokens:,} tokens"
    return f"{loss}{tokens}, {outcome.duration:.1f} s"
