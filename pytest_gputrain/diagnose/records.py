"""What a phase was to do and what it came to, as plain data: the pure parts read nothing else."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["script", "module", "case"]
Group = Literal["program", "backend", "branch", "variant", "single", "checkpointing"]


class Outcome(enum.Enum):
    """What a phase came to. Only PASS is green."""

    PASS = "PASS"
    FAIL = "FAIL"
    """A rank raised, or gradients are not what they should be."""
    HANG = "HANG"
    """Nothing moved any more."""
    SLOW = "SLOW"
    """Ranks made progress: the deadline came, or a step took far longer than the others."""
    CRASH = "CRASH"
    """A rank's process ended without a report."""
    SKIPPED = "SKIPPED"

    def __str__(self) -> str:
        return self.value


BAD = (Outcome.FAIL, Outcome.HANG, Outcome.CRASH)


@dataclass(frozen=True)
class Phase:
    """One way of running the program.

    group: what the tree asks it about. switches: ``GPUTRAIN_*`` variables that make this phase what it is.
    steps: optimizer steps to take; None is to the program's own end. accuses: whether its failure alone makes
    the exit code 1. skip: why it is not run.
    """

    name: str
    title: str
    group: Group
    ranks: int
    steps: int | None
    switches: Mapping[str, str] = field(default_factory=dict)
    wrap: Literal["own", "fsdp2"] = "own"
    branch: str = ""
    layers: tuple[int, int | None] | None = None
    accuses: bool = True
    skip: str = ""

    @property
    def alone(self) -> bool:
        """Whether it is one process on one machine, however many the program has."""
        return self.group in ("single", "checkpointing")


@dataclass(frozen=True)
class Missing:
    """A parameter without a gradient: in which steps, on which ranks, in which module it is."""

    name: str
    ranks: tuple[int, ...]
    steps: tuple[int, ...]
    everywhere: bool  # on every rank, in every step traced

    @property
    def owner(self) -> str:
        """The module that owns it, by path; the model itself for a parameter at the top."""
        return self.name.rpartition(".")[0] or "the model itself"


@dataclass(frozen=True)
class PhaseResult:
    """What a phase came to.

    cause: the line to read first, empty for PASS. location: ``file:line in function`` of the user's code.
    likely: what is usually behind the cause. range: the smallest layer range that fails, from the bisection.
    profile: where the time goes.
    finished: whether the program came to its end, or to the step where it was to stop.
    """

    phase: Phase
    outcome: Outcome
    cause: str = ""
    kind: str = ""
    location: str | None = None
    seconds: float = 0.0
    finished: bool = True
    missing: tuple[Missing, ...] = ()
    range: tuple[int, int] | None = None
    profile: str = ""
    likely: str = ""
    notes: tuple[str, ...] = ()
    folder: str = ""
    backend: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def bad(self) -> bool:
        """Whether something is wrong with the program run this way. SLOW is not wrong."""
        return self.outcome in BAD

    @property
    def red(self) -> bool:
        """Whether this alone makes the exit code 1: it is wrong, or it never came to its end."""
        return self.bad or (self.outcome is Outcome.SLOW and not self.finished)
