"""A compilation while it goes on, and which go on in this thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch

from pytest_gputrain.compile import dynamo_reading as reading
from pytest_gputrain.compile.book import Book
from pytest_gputrain.compile.records import Moment


@dataclass
class Attempt:
    """One compilation of one function, while it goes on."""

    code: CodeType
    function: str
    location: str
    compile_id: str
    moment: Moment
    called_from: str | None
    reasons: list[str] | None = None
    limit: tuple[str, int] | None = None
    raised: bool = False
    backend_failed: str | None = None
    graphs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, str, int]:
        """The code object, without keeping it alive."""
        return id(self.code), self.code.co_filename, self.code.co_firstlineno

    @property
    def in_torch(self) -> bool:
        """Whether it is torch's own code, other than what it puts around a user's module."""
        return reading.is_machinery(self.code.co_filename) and not reading.is_around(self.code)

    @property
    def reason(self) -> str:
        """Why the earlier compilation that dynamo looked at first does not fit."""
        return reading.guard(self.reasons[0]) if self.reasons else "Unable to find recompilation reasons"

    @property
    def guarded(self) -> str:
        """The line that the failed guard is about, else the function's first."""
        return (reading.guarded_line(self.reasons[0]) if self.reasons else None) or self.location


class GoingOn:
    """The compilations of each thread, and the book that they go into."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self._local = threading.local()

    @property
    def attempts(self) -> list[Attempt]:
        """Those of this thread, the innermost last."""
        if not hasattr(self._local, "attempts"):
            self._local.attempts = []
        attempts: list[Attempt] = self._local.attempts
        return attempts

    @property
    def innermost(self) -> Attempt | None:
        """The one that an event of this thread is about, or None where nothing is compiled."""
        return self.attempts[-1] if self.attempts else None

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """An event that reads otherwise in another torch is noted, and ends no compilation of the user's."""
        try:
            yield
        except Exception as error:
            self.book.note(f"torch {torch.__version__}: an event could not be read ({error!r})")
