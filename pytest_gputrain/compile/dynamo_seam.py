"""Everything of dynamo's private interface that the monitor listens at.

Written for torch 2.8 to 2.14. Dynamo has no interface that tells all of this: its counters are dictionaries
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
from pytest_gputrain.compile.dynamo_attempt import GoingOn
from pytest_gputrain.compile.dynamo_events import Events
from pytest_gputrain.compile.dynamo_functions import Functions
from pytest_gputrain.compile.dynamo_graphs import Graphs
from pytest_gputrain.compile.dynamo_state import quietly


class MonitorUnavailable(RuntimeError):
    """This torch lacks an interface that the monitor stands on."""


@contextlib.contextmanager
def watched(book: Book) -> Iterator[None]:
    """While it is open, what dynamo does is written into ``book``. Raises MonitorUnavailable."""
    import torch._dynamo.convert_frame as convert_frame
    import torch._dynamo.decorators as decorators
    from torch._dynamo.output_graph import OutputGraph

    book.torch = torch.__version__
    going_on = GoingOn(book)
    functions, graphs, events = Functions(going_on), Graphs(going_on), Events(going_on)
    inductor = torch._TorchCompileInductorWrapper
    with contextlib.ExitStack() as stack:
        for owner, name, wrap, lost in (
            (convert_frame, "_compile", functions.compiling, None),
            (OutputGraph, "call_user_compiler", graphs.compiling, None),
            (convert_frame, "format_error_msg", functions.given_up, "which errors torch swallows"),
            (
                convert_frame,
                "exceeds_recompile_limit",
                functions.judging_limit,
                "whether the recompile limit is hit",
            ),
            (torch._logging, "trace_structured", events.tracing, "recompiles and graph breaks"),
            (decorators, "_set_stance", events.taking_stance, "which stance is set"),
            (convert_frame, "add_skip_reason", events.skipping, ""),  # not in an older torch
            # Imports inductor, with warnings, when torch.compile is called for it.
            (inductor, "get_compiler_config", quietly, ""),
        ):
            if hasattr(owner, name):
                stack.enter_context(_replaced(owner, name, wrap))
            elif lost != "":
                book.note(_missing(owner, name, lost))
        stack.enter_context(events.switches())
        yield


def _missing(owner: Any, name: str, lost: str | None) -> str:
    """What a report does not tell for want of a function. Raises MonitorUnavailable for one it stands on."""
    lacks = f"torch {torch.__version__} lacks {owner.__name__}.{name}"
    if lost is None:
        raise MonitorUnavailable(f"{lacks}, which compile_monitor stands on; written for torch 2.8 to 2.14")
    return f"{lacks}: {lost} cannot be told"


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
