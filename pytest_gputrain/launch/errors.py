"""The two exceptions of the launch room, both data: they survive pickling (xdist, concurrent.futures)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import LaunchResult


class LaunchUsageError(ValueError):
    """Bad input to a launch: one line that says what was given, what is legal and the way out.

    Raised before any rank starts.
    """


class TooFewGpus(LaunchUsageError):
    """More ranks asked for on GPUs than there are GPUs; ``needed`` is that in short, with the numbers."""

    def __init__(self, message: str, needed: str = "") -> None:
        super().__init__(message)
        self.needed = needed

    def __reduce__(self) -> tuple[type[TooFewGpus], tuple[str, str]]:
        return type(self), (str(self), self.needed)


class UnsupportedPlatform(LaunchUsageError):
    """Ranks cannot be started on this operating system; in pytest, tests that launch are skipped."""


class LaunchError(AssertionError):
    """A launch that is not PASSED. ``str(error)`` is the whole failure text, the cause first.

    An AssertionError, so that a test that launches fails rather than errors, and so that
    ``pytest.raises(AssertionError)`` around a launch means what it says.
    """

    def __init__(self, result: LaunchResult) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        return self.result.summary()


class LaunchCancelled(Exception):
    """Whoever asked for the launch wants it no more; nothing that it started is running."""


class ServerLost(RuntimeError):
    """The process that forks the ranks died or never started; ``str()`` says how."""
