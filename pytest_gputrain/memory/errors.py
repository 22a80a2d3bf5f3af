"""The one out-of-memory that this package raises, whatever ran out: a real ``torch.OutOfMemoryError``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from pytest_gputrain.memory.lines import location, raising_lines
from pytest_gputrain.values import parse_size

_TRIED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?([KMGT]?i?B|bytes)")


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


def translated(
    error: BaseException, in_use: int, limit: int | None, device: str, by_category: Mapping[str, int]
) -> OutOfMemory:
    """Return an out-of-memory of another form as ``OutOfMemory``: its text, its line, what it asked for."""
    where = location(raising_lines(error.__traceback__))
    return OutOfMemory(
        f"{type(error).__name__}{f' at {where}' if where else ''}: {error}",
        requested=_requested(str(error)),
        in_use=in_use,
        limit=limit,
        device=device,
        by_category=by_category,
        location=where,
    )


def _requested(text: str) -> int:
    match = _TRIED.search(text)
    return parse_size(match[1] + match[2].replace("bytes", "B")) if match and float(match[1]) else 0
