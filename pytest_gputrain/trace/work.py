"""How much a step computes: activation checkpointing pays with it, so it tells whether any is on.

Counts what passes the dispatcher, in forward and backward. Does not see inside compiled graphs or custom
C++ autograd nodes. (Counting saved activations as well would break models that use ``torch.func``.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Work:
    """operations: how many were dispatched."""

    operations: int = 0


@contextlib.contextmanager
def count_work() -> Iterator[Work]:
    """Counts within the block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    work = Work()

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any | None = None
        ) -> Any:
            work.operations += 1
            return function(*args, **(kwargs or {}))

    with Counter():  # type: ignore[no-untyped-call]
        yield work
