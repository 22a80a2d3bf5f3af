"""A device that is still at work when a step returns, on a machine that has none: as a GPU lags behind its
host.

A step is computed at once and counted as work that takes some time more. Whoever synchronises, or reads a
number of the loss, waits until the work is done; whoever does neither reads the clock too early, as on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

# What reads a value, and so makes the host wait for the device.
_READS = frozenset(
    {"item", "tolist", "numpy", "cpu", "to"}
    | {"__float__", "__int__", "__bool__", "__format__", "__repr__", "__index__"}
)


class LaggingDevice:
    """free: the moment (``time.perf_counter``) at which all work given to it is done."""

    def __init__(self) -> None:
        self.free = 0.0
        self._late = _late_type(self)

    def work(self, seconds: float) -> float:
        """Add work behind what there is. Returns the moment at which it will be done."""
        self.free = max(self.free, time.perf_counter()) + seconds
        return self.free

    def moment(self, done: float) -> float:
        """When work was done, as ``work`` said."""
        return done

    def wait(self) -> None:
        """Until all work is done."""
        while (left := self.free - time.perf_counter()) > 0:
            time.sleep(left)

    def late(self, value: Any) -> Any:
        """The tensor, which waits when it is read; a number has been read already."""
        if not isinstance(value, torch.Tensor):
            self.wait()
            return value
        return value.detach().as_subclass(self._late)

    @contextlib.contextmanager
    def in_place(self, inside: bool = True) -> Iterator[None]:
        """Within the block, torch's ways to synchronise wait for this device; not ``inside``: are torch's
        own.

        While something compiles they have to be: dynamo knows them by identity.
        """
        before = [home.synchronize for home in _HOMES]
        for home, original in zip(_HOMES, _ORIGINALS, strict=True):
            home.synchronize = self._waiting() if inside else original
        try:
            yield
        finally:
            for home, earlier in zip(_HOMES, before, strict=True):
                home.synchronize = earlier

    def _waiting(self) -> Any:
        return lambda *args, **kwargs: self.wait()


_HOMES: list[Any] = [torch.cuda, torch.accelerator]
_ORIGINALS = [home.synchronize for home in _HOMES]


def _late_type(device: LaggingDevice) -> Any:
    class Late(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(function, "__name__", "") in _READS:
                device.wait()
                # Tensor.__format__ reads only what is of its very own type.
                return function(*map(_plain, args), **(kwargs or {}))
            passed_on: Any = super().__torch_function__
            return passed_on(function, types, args, kwargs or {})

    return Late


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, torch.Tensor) else value
