"""The one out-of-memory that this package raises, whatever ran out: a real ``torch.OutOfMemoryError``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class OutOfMemory(torch.OutOfMemoryError):
    """Training ran out of memory: of a device, of the host, or of the limit that a guard was given.

    Sizes are in bytes. ``requested`` is what the failing operation asked for and ``in_use`` what was in use
    before it, 0 where the origin does not tell; ``limit`` is None without one. ``by_category`` splits
    ``in_use``; ``location`` is the user's line. Data, so that it survives pickling.
    """

    def __init__(
        self,
        message: str,
        *,
        requested: int = 0,
        in_use: int = 0,
        limit: int | None = None,
        device: str = "cpu",
        by_category: Mapping[str, int] | None = None,
        location: str | None = None,
    ) -> None:
        super().__init__(message)
        self.requested = requested
        self.in_use = in_use
        self.limit = limit
        self.device = device
        self.by_category = dict(by_category or {})
        self.location = location

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), str(self), dict(self.__dict__))


def _restored(kind: type[OutOfMemory], message: str, data: dict[str, Any]) -> OutOfMemory:
    error = kind(message)
    error.__dict__.update(data)
    return error
