"""Everything of dynamo's private interface that the monitor listens at, and nowhere else in this package.

Written for torch 2.6 to 2.13. Dynamo has no interface that tells all of this: its counters are dictionaries
that anyone clears, its record of compilations keeps the last 64, its callbacks are forgotten by a reset and
its logs are text. So a few of its functions are wrapped while a monitor is open, each where the event itself
happens. Where one is missing, the monitor says what it cannot tell; without the first two it is unavailable.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from pytest_gputrain.compile import dynamo_reading as reading
from pytest_gputrain.compile.book import Book
from pytest_gputrain.compile.records import BackendError, Graph, GraphBreak, LimitHit, Moment, Recompile


class MonitorUnavailable(RuntimeError):
    """This torch lacks an interface that the monitor stands on."""


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
    graphs: list[dict[str, Any]] = field(default_factory=list)


class Watch:
    """What the wrappers do; one for each monitor."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._local = threading.local()
        self._recompiled: dict[tuple[int, str, int], int] = {}

    @property
    def _attempts(self) -> list[Attempt]:
        """The compilations that go on in this thread, the innermost last."""
        if not hasattr(self._local, "attempts"):
            self._local.attempts = []
        attempts: list[Attempt] = self._local.attempts
        return attempts

    def compiling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``_compile(code, …, compile_id=)``: one function, from its guards' failure to new guards."""

        def watched(code: CodeType, *args: Any, **kwargs: Any) -> Any:
            attempt = self._begun(code, args, str(kwargs.get("compile_id")))
            self._attempts.append(attempt)
            started = time.perf_counter()
            try:
                result = original(code, *args, **kwargs)
            except Exception as error:
                self._failed(attempt, error)
                raise
            finally:
                self._attempts.pop()
                seconds = time.perf_counter() - started
                if not self._attempts:
                    self._book.compiled_for(seconds, attempt.moment)
                self._finished(attempt, seconds)
            return result

        return watched

    def _begun(self, code: CodeType, args: tuple[Any, ...], compile_id: str) -> Attempt:
        called_from = reading.calling_line()
        closure = args[3] if len(args) > 3 else ()  # globals, locals, builtins, closure
        torchs = called_from is not None and reading.is_torchs(code)
        return Attempt(
            code,
            reading.function_of(code, closure),
            str(called_from) if torchs else reading.location_of(code),
            compile_id,
            self._book.moment,
            called_from,
        )

    def _finished(self, attempt: Attempt, seconds: float) -> None:
        place: dict[str, Any] = {"function": attempt.function, **attempt.moment._asdict()}
        reasons = tuple(map(reading.guard, attempt.reasons or ()))
        reason = reasons[0] if reasons else "Unable to find recompilation reasons"
        if attempt.limit is not None:
            kind, limit = attempt.limit
            self._book.limit_hits.append(
                LimitHit(**place, location=attempt.location, kind=kind, limit=limit, reason=reason)
            )
            return
        for graph in attempt.graphs:
            self._book.graphs.append(
                Graph(
                    **place,
                    location=attempt.location,
                    compile_id=attempt.compile_id,
                    seconds=seconds,
                    **graph,
                )
            )
        if attempt.reasons is None:
            return
        code = attempt.code
        key = id(code), code.co_filename, code.co_firstlineno
        number = self._recompiled[key] = self._recompiled.get(key, 0) + 1
        self._book.recompiles.append(
            Recompile(
                **place,
                compile_id=attempt.compile_id,
                location=(attempt.reasons and reading.guarded_line(attempt.reasons[0])) or attempt.location,
                called_from=attempt.called_from,
                reason=reason,
                reasons=reasons,
                number=number,
            )
        )

    def _failed(self, attempt: Attempt, error: Exception) -> None:
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
                self._swallowed(attempt, error, record)
            return original(error, *args, **kwargs)

        return watched

    def _swallowed(self, attempt: Attempt, error: Exception, record: BackendError) -> None:
        from torch._dynamo.exc import Unsupported, UserError

        if attempt.limit is not None:
            return
        if not isinstance(error, (Unsupported, UserError)):
            self._book.swallowed(record)
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
                self._attempts[-1].limit = kind, limit
            return exceeded, kind

        return watched

    def compiling_graph(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``OutputGraph.call_user_compiler(module, …) -> compiled``, whose runs are counted."""

        def watched(output: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
            hits = _cache_hits()
            facts = {
                "ops": reading.operations(module.graph),
                "backend": reading.backend_name(output.compiler_fn),
                "dynamic_dims": reading.dynamic_inputs(module.graph),
            }
            compiled = original(output, module, *args, **kwargs)
            if self._attempts:
                self._attempts[-1].graphs.append(
                    {**facts, "buckets": reading.buckets(compiled), "cached": _cache_hits() > hits}
                )
            return _counted(compiled, self._book)

        return watched

    def tracing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``trace_structured(name, metadata_fn, payload_fn=)``, the events that TORCH_TRACE writes."""

        def watched(name: str, *args: Any, **kwargs: Any) -> Any:
            with contextlib.suppress(Exception):  # an event that reads otherwise in another torch
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
        attempt = self._attempts[-1]
        self._book.add_break(
            GraphBreak(
                compile_id=attempt.compile_id,
                function=attempt.function,
                location=reading.broken_at(text),
                reason=reading.break_reason(text),
                step=attempt.moment.step,
                phase=attempt.moment.phase,
            )
        )


def _counted(compiled: Callable[..., Any], book: Book) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        book.ran()
        return compiled(*args, **kwargs)

    return run


def _cache_hits() -> int:
    from torch._dynamo.utils import counters

    return sum(
        counters[group][name]
        for group, name in (("inductor", "fxgraph_cache_hit"), ("aot_autograd", "autograd_cache_hit"))
    )


@contextlib.contextmanager
def watched(book: Book) -> Iterator[None]:
    """While it is open, what dynamo does is written into ``book``. Raises MonitorUnavailable."""
    import torch._dynamo.convert_frame as convert_frame
    from torch._dynamo.output_graph import OutputGraph

    watch = Watch(book)
    book.torch = torch.__version__
    with contextlib.ExitStack() as stack:

        def listen(owner: Any, names: tuple[str, ...], wrap: Callable[..., Any], lost: str | None) -> None:
            name = next((name for name in names if hasattr(owner, name)), None)
            if name is not None:
                stack.enter_context(_replaced(owner, name, wrap))
            elif lost is None:
                raise MonitorUnavailable(
                    f"torch {torch.__version__} lacks {owner.__name__}.{names[0]}, which compile_monitor "
                    "stands on; written for torch 2.6 to 2.13"
                )
            else:
                book.notes.append(f"torch {torch.__version__} lacks {names[0]}: {lost} cannot be told")

        listen(convert_frame, ("_compile",), watch.compiling, None)
        listen(OutputGraph, ("call_user_compiler",), watch.compiling_graph, None)
        listen(convert_frame, ("format_error_msg",), watch.given_up, "which errors torch swallows")
        names = ("exceeds_recompile_limit", "exceeds_cache_size_limit")
        listen(convert_frame, names, watch.judging_limit, "whether the recompile limit is hit")
        listen(torch._logging, ("trace_structured",), watch.tracing, "recompiles and graph breaks")
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
