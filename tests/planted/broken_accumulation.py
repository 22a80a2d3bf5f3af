"""Micro-batches that do not make up the full batch, and what belongs to the window done for each of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_averages import num_targets, ragged_draw, token_loss
from tests.planted.broken_gradients import CheckpointedNet
from tests.planted.healthy_models import convnet, image_draw, image_loss
from tests.planted.plant import broken, case, loss

PARITY, SCHEDULE = "accumulation_parity", "accumulation_schedule"
Loss = Callable[[Any, Any], Tensor]


def accumulate(model: Any, micro_batches: Any, scale: float, function: Loss = loss) -> Tensor:
    """Backward over all of them, synchronised in the last; returns the sum of the scaled losses."""
    total = torch.zeros(())
    for index, batch in enumerate(micro_batches):
        with nullcontext() if index == len(micro_batches) - 1 else model.no_sync():
            value = function(model, batch) * scale
            value.backward()
        total = total + value.detach()
    return total


def undivided_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0)
    optimizer.step()
    return total / len(micro_batches)


@broken({PARITY: "gradients of 4 micro-batches are 4.000 x those of the full batch (14 of 14 parameters)"})
def loss_not_divided() -> TrainingCase:
    return case("loss_not_divided", step=undivided_step)


def clipped_undivided_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    return total / len(micro_batches)


@broken({PARITY: "gradients of 4 micro-batches are 4.000 x"})
def clipping_hides_that_nothing_divides() -> TrainingCase:
    return case("clipping_hides_that_nothing_divides", step=clipped_undivided_step)


def image_undivided_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0, image_loss)
    optimizer.step()
    return total / len(micro_batches)


@broken({PARITY: "gradients of 4 micro-batches are 4.000 x"})
def loss_not_divided_behind_batchnorm() -> TrainingCase:
    return case(
        "loss_not_divided_behind_batchnorm",
        model=convnet,
        batch=image_draw,
        loss=image_loss,
        step=image_undivided_step,
    )


def divides_twice_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches))
    for parameter in model.parameters():
        parameter.grad /= len(micro_batches)
    optimizer.step()
    return total


@broken({PARITY: "gradients of 4 micro-batches are 0.250 x"})
def divided_by_micro_batches_twice() -> TrainingCase:
    return case("divided_by_micro_batches_twice", step=divides_twice_step)


def fixed_divisor_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0 / 4)
    optimizer.step()
    return total


@broken({PARITY: "the step divides by a fixed 4, however many micro-batches it gets"})
def fixed_divisor() -> TrainingCase:
    return case("fixed_divisor", step=fixed_divisor_step)


def naive_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches), token_loss)
    optimizer.step()
    return total


def tokens(name: str, **fields: Any) -> TrainingCase:
    return case(
        name,
        batch=ragged_draw,
        loss=token_loss,
        loss_reduction="token_mean",
        num_targets=num_targets,
        **fields,
    )


@broken({PARITY: "tokens are averaged naively: 4 micro-batches with"}, may_fail=("ddp_parity",))
def token_means_averaged() -> TrainingCase:
    return tokens("token_means_averaged", step=naive_step)


@broken({PARITY: "tokens are averaged naively: 4 micro-batches with"}, may_fail=("ddp_parity",))
def token_means_averaged_behind_dropout() -> TrainingCase:
    return tokens(
        "token_means_averaged_behind_dropout", step=naive_step, model=lambda: CheckpointedNet(dropout=0.3)
    )


@broken({PARITY: "tokens are averaged naively: in the full batch's loss the 4 micro-batches count"})
def token_mean_called_a_mean() -> TrainingCase:
    return case("token_mean_called_a_mean", batch=ragged_draw, loss=token_loss, step=naive_step)


def summed_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


@broken({PARITY: "the loss is a sum, and the case calls it a mean: in the full batch's loss each of 4"})
def sum_called_a_mean() -> TrainingCase:
    return case("sum_called_a_mean", loss=summed_loss)


def zeroing_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    total = torch.zeros(())
    for batch in micro_batches:
        optimizer.zero_grad()
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        total = total + value.detach()
    optimizer.step()
    return total


@broken(
    {
        PARITY: "only the last of 4 micro-batches counts in the gradients",
        SCHEDULE: "only the last of 4 micro-batches counts in the gradients",
    }
)
def zeroed_inside_the_loop() -> TrainingCase:
    return case("zeroed_inside_the_loop", step=zeroing_step)


def one_too_few_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    used = micro_batches[:-1] if len(micro_batches) > 1 else micro_batches
    total = accumulate(model, used, 1.0 / len(micro_batches))
    optimizer.step()
    return total


@broken(
    {
        PARITY: "the last of 4 micro-batches does not count",
        SCHEDULE: "the last of 4 micro-batches does not count in the gradients: the effective "
        "batch is smaller",
    },
    may_fail=("ddp_parity",),
)
def last_micro_batch_dropped() -> TrainingCase:
    return case("last_micro_batch_dropped", step=one_too_few_step)


def returns_early_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    for batch in micro_batches:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        return value.detach()
    raise AssertionError


@broken(
    {
        PARITY: "only the first of 4 micro-batches counts",
        SCHEDULE: "only the first of 4 micro-batches counts",
    },
)
def return_inside_the_loop() -> TrainingCase:
    return case("return_inside_the_loop", step=returns_early_step)


def last_twice_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    again = [*micro_batches, micro_batches[-1]] if len(micro_batches) > 1 else micro_batches
    total = accumulate(model, again, 1.0 / len(micro_batches))
    optimizer.step()
    return total


@broken(
    {
        PARITY: "micro-batches count 0.250, 0.250, 0.250, 0.500 in the gradients",
        SCHEDULE: "micro-batch 4 of 4 counts twice",
    }
)
def last_micro_batch_twice() -> TrainingCase:
    return case("last_micro_batch_twice", step=last_twice_step)


def even_split(batch: Any, parts: int) -> list[Any]:
    """Drops what does not make a whole piece: one sample of three micro-batches' first."""
    size = len(batch["x"]) // parts
    size -= size > 1
    return [{key: value[i * size : (i + 1) * size] for key, value in batch.items()} for i in range(parts)]


@broken(
    {
        PARITY: "split(batch, 4) gives 20 of 24 samples: the effective batch is not the one asked for",
        SCHEDULE: "split(batch, 4) gives 20 of 24 samples",
    },
    may_fail=("ddp_parity",),
)
def split_that_drops_samples() -> TrainingCase:
    return case("split_that_drops_samples", split=even_split)


def step_per_micro_batch(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    total = torch.zeros(())
    for batch in micro_batches:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        total = total + value.detach() / len(micro_batches)
    return total


@broken(
    {
        PARITY: "the optimizer steps 4 times in a window of 4 micro-batches",
        SCHEDULE: "the optimizer steps 4 times in a window of 4 micro-batches, and once",
    },
    may_fail=("ddp_parity",),
)
def optimizer_step_inside_the_loop() -> TrainingCase:
    return case("optimizer_step_inside_the_loop", step=step_per_micro_batch)


def clips_each_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        total = total + value.detach()
    optimizer.step()
    return total


@broken(
    {SCHEDULE: "gradients are clipped 4 times in a window of 4 micro-batches, and once in one of a single"},
    may_fail=(PARITY, "ddp_parity"),
)
def clipping_inside_the_loop() -> TrainingCase:
    return case("clipping_inside_the_loop", step=clips_each_step)


def scales_each_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        if norm > 100.0:
            for parameter in model.parameters():
                parameter.grad.mul_(100.0 / norm)
        total = total + value.detach()
    optimizer.step()
    return total


@broken({SCHEDULE: "gradients are clipped, or otherwise changed by their size, for each of 4 micro-batches"})
def clipping_by_hand_inside_the_loop() -> TrainingCase:
    return case("clipping_by_hand_inside_the_loop", step=scales_each_step)


class Scheduled:
    """A scheduler made when the first step comes, stepped inside the loop."""

    def __init__(self) -> None:
        self.schedule: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        if self.schedule is None:
            self.schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000)
        optimizer.zero_grad()
        total = torch.zeros(())
        for index, batch in enumerate(micro_batches):
            value = loss(model, batch) / len(micro_batches)
            value.backward()
            if index == len(micro_batches) - 1:
                optimizer.step()
            self.schedule.step()
            total = total + value.detach()
        return total


@broken({SCHEDULE: "the scheduler steps 4 times in a window of 4 micro-batches, and once in one of a single"})
def scheduler_inside_the_loop() -> TrainingCase:
    return case("scheduler_inside_the_loop", step=Scheduled())


class WarmsUp:
    """Its warm-up counts micro-batches."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.count += len(micro_batches)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, self.count / 100)
        optimizer.zero_grad()
        total = accumulate(model, micro_batches, 1.0 / len(micro_batches))
        optimizer.step()
        return total


@broken(
    {SCHEDULE: "the learning rate in window 1 is 4e-05 with 4 micro-batches a window, and 1e-05 with one"}
)
def warm_up_that_counts_micro_batches() -> TrainingCase:
    return case("warm_up_that_counts_micro_batches", step=WarmsUp())


def backward_only_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for index, batch in enumerate(micro_batches):
        value = loss(model, batch) / len(micro_batches)
        with nullcontext() if index == len(micro_batches) - 1 else model.no_sync():
            value.backward()
        total = total + value.detach()
    optimizer.step()
    return total


@broken(
    {SCHEDULE: "no_sync() is on in backward, but was off in forward, where it decides: all 4 micro-batches"}
)
def no_sync_around_the_backward_only() -> TrainingCase:
    return case("no_sync_around_the_backward_only", step=backward_only_step)


def never_synced_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    with model.no_sync() if len(micro_batches) > 1 else nullcontext():
        for batch in micro_batches:
            value = loss(model, batch) / len(micro_batches)
            value.backward()
            total = total + value.detach()
    optimizer.step()
    return total


@broken(
    {SCHEDULE: "the last of 4 micro-batches is under no_sync(), so the window's"},
    may_fail=("ddp_parity", "ddp_completes"),
)
def no_sync_around_the_last_too() -> TrainingCase:
    return case("no_sync_around_the_last_too", step=never_synced_step)


def last_loss_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    value = torch.zeros(())
    for index, batch in enumerate(micro_batches):
        with nullcontext() if index == len(micro_batches) - 1 else model.no_sync():
            value = loss(model, batch)
            (value / len(micro_batches)).backward()
    optimizer.step()
    return value.detach()


@broken({SCHEDULE: "is that of the last; the window's is"})
def last_loss_is_logged() -> TrainingCase:
    return case("last_loss_is_logged", step=last_loss_step)


def never_zeroed_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches))
    optimizer.step()
    return total


@broken(
    {SCHEDULE: "14 parameters still have the gradient of the window before when the next adds to it"},
    may_fail=("ddp_parity",),
)
def never_zeroed() -> TrainingCase:
    return case("never_zeroed", step=never_zeroed_step)


class ClipsScaled:
    """Clips what the loss scaler has not unscaled yet."""

    def __init__(self) -> None:
        self.scaler: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in micro_batches:
            value = loss(model, batch) / len(micro_batches)
            self.scaler.scale(value).backward()
            total = total + value.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        return total


@broken({SCHEDULE: "gradients are clipped while a loss scaler's factor is still in them"}, may_fail=(PARITY,))
def clips_before_unscaling() -> TrainingCase:
    return case("clips_before_unscaling", step=ClipsScaled())


def spread(model: Any) -> Tensor:
    """An auxiliary loss: the heads' weights are kept small."""
    inner = getattr(model, "module", model)
    penalty: Tensor = inner.head.weight.square().sum() * 0.05
    return penalty


def loss_with_penalty(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"]) + spread(model)


def penalty_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches) + spread(model)
        value.backward()
        total = total + value.detach()
    optimizer.step()
    return total


@broken(
    {PARITY: "gradients of 4 micro-batches are not those of the full batch (1 of 14 parameters)"},
    may_fail=(SCHEDULE,),
)
def auxiliary_loss_not_divided() -> TrainingCase:
    return case("auxiliary_loss_not_divided", loss=loss_with_penalty, step=penalty_step)


def decays_each_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        for parameter in model.parameters():
            parameter.grad.add_(parameter.detach(), alpha=0.01)
        total = total + value.detach()
    optimizer.step()
    return total


@broken({PARITY: "or gradients are changed between micro-batches"}, may_fail=(SCHEDULE,))
def weight_decay_added_each_time() -> TrainingCase:
    return case("weight_decay_added_each_time", step=decays_each_step)
