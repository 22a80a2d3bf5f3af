"""Who is told of every launch of this process: a report that is being recorded. Nobody by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import LaunchResult

listeners: list[Callable[[LaunchResult], None]] = []


def tell(result: LaunchResult) -> None:
    """Tell the last who came: a session inside of a test of another session keeps its launches to itself."""
    if listeners:
        listeners[-1](result)
