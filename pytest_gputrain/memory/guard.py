"""``oom_guard``: a block of training under a memory limit; its peak, what that was for, and what is left.

On the CPU tensors are accounted for, and the operation that goes over the limit raises: real training steps
hit a real out-of-memory on any machine. On CUDA the allocator itself refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.accounting import Accounting
from pytest_gputrain.memory.capacity import known_device
from pytest_gputrain.memory.clean import release
from pytest_gputrain.memory.errors import OutOfMemory
from pytest_gputrain.memory.ledger import Ledger
from pytest_gputrain.memory.lines import creating_lines, location
from pytest_gputrain.memory.oom import is_oom
from pytest_gputrain.memory.owners import Owners
from pytest_gputrain.values import format_size, parse_size


class OomGuard:
    """``with OomGuard("40GB") as guard:``, then ``guard.peak_bytes``, ``guard.by_category``, ``guard.oom``.

    ``roots``: modules and optimizers whose memory counts from the beginning; others count from when they are
    first used. An out-of-memory of any form leaves the block as ``OutOfMemory``, after what it held has been
    freed. Raises ``ValueError`` for a limit or a device that makes no sense.
    """

    def __init__(
        self,
        limit: int | str | None = None,
        device: str | torch.device | None = None,
        *,
        roots: Sequence[Any] = (),
    ) -> None:
        self.limit = None if limit is None else parse_size(limit)
        self.device = known_device(device or "cpu")
        self.oom: OutOfMemory | None = None
        self._roots = tuple(roots)
        self._stack = contextlib.ExitStack()
        self._ledger = Ledger()

    def __enter__(self) -> OomGuard:
        self._ledger = ledger = Ledger()
        with contextlib.ExitStack() as stack:
            owners = Owners(lambda tensor, category: accounting.mark(tensor, category))
            accounting = Accounting(ledger, self.device, owners.category_of_result, self._refuse)
            stack.enter_context(owners)
            for root in self._roots:
                owners.adopt(root)
            accounting.settle(ledger.in_use, None)
            stack.enter_context(accounting)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if error is None or not is_oom(error):
            return
        self.oom = error if isinstance(error, OutOfMemory) else self._translated(error)
        release(error)
        if self.oom is not error:
            raise self.oom from error

    @property
    def peak_bytes(self) -> int:
        """The most that was in use at once, in bytes; what was refused does not count."""
        return self._ledger.peak

    @property
    def in_use(self) -> int:
        """What is in use now, in bytes."""
        return self._ledger.in_use

    @property
    def by_category(self) -> dict[str, int]:
        """What the peak was for, in bytes by category."""
        return self._ledger.by_category_at_peak()

    def _refuse(self, requested: int, op: Any) -> None:
        if self.limit is None or self._ledger.in_use <= self.limit:
            return
        where = location(creating_lines())
        in_use = self._ledger.in_use - requested
        by_category = self._ledger.by_category()
        raise OutOfMemory(
            f"out of memory on {self.device}: {op or 'what the guard was given'} needs "
            f"{format_size(requested)} with {format_size(in_use)} in use, "
            f"of a limit of {format_size(self.limit)}"
            f"{f' at {where}' if where else ''} ({categories.describe(by_category)})",
            requested=requested,
            in_use=in_use,
            limit=self.limit,
            device=str(self.device),
            by_category=by_category,
            location=where,
        )

    def _translated(self, error: BaseException) -> OutOfMemory:
        return OutOfMemory(
            f"{type(error).__name__}: {error}",
            in_use=self._ledger.in_use,
            limit=self.limit,
            device=str(self.device),
            by_category=self._ledger.by_category(),
        )
