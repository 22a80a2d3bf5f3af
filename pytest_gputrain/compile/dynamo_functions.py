"""Where dynamo compiles a function, gives it up, or swallows an error: it goes into the book.

A wrapper calls the original with what it was given and returns what that returned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import CodeType
from typing import Any

import torch

from pytest_gputrain.compile import dynamo_reading as reading
from pytest_gputrain.compile.dynamo_attempt import Attempt, GoingOn
from pytest_gputrain.compile.dynamo_state import warnings_are_no_errors
from pytest_gputrain.compile.records import BackendError, Graph, GraphBreak, LimitHit, Recompile


class Functions:
    """Around what dynamo does with a function."""

    def __init__(self, going_on: GoingOn) -> None:
        self._going_on, self._book = going_on, going_on.book
        self._local = threading.local()
        self._recompiled: dict[tuple[int, str, int], int] = {}
        self._given_up: set[tuple[tuple[int, str, int], str]] = set()

    def compiling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``_compile(code, …, compile_id=)``: one function, from its guards' failure to new guards."""

        def watched(code: CodeType, *args: Any, **kwargs: Any) -> Any:
            attempt = self._begun(code, args, str(kwargs.get("compile_id")))
            self._going_on.attempts.append(attempt)
            started = time.perf_counter()
            try:
                with warnings_are_no_errors():
                    result = original(code, *args, **kwargs)
            except Exception as error:
                with self._going_on.reading():
                    self._failed(attempt, error)
                raise
            finally:
                self._going_on.attempts.pop()
                seconds = time.perf_counter() - started
                if not self._going_on.attempts:
                    self._book.compiled_for(seconds, attempt.moment)
                with self._going_on.reading():
                    self._finished(attempt, seconds)
            return result

        return watched

    def _begun(self, code: CodeType, args: tuple[Any, ...], compile_id: str) -> Attempt:
        _, variables, _, closure = args[:4] if len(args) > 3 else (None, None, None, ())
        called_from = reading.calling_line()
        location = reading.location_of(code)
        return Attempt(
            code,
            reading.function_of(code, variables, closure),
            called_from if called_from and reading.is_machinery(code.co_filename) else location,
            compile_id,
            self._book.moment,
            called_from,
        )

    def _finished(self, attempt: Attempt, seconds: float) -> None:
        place: dict[str, Any] = {"function": attempt.function, **attempt.moment._asdict()}
        if attempt.limit is not None:
            self._limit_hit(attempt, place)
            return
        for graph in attempt.graphs:
            facts: dict[str, Any] = {**graph, "location": attempt.location, "seconds": seconds}
            self._book.graphs.append(Graph(compile_id=attempt.compile_id, **place, **facts))
        if attempt.reasons is None:
            return
        number = self._recompiled[attempt.key] = self._recompiled.get(attempt.key, 0) + 1
        self._book.recompiles.append(
            Recompile(
                **place,
                compile_id=attempt.compile_id,
                location=attempt.guarded,
                called_from=attempt.called_from,
                reason=attempt.reason,
                reasons=tuple(map(reading.guard, attempt.reasons)),
                number=number,
                in_torch=attempt.in_torch,
            )
        )

    def _limit_hit(self, attempt: Attempt, place: dict[str, Any]) -> None:
        kind, limit = attempt.limit or ("", 0)
        if (attempt.key, kind) in self._given_up:
            return  # with fullgraph each call tries again, and raises again
        self._given_up.add((attempt.key, kind))
        self._book.limit_hits.append(
            LimitHit(
                **place,
                location=attempt.guarded,
                kind=kind,
                limit=limit,
                reason=attempt.reason,
                raised=attempt.raised,
            )
        )

    def _failed(self, attempt: Attempt, error: Exception) -> None:
        attempt.raised = type(error).__name__.startswith("FailOn")  # RecompileLimitHit
        self._book.raised(
            error,
            BackendError(
                function=attempt.function,
                location=reading.stack_of(error) or attempt.location,
                message=reading.said(error),
                swallowed_by="the program",
                step=attempt.moment.step,
                phase=attempt.moment.phase,
            ),
        )
        # Asked for after the attempt has ended, in ``given_up``.
        self._local.failed = attempt

    def given_up(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``format_error_msg(error, …)``: dynamo calls it when it swallows an error, and only then."""

        def watched(error: Exception, *args: Any, **kwargs: Any) -> Any:
            record = self._book.take_raised(error)
            attempt: Attempt | None = getattr(self._local, "failed", None)
            if record is not None and attempt is not None:
                with self._going_on.reading():
                    self._swallowed(attempt, error, record)
            return original(error, *args, **kwargs)

        return watched

    def _swallowed(self, attempt: Attempt, error: Exception, record: BackendError) -> None:
        from torch._dynamo.exc import Unsupported, UserError

        if attempt.limit is not None:
            return
        if not isinstance(error, (Unsupported, UserError)):
            self._book.swallowed(record)
        elif attempt.backend_failed is not None:  # a fake tensor's exception, which torch falls back on
            self._book.swallowed(replace(record, message=attempt.backend_failed))
        elif getattr(error, "logged", False):
            self._book.skipped(attempt.compile_id)
        elif not self._book.skipped(attempt.compile_id, record.location):  # raised outside of tracing
            self._book.add_break(
                GraphBreak(
                    compile_id=attempt.compile_id,
                    function=record.function,
                    location=record.location,
                    reason=reading.break_reason(str(error)),
                    step=record.step,
                    phase=record.phase,
                    skipped=True,
                )
            )

    def judging_limit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``exceeds_recompile_limit() -> (whether, which limit)``."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            exceeded, kind = original(*args, **kwargs)
            if exceeded and (attempt := self._going_on.innermost):
                limit = int(getattr(torch._dynamo.config, kind))
                attempt.limit = kind, limit
            return exceeded, kind

        return watched
