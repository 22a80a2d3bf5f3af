"""DistributedDataParallel in a script that knows nothing of it: its options, and its buckets as they fill.

No communication hook: a script's own must win, and DDP rounds differently with one. The layout is read from
what DDP logs of itself, and a bucket is full when the last of its gradients has arrived, which is when DDP
reduces it. So after a hang in backward the last bucket that was printed is the last that was ready.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_LOOKS = 5
"""Backward passes in which the layout may still change: DDP rebuilds its buckets before the second."""


@contextlib.contextmanager
def patched_constructor(
    options: dict[str, Any], before: Callable[[Any], None], after: Callable[[Any, list[Any], Any], None]
) -> Iterator[None]:
    """Every DistributedDataParallel is made with ``options`` on top of the script's own.

    before(module): the module that is about to be wrapped.
    after(ddp, parameters, buckets): the wrapper, and how it cut the parameters into buckets (indices).
    """
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    original: Any = DistributedDataParallel.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.arguments.update(options)
        before(given.arguments["module"])
        with _watched_assignment(dist) as cut:
            original(*given.args, **given.kwargs)
        if cut:
            after(self, *cut[-1])

    DistributedDataParallel.__init__ = constructor  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedDataParallel.__init__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _watched_assignment(dist: Any) -> Iterator[list[tuple[list[Any], Any]]]:
    """Collects (parameters, indices of each bucket, as the reducer gets them); empty where torch differs."""
    cut: list[tuple[list[Any], Any]] = []
    name = "_compute_bucket_assignment_by_size"
    original = getattr(dist, name, None)
    if original is None:
        yield cut
        return

    def assignment(parameters: list[Any], *args: Any, **kwargs: Any) -> Any:
        outcome = original(parameters, *args, **kwargs)
        cut.append((list(parameters), list(reversed(outcome[0]))))
        return outcome

    setattr(dist, name, assignment)
    try:
        yield cut
    finally:
        setattr(dist, name, original)


@dataclass
class Bucket:
    """Gradients that are reduced together."""

    num_elements: int
    dtype: Any
    num_parameters: int
    waiting_for: int = 0


class BucketTracer:
    """The buckets of one DistributedDataParallel; ``full`` is called with each in the moment it fills."""

    def __init__(
        self, ddp: Any, parameters: list[Any], buckets: list[list[int]], full: Callable[[Bucket], None]
    ) -> None:
        self._ddp = weakref.ref(ddp)
        self._full = full
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._of: dict[int, Bucket] = {}
        self._buckets: list[Bucket] = []
        self._looks = 0
        self._syncs = self._touched = False
        self._lay_out(buckets)

    @property
    def alive(self) -> bool:
        """Whether the script still has the model."""
        return self._ddp() is not None

    def begin(self) -> None:
        """A backward pass begins."""
        ddp = self._ddp()
        # False after a forward within no_sync(): such gradients stay on the rank.
        self._syncs = ddp is not None and ddp.require_forward_param_sync
        self._touched = False
        if self._syncs:
            if self._looks < _LOOKS:
                self._look(ddp)
            for bucket in self._buckets:
                bucket.waiting_for = bucket.num_parameters

    def arrived(self, parameter: Any) -> None:
        """A gradient has been accumulated."""
        bucket = self._of.get(id(parameter)) if self._syncs else None
        if bucket is not None and bucket.waiting_for > 0:
            self._touched = True
            bucket.waiting_for -= 1
            if bucket.waiting_for == 0:
                self._full(bucket)

    def end(self) -> None:
        """The backward pass has returned: what still waits held parameters without a gradient."""
        if self._syncs and self._touched:
            for bucket in self._buckets:
                if bucket.waiting_for > 0:
                    bucket.waiting_for = 0
                    self._full(bucket)
        self._syncs = False

    def _look(self, ddp: Any) -> None:
        """Takes over the layout that DDP chose by the order in which gradients arrived at first."""
        self._looks += 1
        with contextlib.suppress(Exception):  # private, so any torch may have it otherwise
            if self._looks > 1 and not ddp._get_ddp_logging_data().get("has_rebuilt_buckets"):
                ddp.logger.set_runtime_stats_and_log()  # else known one step late
            text = ddp._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices", "")
            if text:
                self._lay_out([[int(index) for index in part.split()] for part in text.split(",")])
                self._looks = _LOOKS

    def _lay_out(self, buckets: list[list[int]]) -> None:
        self._of, self._buckets = {}, []
        for indices in buckets:
            members = [p for index in indices if (p := self._parameters[index]()) is not None]
            if members:
                bucket = Bucket(sum(p.numel() for p in members), members[0].dtype, len(members))
                self._buckets.append(bucket)
                self._of |= {id(parameter): bucket for parameter in members}
