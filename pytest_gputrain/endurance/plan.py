"""What a stability run is asked for: by the marker, by ``run_checks`` and on the command line. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pytest_gputrain.launch.errors import LaunchUsageError

# Without a number: as many as a growing memory or a falling loss needs to be told from noise, if time allows.
MOST_STEPS = 300
# (steps, seconds): a run ends when it has done so many in more than so long. Many cases are looked at in one
# go, and of a large model a few steps are better than none.
_ENOUGH = ((150, 5.0), (40, 20.0), (3, 90.0))
LEGAL_ITERATIONS = "a whole number of steps from 1 up"


class StabilityUsageError(LaunchUsageError):
    """Bad input to a stability run; one line, before any rank starts."""


class StabilityPlan(NamedTuple):
    """What the marker ``stability`` asks for: the depth of the model and the number of training steps."""

    depth: int = 20
    iterations: int = 1000


@dataclass(frozen=True, kw_only=True)
class StabilityOptions:
    """folder: below it the run's own folder is made, kept, and resumed from after a kill; None keeps nothing.

    losses: a file of an earlier run's losses, which this run has to repeat, exactly or, with loss_tolerance,
    within that much relative to each. save_every: steps between checkpoints; None is a tenth of the run.
    capacity: bytes a rank may hold, enforced. ranks: in the place of the context's, which are two or more.
    Raises StabilityUsageError.
    """

    folder: str | None = None
    losses: str | None = None
    loss_tolerance: float = 0.0
    save_every: int | None = None
    capacity: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.loss_tolerance, (int, float)) and 0 <= self.loss_tolerance < math.inf):
            raise StabilityUsageError(
                f"loss_tolerance is {self.loss_tolerance!r}; give 0 (exactly the same) or a relative "
                "difference above it, such as 0.01"
            )
        for name in ("save_every", "capacity", "ranks"):
            value = getattr(self, name)
            if value is not None and not is_count(value):
                raise StabilityUsageError(f"{name} is {value!r}; give a whole number from 1 up")
        if self.losses is not None and not Path(self.losses).is_file():
            raise StabilityUsageError(
                f"losses {self.losses}: there is no such file; give the losses.txt of an earlier run"
            )


def is_late(steps: int, seconds: float) -> bool:
    """Whether a run without a number of its own has done enough in its time."""
    return any(steps >= least and seconds > most for least, most in _ENOUGH)


def is_count(value: object) -> bool:
    """A whole number from 1 up."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def checked_iterations(value: int | None) -> int | None:
    """Raises StabilityUsageError for what is no number of steps."""
    if value is not None and not is_count(value):
        raise StabilityUsageError(
            f"iterations is {value!r}; give {LEGAL_ITERATIONS}, or None for a short run"
        )
    return value
