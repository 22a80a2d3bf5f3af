"""What a check says, and the exceptions with which its parts say it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["passed", "failed", "skipped", "error"]
Figures = dict[str, Any]


@dataclass(frozen=True)
class CheckResult:
    """What one check found on one case.

    outcome: ``passed``; ``failed``, the training code is at fault; ``skipped``, the check does not apply;
        ``error``, the check could not judge. message: its first line is enough to start mending, empty
        when passed without remarks. figures: numbers and notes; seconds: what the check took.
    """

    check: str
    case: str
    outcome: Outcome
    message: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        line = f"{self.check}[{self.case}] {self.outcome.upper()}"
        return f"{line}: {self.message}" if self.message else line


class CheckOutcome(Exception):
    """Base of the ways a check ends other than by returning its figures; survives pickling."""

    def __init__(self, message: str, figures: Figures | None = None) -> None:
        super().__init__(message, figures)
        self.message = message
        self.figures = dict(figures or {})

    def __str__(self) -> str:
        return self.message


class CheckFailed(CheckOutcome):
    """The training code is at fault."""


class CheckSkipped(CheckOutcome):
    """The check does not apply to this case or this machine."""


class CheckUndecided(CheckOutcome):
    """Nothing could be judged; never to be mistaken for a pass."""
