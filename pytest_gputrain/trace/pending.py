"""Point-to-point operations of a rank: how many there were, and which of them nobody has waited for.

torch numbers collectives by itself, but sees no difference between a receive that is still open and one
that is done; so the three methods that all of them go through are wrapped. Nothing else is touched.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

_PRUNE_OVER = 8  # handles of finished operations kept, and with each the tensor it moved


class PointToPoint:
    """Counts by group, from ``watch`` on; one a process."""

    def __init__(self) -> None:
        self.operations: Counter[str] = Counter()
        """Sends and receives, by the name of their group."""
        self.balance = 0
        """Sends minus receives of this rank; over all ranks of a program that is done it sums to 0."""
        self._open: list[Any] = []

    def watch(self) -> None:
        """Wraps the methods of torch's process group."""
        from torch.distributed import ProcessGroup

        for name, count in (("send", 1), ("recv", -1), ("recv_anysource", -1)):
            setattr(ProcessGroup, name, self._wrapped(getattr(ProcessGroup, name), count))

    def _wrapped(self, method: Any, count: int) -> Any:
        @functools.wraps(method)
        def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
            work = method(group, *args, **kwargs)
            self.operations[group.group_name] += 1
            self.balance += count
            if len(self._open) >= _PRUNE_OVER:
                self._open = self._unfinished()
            self._open.append(work)
            return work

        return counted

    def _unfinished(self) -> list[Any]:
        return [work for work in self._open if not work.is_completed()]

    def unfinished(self) -> int:
        """How many operations are open: not yet done, or on gloo not waited for."""
        self._open = self._unfinished()
        return len(self._open)
