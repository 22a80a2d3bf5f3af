"""Where a backend compiles a captured graph: its figures go into the book, its runs are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_gputrain.compile import dynamo_reading as reading
from pytest_gputrain.compile.book import Book
from pytest_gputrain.compile.dynamo_attempt import GoingOn

_RUN_AS_CAPTURED = ("eager", "eager_noexcept", "eager_debug")


class Graphs:
    """Around what dynamo does with a graph."""

    def __init__(self, going_on: GoingOn) -> None:
        self._going_on, self._book = going_on, going_on.book

    def compiling(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``OutputGraph.call_user_compiler(module, …) -> compiled``, whose runs are counted."""

        def watched(output: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
            attempt, hits, facts = self._going_on.innermost, _cache_hits(), {}
            with self._going_on.reading():
                facts = reading.facts_of(module.graph, output.compiler_fn)
            try:
                compiled = original(output, module, *args, **kwargs)
            except Exception as error:
                if attempt is not None:
                    attempt.backend_failed = reading.said(error.__cause__ or error)
                raise
            with self._going_on.reading():
                if attempt is not None:
                    attempt.backend_failed = None
                    cached = _cache_hits() > hits
                    attempt.graphs.append(facts | {"buckets": reading.buckets(compiled), "cached": cached})
                self._note_as_captured(compiled, module, facts)
            return _counted(compiled, self._book)

        return watched

    def _note_as_captured(self, compiled: Any, module: Any, facts: dict[str, Any]) -> None:
        """A backend of the user's may return what it was given, as one does that catches its own errors."""
        same = compiled is module or getattr(compiled, "__self__", None) is module
        name = facts["backend"]
        if same and name not in _RUN_AS_CAPTURED and reading.operations(module.graph) == facts["ops"]:
            self._book.note(
                f"the backend {name} returned a graph as it was captured: its operations run one by one, "
                "as eager"
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
