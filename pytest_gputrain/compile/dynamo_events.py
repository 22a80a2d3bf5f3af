"""Where dynamo tells something: why it compiles again, where a graph breaks, that it is off."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pytest_gputrain.compile import dynamo_reading as reading
from pytest_gputrain.compile.dynamo_attempt import Attempt, GoingOn
from pytest_gputrain.compile.records import GraphBreak


class Events:
    """Around what dynamo tells."""

    def __init__(self, going_on: GoingOn) -> None:
        self._going_on, self._book = going_on, going_on.book

    def tracing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``trace_structured(name, metadata_fn, payload_fn=)``, the events that TORCH_TRACE writes."""

        def watched(name: str, *args: Any, **kwargs: Any) -> Any:
            with self._going_on.reading():
                metadata = kwargs.get("metadata_fn") or (args[0] if args else dict)
                self._event(name, metadata, kwargs.get("payload_fn"))
            return original(name, *args, **kwargs)

        return watched

    def _event(self, name: str, metadata: Callable[[], Any], payload: Callable[[], Any] | None) -> None:
        attempt = self._going_on.innermost
        if name.startswith("bwd_") or name.endswith("_runtime"):
            if attempt is None:
                self._compiled_later(metadata())
            return
        if name != "artifact" or payload is None or attempt is None:
            return
        about = metadata().get("name")
        if about == "recompile_reasons":
            reasons = payload()
            attempt.reasons = [reasons] if isinstance(reasons, str) else list(reasons or ())
        elif about == "dynamo_graph_break_reason":
            self._broken(attempt, str(payload()))

    def _compiled_later(self, metrics: dict[str, Any]) -> None:
        start, end = metrics.get("start_time_us"), metrics.get("end_time_us")
        if start and end:
            self._book.compiled_for((end - start) / 1e6, self._book.moment)

    def _broken(self, attempt: Attempt, text: str) -> None:
        if text.startswith("WON'T CONVERT"):
            return  # a backend's exception, told again as what it leads to
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

    def taking_stance(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``_set_stance(stance) -> the one before``."""

        def watched(stance: Any, *args: Any, **kwargs: Any) -> Any:
            if (name := getattr(stance, "stance", "default")) != "default":
                self._book.note(f"torch.compiler.set_stance({name!r}) was called")
            return original(stance, *args, **kwargs)

        return watched

    def skipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Around ``add_skip_reason(reason, frame)``: a function that dynamo passes over, now and for good."""

        def watched(reason: str, frame: Any, *args: Any, **kwargs: Any) -> Any:
            with self._going_on.reading():
                if "dispatch mode" in reason:  # of a counter of operations or memory, around one step
                    name, place = reading.function_of(frame.f_code), reading.location_of(frame.f_code)
                    self._book.note(
                        f"{name} stays uncompiled, it was called under a dispatch mode   at {place}"
                    )
            return original(reason, frame, *args, **kwargs)

        return watched

    @contextlib.contextmanager
    def switches(self) -> Iterator[None]:
        """What is off for the whole process is noted, and what inductor leaves out."""
        self._note_disabled()
        skips = _cudagraph_skips()
        try:
            yield
        finally:
            self._note_disabled()
            if (skipped := _cudagraph_skips() - skips) > 0:
                times = f"{skipped} times" if skipped > 1 else "once"
                self._book.note(f"inductor left CUDA graphs out {times}")

    def _note_disabled(self) -> None:
        for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            if os.environ.get(name) == "1":
                self._book.note(f"{name}=1 switches torch.compile off")
        if torch._dynamo.config.disable:
            self._book.note("torch._dynamo.config.disable switches torch.compile off")


def _cudagraph_skips() -> int:
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])
