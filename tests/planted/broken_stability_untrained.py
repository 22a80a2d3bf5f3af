"""Programs whose ranks train the same weights beside something else that is not the same on all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_stability_runs import Step
from tests.planted.plant import WIDTH, Net, broken, case, rank

STEPS = 60


class Projected(Net):
    """A fixed random projection before the blocks; ``as_buffer``: a buffer in a parameter's place."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        table = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        if as_buffer:
            self.register_buffer("table", table)
        else:
            self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x @ self.table)


def redrawn(model: Any) -> Any:
    """The table is drawn anew once the ranks have agreed on it."""
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    with torch.no_grad():
        model.table.normal_(generator=torch.Generator().manual_seed(rank())).div_(4)
    return wrapped


# What reads weights before and after, or compares a rank with one process, sees these too.
PARITY = ("ddp_parity", "accumulation_parity", "ddp_completes", "compile_parity")


@broken(
    {"stable_training": "frozen parameter table differs between ranks before the first step"},
    may_fail=PARITY,
    iterations=STEPS,
)
def frozen_table_of_each_rank() -> TrainingCase:
    return case("frozen_table_of_each_rank", model=lambda: Projected(False), wrap=redrawn)


@broken(
    {"stable_training": "buffer table differs between ranks and none of 60 steps changed it"},
    may_fail=PARITY,
    iterations=STEPS,
)
def random_features_of_each_rank() -> TrainingCase:
    return case("random_features_of_each_rank", model=lambda: Projected(True), wrap=redrawn)


class Frozen(Net):
    """The first block is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)


class Unfreezes(Step):
    """After 25 steps everything trains; DistributedDataParallel knows of the last layers only."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.steps == 26:
            for parameter in model.parameters():
                parameter.requires_grad_(True)
        return super().take(model, optimizer, micro_batches)


def of_all(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@broken(
    {"stable_training": "differs between ranks since one of steps 1 to 50"},
    may_fail=(*PARITY, "compile_no_recompiles"),
    iterations=STEPS,
)
def unfrozen_after_it_was_wrapped() -> TrainingCase:
    return case("unfrozen_after_it_was_wrapped", model=Frozen, optimizer=of_all, step=Unfreezes())


class Taught(Net):
    """A teacher that never trains: the averaged weights of the net."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x) + 0.1 * self.teacher(x)
        return out


class Averages(Step):
    """``first_only``: on the first rank only, which is the one that evaluates."""

    def __init__(self, first_only: bool) -> None:
        super().__init__()
        self.first_only = first_only

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        done = super().take(model, optimizer, micro_batches)
        net = getattr(model, "module", model)
        if not (self.first_only and rank()):
            for own, average in zip(net.head.parameters(), net.teacher.parameters(), strict=True):
                average.data.lerp_(own.data, 0.05)
        return done


@broken(
    {"stable_training": "frozen parameter teacher."},
    may_fail=PARITY,
    iterations=STEPS,
)
def teacher_that_one_rank_averages() -> TrainingCase:
    return case("teacher_that_one_rank_averages", model=Taught, step=Averages(True))
