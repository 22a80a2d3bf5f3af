"""Everything of dynamo's private interface that the monitor listens at.

Written for torch 2.6 to 2.13. Dynamo has no interface that tells all of this: its counters are dictionaries
that anyone clears, its record of compilations keeps the last 64, its callbacks are forgotten by a reset and
its logs are text. So a few of its functions are wrapped while a monitor is open, each where the event itself
happens. Where one is missing, the monitor says what it cannot tell; without the first two it is unavailable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pytest_gputrain.compile.book import Book
from pytest_gputrain.compile.dynamo_watch import Watch, cudagraph_skips, quietly


class MonitorUnavailable(RuntimeError):
    """This torch lacks an interface that the monitor stands on."""


@contextlib.contextmanager
def watched(book: Book) -> Iterator[None]:
    """While it is open, what dynamo does is written into ``book``. Raises MonitorUnavailable."""
    import torch._dynamo.convert_frame as convert_frame
    import torch._dynamo.decorators as decorators
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
                book.note(f"torch {torch.__version__} lacks {names[0]}: {lost} cannot be told")

        listen(convert_frame, ("_compile",), watch.compiling, None)
        listen(OutputGraph, ("call_user_compiler",), watch.compiling_graph, None)
        listen(convert_frame, ("format_error_msg",), watch.given_up, "which errors torch swallows")
        names = ("exceeds_recompile_limit", "exceeds_cache_size_limit")
        listen(convert_frame, names, watch.judging_limit, "whether the recompile limit is hit")
        listen(torch._logging, ("trace_structured",), watch.tracing, "recompiles and graph breaks")
        listen(decorators, ("_set_stance",), watch.taking_stance, "which stance is set")
        # Imports inductor when torch.compile is called for it.
        listen(torch._TorchCompileInductorWrapper, ("get_compiler_config",), quietly, "inductor's import")
        watch.note_disabled()
        skips = cudagraph_skips()
        yield
        watch.note_disabled()
        watch.note_skipped_cudagraphs(skips)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
