"""The form of a planted hang: a program for ranks, and what a launch must say about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Program = Callable[[], Any]
EITHER = -1
"""Whichever of two ranks notices first is the one that dies."""


@dataclass(frozen=True)
class Hang:
    """``blames``: the culprit; None where nobody can tell, or EITHER.

    Lines marked ``# culprit`` and ``# victim`` in the program must be named, the culprit's in the first line.
    """

    program: Program
    blames: int | None
    says: tuple[str, ...]
    verdict: str = "HUNG"
    world_size: int = 2
    timeout: float = 120.0
    stall: float = 100.0
    slow: bool = False

    @property
    def name(self) -> str:
        return self.program.__name__

    def marked(self, mark: str) -> list[str]:
        """``file:line`` of the lines with a mark."""
        file = inspect.getsourcefile(self.program) or ""
        lines, first = inspect.getsourcelines(self.program)
        name = file.rpartition("/")[2]
        return [f"{name}:{first + n}" for n, line in enumerate(lines) if line.rstrip().endswith(f"# {mark}")]


def planted(table: list[Hang], blames: int | None, *says: str, **more: Any) -> Callable[[Program], Program]:
    """Adds the decorated program to a table."""

    def add(program: Program) -> Program:
        table.append(Hang(program, blames, says, **more))
        return program

    return add


def by_name(tables: Sequence[list[Hang]]) -> list[Hang]:
    """All hangs of several tables."""
    return [hang for table in tables for hang in table]
