"""What comes out about a launch when its result is there already: whether its warm ranks are used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Aftermath:
    """Why ranks were ended, or will be before anybody gets them; None when they are clean."""

    def __init__(self, reason: str | None = None, wait: Callable[[], None] | None = None) -> None:
        self._reason, self._wait = reason, wait

    @property
    def settled(self) -> bool:
        """Whether it is known."""
        return self._wait is None

    def settle(self, reason: str | None) -> None:
        """Now it is."""
        self._reason, self._wait = reason, None

    def reason(self) -> str | None:
        """The reason; waits until it is known."""
        if (wait := self._wait) is not None:
            wait()
        return self._reason

    def __reduce__(self) -> tuple[Any, ...]:
        return Aftermath, (self.reason(),)
