"""What a planted program is, and the tiny healthy program that most of them are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase

WIDTH = 16


@dataclass(frozen=True)
class Plant:
    """A program and what the checks must say of it.

    fails: check id -> a fragment of the message; may_fail: checks that the same defect may trip as well.
    Healthy programs have neither. timeout: seconds for its launches; hangs are ended by it,
    and ranks without a sign of life after half of it. finder: what
    looks for a batch size, where that is what is planted; None is the package's own. meter: what measures
    speed. iterations: of a stability run; None lets time decide.
    """

    case: Callable[[], TrainingCase]
    fails: Mapping[str, str] = field(default_factory=dict)
    may_fail: frozenset[str] = frozenset()
    timeout: float = 120.0
    finder: Any = None
    meter: Any = None
    iterations: int | None = None

    @property
    def name(self) -> str:
        return self.case.__name__


BROKEN: list[Plant] = []
HEALTHY: list[Plant] = []


def broken(
    fails: Mapping[str, str],
    *,
    may_fail: tuple[str, ...] = (),
    timeout: float = 120.0,
    finder: Any = None,
    meter: Any = None,
    iterations: int | None = None,
) -> Callable[[Callable[[], TrainingCase]], Callable[[], TrainingCase]]:
    """Register a broken program under its function's name."""

    def register(case: Callable[[], TrainingCase]) -> Callable[[], TrainingCase]:
        BROKEN.append(Plant(case, fails, frozenset(may_fail), timeout, finder, meter, iterations))
        return case

    return register


def healthy(case: Callable[[], TrainingCase]) -> Callable[[], TrainingCase]:
    """Register a healthy program under its function's name."""
    return healthy_by(None)(case)


def healthy_but(*checks: str) -> Callable[[Callable[[], TrainingCase]], Callable[[], TrainingCase]]:
    """The same for a program of which these checks say what is true: others train it as it is."""

    def register(case: Callable[[], TrainingCase]) -> Callable[[], TrainingCase]:
        HEALTHY.append(Plant(case, may_fail=frozenset(checks)))
        return case

    return register


def healthy_by(
    meter: Any, *, iterations: int | None = None, may_fail: tuple[str, ...] = ()
) -> Callable[[Callable[[], TrainingCase]], Callable[[], TrainingCase]]:
    """The same for a program whose meter is healthy."""

    def register(case: Callable[[], TrainingCase]) -> Callable[[], TrainingCase]:
        HEALTHY.append(Plant(case, meter=meter, iterations=iterations, may_fail=frozenset(may_fail)))
        return case

    return register


class Block(nn.Module):
    """A residual block: norm, up, relu, down."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.relu(self.up(self.norm(x))))
        return out


class Net(nn.Module):
    """Features (batch, 16) -> (batch, 4)."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def draw(batch_size: int, device: Any) -> dict[str, Tensor]:
    x = torch.randn(batch_size, WIDTH)
    return {"x": x.to(device), "y": torch.randint(4, (batch_size,)).to(device)}


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def case(name: str, **fields: Any) -> TrainingCase:
    """The healthy tiny program with these fields replaced."""
    return TrainingCase(**{"name": name, "model": Net, "batch": draw, "loss": loss, **fields})


def rank() -> int:
    """This rank, 0 where there is no process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
