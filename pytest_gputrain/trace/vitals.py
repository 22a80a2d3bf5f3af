"""The numbers of a heartbeat, taken where a script computes them anyway.

loss: what ``backward`` was called on last, as it was before a ``GradScaler`` scaled it.
grad_norm: what gradient clipping computed.
tokens: rows of the log-softmax right under the loss, so the targets of a cross entropy.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from pytest_gputrain.trace.heartbeat import Beat, Heartbeat, Scalar
from pytest_gputrain.trace.steps import patched_norm

_NODES_BELOW_LOSS = 16
"""How far down the graph a log-softmax is looked for: below scaling, averaging and a sum of a few losses."""


class Vitals:
    """Collects what the next heartbeat says."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._loss: Any = None
        self._norm: Any = None
        self._scaled: tuple[Any, Any] = (None, None)
        self._tokens, self._since = 0, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sees clipping and loss scaling meanwhile."""
        with patched_norm(self._around_norm), _patched_scaler(self._after_scaling):
            yield

    def backward_begins(self, tensors: Any) -> None:
        """What ``torch.autograd.backward`` was called on."""
        if isinstance(tensors, list | tuple):
            tensors = tensors[0] if len(tensors) == 1 else None
        scaled, unscaled = self._scaled
        self._scaled = (None, None)
        loss = unscaled if tensors is not None and tensors is scaled else tensors
        self._loss = None if loss is None else loss.detach()
        self._tokens += num_targets(tensors)

    def step_ended(self, step: int, msg: str = "step") -> None:
        """An optimizer steps: a heartbeat, if one is due."""
        self._heartbeat.poll()
        if self._heartbeat.due(step):
            now = time.monotonic()
            rate = round(self._tokens / max(now - self._since, 1e-9), 1) if self._tokens else None
            self._tokens, self._since = 0, now
            self._heartbeat.beat(Beat(step, msg, Scalar.of(self._loss), Scalar.of(self._norm), rate))
        self._norm = None

    def _around_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._norm = original(*args, **kwargs)
        return self._norm

    def _after_scaling(self, unscaled: Any, scaled: Any) -> None:
        self._scaled = (scaled, unscaled)


def num_targets(loss: Any) -> int:
    """Rows of the first log-softmax under the loss; 0 where there is none near it.

    Reads shapes alone: asking for a saved tensor could make a checkpoint compute again.
    """
    todo = [getattr(loss, "grad_fn", None)]
    for node in todo:
        if node is None or len(todo) > _NODES_BELOW_LOSS:
            continue
        if node.name().startswith("LogSoftmax"):
            shapes = getattr(node, "_input_metadata", ())
            shape = tuple(shapes[0].shape) if shapes else ()
            rows = 1
            for size in shape[:1] + shape[2:]:  # dimension 1 holds the classes
                rows *= int(size)
            return rows if len(shape) > 1 else 0
        todo += [below for below, _ in node.next_functions]
    return 0


@contextlib.contextmanager
def _patched_scaler(after: Callable[[Any, Any], None]) -> Iterator[None]:
    """Tells each loss that a ``GradScaler`` scales, and what came out."""
    from torch.amp.grad_scaler import GradScaler

    original: Any = GradScaler.scale

    def scale(self: Any, outputs: Any) -> Any:
        scaled = original(self, outputs)
        after(outputs, scaled)
        return scaled

    GradScaler.scale = scale  # type: ignore[method-assign]
    try:
        yield
    finally:
        GradScaler.scale = original  # type: ignore[method-assign]
