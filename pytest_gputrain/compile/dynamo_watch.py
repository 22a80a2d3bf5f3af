"""What is done at each of dynamo's functions that ``dynamo_seam`` wraps: it is written into the book.

A wrapper calls the original with what it was given and returns what that returned. Reading an event that
looks otherwise in another torch must not end the user's compilation: it becomes a note in the report.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch

from pytest_gputrain.compile import dynamo_reading as reading
from pytest_gputrain.compile.book import Book
from pytest_gputrain.compile.dynamo_state import warnings_are_no_errors
from pytest_gputrain.compile.records import BackendError, Graph, GraphBreak, LimitHit, Moment, Recompile


@dataclass
class Attempt:
    """One compilation of one function, while it goes on."""

    code: CodeType
    function: str
    location: str
    compile_id: str
    moment: Moment
    called_from: str | None
    reasons: list[str] | None = None
    limit: tuple[str, int] | None = None
    raised: bool = False
    backend_failed: str | None = None
    graphs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, str, int]:
        """The code object, without keeping it alive."""
        return id(self.code), self.code.co_filename, self.code.co_firstlineno

    @property
    def in_torch(self) -> bool:
        """Whether it is torch's own code, other than what it puts around a user's module."""
        return reading.is_machinery(self.code.co_filename) and not reading.is_around(self.code)

    @property
    def reason(self) -> str:
        """Why the earlier compilation that dynamo looked at first does not fit."""
        return reading.guard(self.reasons[0]) if self.reasons else "Unable to find recompilation reasons"

    @property
    def guarded(self) -> str:
        """The line that the failed guard is about, else the function's first."""
        return (reading.guarded_line(self.reasons[0]) if self.reasons else None) or self.location


class Watch:
    """What the wrappers do; one for each monitor."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._local = threading.local()
        self._recompiled: dict[tuple[int, str, int], int] = {}
        self._given_up: set[tuple[tuple[int, str, int], str]] = set()

    @property
    def _attempts(self) -> list[Attempt]:
        """The compilations that go on in this thread, the innermost last."""
        if not hasattr(self._local, "attempts"):
            self._local.attempts = []
        attempts: list[Attempt] = self._local.attempts
        return attempts

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._book.note(f"torch {torch.__version__}: an event could not be read ({error!r})")

    def compiling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``_compile(code, …, compile_id=)``: one function, from its guards' failure to new guards."""

        def watched(code: CodeType, *args: Any, **kwargs: Any) -> Any:
            attempt = self._begun(code, args, str(kwargs.get("compile_id")))
            self._attempts.append(attempt)
            started = time.perf_counter()
            try:
                with warnings_are_no_errors():
                    result = original(code, *args, **kwargs)
            except Exception as error:
                with self._reading():
                    self._failed(attempt, error)
                raise
            finally:
                self._attempts.pop()
                seconds = time.perf_counter() - started
                if not self._attempts:
                    self._book.compiled_for(seconds, attempt.moment)
                with self._reading():
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
        attempt.raised = type(error).__name__.startswith("FailOn")  # RecompileLimitHit, CacheLimitHit
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
                with self._reading():
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
        else:
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
            if exceeded and self._attempts:
                limit = int(getattr(torch._dynamo.config, kind))
                # Torch 2.6 calls both cache_size_limit.
                self._attempts[-1].limit = kind.replace("cache_size", "recompile"), limit
            return exceeded, kind

        return watched

    def compiling_graph(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``OutputGraph.call_user_compiler(module, …) -> compiled``, whose runs are counted."""

        def watched(output: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
            hits, facts = _cache_hits(), {}
            with self._reading():
                facts = reading.facts_of(module.graph, output.compiler_fn)
            try:
                compiled = original(output, module, *args, **kwargs)
            except Exception as error:
                if self._attempts:
                    self._attempts[-1].backend_failed = reading.said(error.__cause__ or error)
                raise
            if self._attempts:
                cached, buckets = _cache_hits() > hits, reading.buckets(compiled)
                self._attempts[-1].graphs.append({**facts, "buckets": buckets, "cached": cached})
            return _counted(compiled, self._book)

        return watched

    def taking_stance(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``_set_stance(stance) -> the one before``."""

        def watched(stance: Any, *args: Any, **kwargs: Any) -> Any:
            if (name := getattr(stance, "stance", "default")) != "default":
                self._book.note(f"torch.compiler.set_stance({name!r}) was called")
            return original(stance, *args, **kwargs)

        return watched

    def note_skipped_cudagraphs(self, before: int) -> None:
        """Inductor leaves CUDA graphs out, with a warning at most, where it cannot use them."""
        if (skipped := cudagraph_skips() - before) > 0:
            self._book.note(f"inductor left CUDA graphs out {skipped} times")

    def note_disabled(self) -> None:
        """Dynamo may be switched off for the whole process, and does nothing then."""
        for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            if os.environ.get(name) == "1":
                self._book.note(f"{name}=1 switches torch.compile off")
        if torch._dynamo.config.disable:
            self._book.note("torch._dynamo.config.disable switches torch.compile off")

    def tracing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``trace_structured(name, metadata_fn, payload_fn=)``, the events that TORCH_TRACE writes."""

        def watched(name: str, *args: Any, **kwargs: Any) -> Any:
            with self._reading():
                metadata = kwargs.get("metadata_fn") or (args[0] if args else dict)
                self._event(name, metadata, kwargs.get("payload_fn"))
            return original(name, *args, **kwargs)

        return watched

    def _event(self, name: str, metadata: Callable[[], Any], payload: Callable[[], Any] | None) -> None:
        if name.startswith("bwd_") or name.endswith("_runtime"):
            if not self._attempts:
                self._compiled_later(metadata())
            return
        if name != "artifact" or payload is None or not self._attempts:
            return
        about = metadata().get("name")
        if about == "recompile_reasons":
            reasons = payload()
            self._attempts[-1].reasons = [reasons] if isinstance(reasons, str) else list(reasons or ())
        elif about == "dynamo_graph_break_reason":
            self._broken(str(payload()))

    def _compiled_later(self, metrics: dict[str, Any]) -> None:
        start, end = metrics.get("start_time_us"), metrics.get("end_time_us")
        if start and end:
            self._book.compiled_for((end - start) / 1e6, self._book.moment)

    def _broken(self, text: str) -> None:
        if text.startswith("WON'T CONVERT"):
            return  # a backend's exception, told again as what it leads to
        attempt = self._attempts[-1]
        self._book.add_break(
            GraphBreak(
                compile_id=attempt.compile_id,
                function=attempt.function,
                location=reading.broken_at(text),
                reason=reading.break_reason(text),
                in_torch=reading.broken_in_torch(text),
                step=attempt.moment.step,
                phase=attempt.moment.phase,
            )
        )


def quietly(original: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own warnings are no errors in this function either."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        with warnings_are_no_errors():
            return original(*args, **kwargs)

    return watched


def _counted(compiled: Callable[..., Any], book: Book) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        book.ran()
        return compiled(*args, **kwargs)

    return run


def cudagraph_skips() -> int:
    """How many times inductor has left out CUDA graphs in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def _cache_hits() -> int:
    from torch._dynamo.utils import counters

    return sum(
        counters[group][name]
        for group, name in (("inductor", "fxgraph_cache_hit"), ("aot_autograd", "autograd_cache_hit"))
    )
