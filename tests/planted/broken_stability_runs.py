"""Programs that train well at first: what breaks breaks after dozens of steps, in one of the ranks."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pytest_gputrain.case import TrainingCase
from pytest_gputrain.case.defaults import DefaultStep, unwrapped
from tests.planted.plant import WIDTH, broken, case, draw, loss, rank

MANY = 64
# What compares gradients trips over a loss that is scaled.
SCALED = ("ddp_parity", "accumulation_parity", "accumulation_schedule", "compile_parity")


class Step:
    """The default step, counted."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        self.steps += 1
        return self.take(model, optimizer, micro_batches)

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        return DefaultStep(loss)(model, optimizer, micro_batches)


class OutOfMemoryLate(Step):
    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.steps == MANY and rank() == 1:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return super().take(model, optimizer, micro_batches)


@broken({"stable_training": "(in step 64"})
def out_of_memory_late() -> TrainingCase:
    return case("out_of_memory_late", step=OutOfMemoryLate())


class DivergesLate(Step):
    """One rank's weights are moved by a little, once."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        done = super().take(model, optimizer, micro_batches)
        if self.steps == 50 and rank() == 1:
            with torch.no_grad():
                next(iter(model.parameters())).add_(1e-4)
        return done


@broken({"stable_training": "ranks diverge in step 50: rank 1 and rank 0 hold different weights after it"})
def ranks_diverge_late() -> TrainingCase:
    return case("ranks_diverge_late", step=DivergesLate())


class DividesByZero(Step):
    """The loss of one step, on one rank, is 0 / 0."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.steps == MANY and rank() == 1:
            x = micro_batches[0]["x"]
            micro_batches = [{**micro_batches[0], "x": x / (x - x)}]
        return super().take(model, optimizer, micro_batches)


@broken({"stable_training": "the loss is nan in step 64 on rank 1"})
def nan_in_a_late_step() -> TrainingCase:
    return case("nan_in_a_late_step", step=DividesByZero())


class InfiniteUpdate(Step):
    """Finite losses; one weight of one rank's copy becomes infinite where no loss shows it."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        done = super().take(model, optimizer, micro_batches)
        if self.steps == MANY:
            with torch.no_grad():
                list(model.parameters())[-1][0] = float("-inf")
        return done


@broken(
    {"stable_training": "parameters are NaN or infinite after step 64 on every rank"},
    may_fail=("compile_parity",),
)
def infinite_weight_in_a_late_step() -> TrainingCase:
    return case("infinite_weight_in_a_late_step", step=InfiniteUpdate())


class SkipsAlone(Step):
    """One rank finds its loss not finite and goes on; ``early``: before the gradients are averaged."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        is_bad = self.steps == MANY and rank() == 1
        if not (is_bad and self.early):
            value.backward()
        if not is_bad:
            optimizer.step()
        return value.detach()


LEFT_OUT = "rank 1 left out the optimizer's step in step 64, which rank 0 took"


@broken({"stable_training": LEFT_OUT})
def batch_skipped_on_one_rank() -> TrainingCase:
    return case("batch_skipped_on_one_rank", step=SkipsAlone(early=True))


@broken({"stable_training": LEFT_OUT})
def update_skipped_on_one_rank() -> TrainingCase:
    return case("update_skipped_on_one_rank", step=SkipsAlone(early=False))


class ScalesTooHigh(Step):
    """From step 64 on gradients overflow in every step, which the optimizer does not see."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        (value * (1e38 if self.steps >= MANY else 1.0)).mul(1e3).backward()
        gradients = [one.grad for one in model.parameters() if one.grad is not None]
        if all(one.isfinite().all() for one in gradients):
            optimizer.step()
        return value.detach()


@broken({"stable_training": "no optimizer steps any more on every rank from step 64 on"}, may_fail=SCALED)
def loss_scale_that_stays_too_high() -> TrainingCase:
    return case("loss_scale_that_stays_too_high", step=ScalesTooHigh())


class ChangesOptimizer(Step):
    """From step 40 on another optimizer, of a copy: the loss has fallen by then and stays."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        if self.steps == 40:
            self.other = torch.optim.AdamW(copy.deepcopy(unwrapped(model)).parameters(), 1e-3)
        model.zero_grad()
        value = loss(model, micro_batches[0])
        value.backward()
        (self.other if self.steps >= 40 else optimizer).step()
        return value.detach()


@broken({"stable_training": "no weight changes any more from step 50 or earlier on"}, iterations=160)
def optimizer_of_a_copy_from_a_step_on() -> TrainingCase:
    return case("optimizer_of_a_copy_from_a_step_on", step=ChangesOptimizer())


def of_what_is_detached(model: Any, batch: Any) -> Tensor:
    """Falls nevertheless: weight decay makes the outputs smaller."""
    out = model(batch["x"])
    value: Tensor = F.cross_entropy(out.detach(), batch["y"]) + 0 * out.sum()
    return value


@broken(
    {"stable_training": "gradients are exactly 0 in every step that was looked at (50, "},
    may_fail=("optimizer_covers", "gradients_arrive", "ddp_parity", "compile_parity"),
)
def loss_of_detached_outputs() -> TrainingCase:
    return case("loss_of_detached_outputs", loss=of_what_is_detached)


def masked_late() -> Iterator[Any]:
    """In the 64th batch no target counts."""
    for number in range(1, 1000):
        batch = draw(4, "cpu")
        if number == MANY:
            batch["y"] = torch.full_like(batch["y"], -100)
        yield batch


@broken({"stable_training": "every target of its batch is -100"}, may_fail=("ddp_data_differs",))
def batch_with_all_targets_masked() -> TrainingCase:
    return case("batch_with_all_targets_masked", batches=masked_late)


class SpoilsABuffer(nn.Module):
    """(batch, 16) -> (batch, 4). A running mean becomes NaN, which training does not look at."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == MANY and self.norm.running_mean is not None:
            self.norm.running_mean[0] = float("nan")
        out: Tensor = self.down(torch.relu(self.norm(self.up(x))))
        return out


@broken(
    {"stable_training": "buffer norm.running_mean is NaN or infinite on every rank after "},
    may_fail=("batch_size_holds", "compile_no_recompiles"),  # it counts its calls
)
def running_mean_becomes_nan() -> TrainingCase:
    return case("running_mean_becomes_nan", model=SpoilsABuffer)


class Ascends(Step):
    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        optimizer.zero_grad()
        value = loss(model, micro_batches[0])
        (-value).backward()
        optimizer.step()
        return value.detach()


@broken({"stable_training": "the loss rises: "}, may_fail=("ddp_parity", "accumulation_parity"))
def loss_of_the_wrong_sign() -> TrainingCase:
    return case("loss_of_the_wrong_sign", step=Ascends())


class StepsInVain(Step):
    """Gradients are zeroed between backward and the optimizer's step."""

    def take(self, model: Any, optimizer: Any, micro_batches: Any) -> Any:
        value = loss(model, micro_batches[0])
        value.backward()
        optimizer.zero_grad()
        optimizer.step()
        return value.detach()


@broken(
    {"stable_training": "the loss does not fall: no parameter moved in "},
    may_fail=("optimizer_covers", "accumulation_schedule", "ddp_parity", "accumulation_parity"),
)
def gradients_zeroed_before_the_step() -> TrainingCase:
    return case("gradients_zeroed_before_the_step", step=StepsInVain())


class Samples(Dataset[dict[str, Tensor]]):
    """In its worker process, sample 100 goes wrong as ``ending`` says."""

    def __init__(self, ending: str) -> None:
        self.ending = ending

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == 100 and self.ending == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 100 and self.ending == "hangs":
            time.sleep(3600)
        if index == 100 and self.ending == "raises":
            raise KeyError("no label")
        made = torch.Generator().manual_seed(index)
        return {"x": torch.randn(WIDTH, generator=made), "y": torch.tensor(index % 4)}


class Loaded:
    def __init__(self, ending: str) -> None:
        self.ending = ending

    def __call__(self) -> Iterator[Any]:
        return iter(DataLoader(Samples(self.ending), batch_size=4, num_workers=1))


LOADS = ("ddp_completes", "batch_shapes_constant", "ddp_data_differs", "compile_no_recompiles")


@broken({"stable_training": "a data loader's worker process died or waits for ever"}, may_fail=LOADS)
def data_worker_dies() -> TrainingCase:
    return case("data_worker_dies", batches=Loaded("dies"))


@broken({"stable_training": "raised KeyError: 'no label' (in DataLoader worker process 0)"}, may_fail=LOADS)
def data_worker_raises() -> TrainingCase:
    return case("data_worker_raises", batches=Loaded("raises"))


@broken(
    {"stable_training": "a data loader's worker process died or waits for ever"}, may_fail=LOADS, timeout=24.0
)
def data_worker_hangs() -> TrainingCase:
    return case("data_worker_hangs", batches=Loaded("hangs"))
