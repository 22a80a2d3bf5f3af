"""What the ranks of a stability run are told, and what each of them says at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pytest_gputrain.checks.flops import Flops
from pytest_gputrain.endurance.findings import Finding
from pytest_gputrain.endurance.held import Held


@dataclass(frozen=True)
class Order:
    """What a rank is told. resume_at: the step of the checkpoint to go on from, 0 for none.

    recorded_until: the last step that any rank recorded before, up to which all compare their data.
    iterations: None is by time. keeps: whether to write checkpoints, every ``save_every`` steps.
    """

    folder: str
    iterations: int | None
    resume_at: int
    recorded_until: int
    keeps: bool
    save_every: int
    capacity: int | None = None


@dataclass
class Ended:
    """What a rank says at the end; its records are in its file.

    before, after: losses of the same batches. again: of these after training on them alone, where those of a
    stream did not fall. own_first, own_last: what steps returned for repeated batches. takes_turns: several
    optimizers in a step of the case's own. moved: whether any trained parameter is another. flops: of a step
    on one rank, None where they were not counted. epochs: of the case's own stream; 0 for repeated batches.
    workers: names of data loaders' workers by process id, where a process of the rank's grew. flags: what
    decides whether the arithmetic can be repeated.
    """

    steps: int = 0
    finding: Finding | None = None
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    own_first: list[float] = field(default_factory=list)
    own_last: list[float] = field(default_factory=list)
    takes_turns: bool = False
    moved: bool = True
    rate: float | None = None
    held: Held | None = None
    workers: dict[int, str] = field(default_factory=dict)
    peak_bytes: int | None = None
    flops: Flops | None = None
    epochs: int = 0
    flags: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
