"""Healthy ways to accumulate, as people write them, on models whose micro-batches rightly differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_accumulation import accumulate
from tests.planted.broken_averages import num_targets, ragged_draw, token_loss
from tests.planted.broken_gradients import CheckpointedNet
from tests.planted.broken_hangs import find_unused
from tests.planted.healthy_models import Tied, convnet, image_draw, image_loss, next_token_loss, token_draw
from tests.planted.plant import WIDTH, Net, case, draw, healthy, healthy_but, loss


def image_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    model.train()
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches), image_loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total


@healthy
def batchnorm_accumulated() -> TrainingCase:
    return case("batchnorm_accumulated", model=convnet, batch=image_draw, loss=image_loss, step=image_step)


class WarmUpAndClip:
    """Zeroes by hand at its beginning, clips and schedules at its end; the scheduler is made in a closure."""

    def __init__(self) -> None:
        self.schedule: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> dict[str, Tensor]:
        if self.schedule is None:
            warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
            self.schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], [2])
        for parameter in model.parameters():
            parameter.grad = None
        total = accumulate(model, micro_batches, 1.0 / len(micro_batches))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        self.schedule.step()
        return {"loss": total, "lr": torch.tensor(self.schedule.get_last_lr()[0])}


@healthy
def dropout_warm_up_and_clipping() -> TrainingCase:
    return case(
        "dropout_warm_up_and_clipping", model=lambda: CheckpointedNet(dropout=0.3), step=WarmUpAndClip()
    )


class CapacityExperts(nn.Module):
    """Four experts that take at most so many samples each, a noisy router, and a loss that balances them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 4)
        self.balance: Any = None

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.training:
            logits = logits + 0.1 * torch.randn_like(logits)
        chance = logits.softmax(-1)
        best, chosen = chance.max(-1)
        capacity = max(1, len(x) // 3)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().flatten()[:capacity]
            if len(rows):
                out = out.index_copy(0, rows, expert(x[rows]) * best[rows, None])
        load = F.one_hot(chosen, 4).to(chance.dtype).mean(0)
        self.balance = 4 * (load * chance.mean(0)).sum()
        result: Tensor = self.head(x + out)
        return result


def balanced_loss(model: Any, batch: Any) -> Tensor:
    value = F.cross_entropy(model(batch["x"]), batch["y"])
    total: Tensor = value + 0.01 * getattr(model, "module", model).balance
    return total


def balanced_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches), balanced_loss)
    optimizer.step()
    return total


@healthy_but("compile_no_recompiles")  # torch compiles nothing of it
def experts_with_capacity_and_noise() -> TrainingCase:
    return case(
        "experts_with_capacity_and_noise",
        model=CapacityExperts,
        loss=balanced_loss,
        step=balanced_step,
        wrap=find_unused,
    )


def tied_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches), next_token_loss)
    optimizer.step()
    return total


@healthy
def tied_embeddings_accumulated() -> TrainingCase:
    return case(
        "tied_embeddings_accumulated", model=Tied, batch=token_draw, loss=next_token_loss, step=tied_step
    )


def autocast_loss(model: Any, batch: Any) -> Tensor:
    with torch.autocast(batch["x"].device.type, torch.bfloat16):
        return loss(model, batch)


class ScaledAutocast:
    """bfloat16 autocast, a loss scaler that is unscaled before clipping, accumulation."""

    def __init__(self) -> None:
        self.scaler: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> float:
        self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=256.0)
        total = 0.0
        for index, batch in enumerate(micro_batches):
            with nullcontext() if index == len(micro_batches) - 1 else model.no_sync():
                value = autocast_loss(model, batch) / len(micro_batches)
                self.scaler.scale(value).backward()
            total += value.item()
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        return total


@healthy
def autocast_and_scaler_accumulated() -> TrainingCase:
    return case("autocast_and_scaler_accumulated", loss=autocast_loss, step=ScaledAutocast())


def items_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """As transformers' Trainer does: sums over tokens, divided by those of the whole window, on all ranks."""
    total_items = torch.tensor(float(sum(map(num_targets, micro_batches))))
    ranks = 1
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total_items)
        ranks = torch.distributed.get_world_size()
    optimizer.zero_grad()

    def share(model: Any, batch: Any) -> Tensor:
        value = F.cross_entropy(model(batch["x"]), batch["y"], ignore_index=-100, reduction="sum")
        return value * ranks / total_items

    total = accumulate(model, micro_batches, 1.0, share)
    optimizer.step()
    return total


@healthy
def tokens_of_the_whole_window() -> TrainingCase:
    return case(
        "tokens_of_the_whole_window",
        batch=ragged_draw,
        loss=token_loss,
        loss_reduction="token_mean",
        num_targets=num_targets,
        step=items_step,
    )


class Accelerator:
    """As accelerate: the user's loop looks like one without accumulation, and the wrappers count."""

    def __init__(self, num: int) -> None:
        self.num, self.count = num, 0

    @contextmanager
    def accumulate(self, model: Any) -> Iterator[None]:
        self.count += 1
        with nullcontext() if self.is_last else model.no_sync():
            yield

    @property
    def is_last(self) -> bool:
        return self.count % self.num == 0

    def backward(self, value: Tensor) -> None:
        (value / self.num).backward()


def accelerated_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    accelerator = Accelerator(len(micro_batches))
    losses = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            value = loss(model, batch)
            accelerator.backward(value)
            if accelerator.is_last:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(value.detach())
    return torch.stack(losses).mean()


@healthy
def loop_in_the_manner_of_accelerate() -> TrainingCase:
    return case("loop_in_the_manner_of_accelerate", step=accelerated_step)


def main_gradients_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """As Megatron does: adds up in buffers of its own, and clears the gradients in between."""
    parameters = list(model.parameters())
    buffers = [torch.zeros_like(parameter) for parameter in parameters]
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch)
        value.backward()
        for buffer, parameter in zip(buffers, parameters, strict=True):
            buffer.add_(parameter.grad, alpha=1.0 / len(micro_batches))
            parameter.grad = None
        total = total + value.detach() / len(micro_batches)
    for buffer, parameter in zip(buffers, parameters, strict=True):
        parameter.grad = buffer
    optimizer.step()
    optimizer.zero_grad()
    return total


@healthy
def added_up_in_buffers_of_its_own() -> TrainingCase:
    limit = "its reference does not know gradients that are kept in buffers from backward to backward"
    return case(
        "added_up_in_buffers_of_its_own", step=main_gradients_step, expected_failures={"ddp_parity": limit}
    )


def divides_at_the_end_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0)
    for parameter in model.parameters():
        parameter.grad.div_(len(micro_batches)).add_(parameter.detach(), alpha=0.01)
    optimizer.step()
    return total / len(micro_batches)


@healthy
def divided_and_decayed_at_the_end() -> TrainingCase:
    return case("divided_and_decayed_at_the_end", step=divides_at_the_end_step)


def closure_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """The window within the closure, as Lightning has it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        return accumulate(model, micro_batches, 1.0 / len(micro_batches))

    value: Tensor = optimizer.step(closure)
    return value


def plain_descent(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@healthy
def window_in_a_closure() -> TrainingCase:
    limit = "its reference updates without a closure, and takes the gradients after the first backward"
    return case(
        "window_in_a_closure",
        step=closure_step,
        optimizer=plain_descent,
        expected_failures={"ddp_parity": limit},
    )


def smoothed_loss(model: Any, batch: Any) -> Tensor:
    return 0.5 * F.cross_entropy(model(batch["x"]), batch["y"], label_smoothing=0.1)


def smoothed_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """Another loss than the case's, on purpose, and at every number of micro-batches the same."""
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches), smoothed_loss)
    optimizer.step()
    return total


@healthy
def another_loss_in_the_step() -> TrainingCase:
    return case("another_loss_in_the_step", step=smoothed_step, model=Net, batch=draw)
