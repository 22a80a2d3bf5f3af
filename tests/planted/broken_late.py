"""Right in the first steps: what breaks is broken later."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, zeros

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_hangs import find_unused
from tests.planted.plant import WIDTH, Net, broken, case, loss


class NanLater:
    """The loss is NaN from the fourth step on, and the step does not say so."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> None:
        self.steps += 1
        optimizer.zero_grad()
        (loss(model, micro_batches[0]) * (float("nan") if self.steps > 3 else 1.0)).backward()
        optimizer.step()


@broken(
    {
        "optimizer_covers": "14 of 14 parameters are NaN or infinite after step 3",
        "ddp_parity": "14 of 14 parameters are NaN or infinite after step 3 on every rank",
    },
    may_fail=("gradients_arrive", "ddp_completes"),
)
def weights_that_become_nan_late() -> TrainingCase:
    return case("weights_that_become_nan_late", step=NanLater())


class DetachesLater(Net):
    """What was meant for evaluation stays on after the first steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        stem = self.stem(x)
        return super().forward(stem if self.calls < 3 else stem.detach())


@broken(
    {"gradients_arrive": "2 of 16 trainable parameters get no gradient after step 1"},
    may_fail=("compile_no_recompiles",),  # it counts its calls
)
def module_detached_later() -> TrainingCase:
    return case("module_detached_later", model=DetachesLater, wrap=find_unused)


class ReplacesHead:
    """In its third step, as for a new set of classes."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.steps += 1
        if self.steps == 3:
            getattr(model, "module", model).head = nn.Linear(WIDTH, 4)
        optimizer.zero_grad()
        for batch in micro_batches:
            (loss(model, batch) / len(micro_batches)).backward()
        optimizer.step()
        return zeros(())


@broken(
    {
        "gradients_arrive": "head.weight (in head, Linear)",
        "optimizer_covers": "2 parameters were replaced in step 2",
    },
    may_fail=("ddp_parity", "ddp_completes", "accumulation_schedule"),
)
def head_replaced_while_training() -> TrainingCase:
    return case("head_replaced_while_training", step=ReplacesHead(), wrap=find_unused)
