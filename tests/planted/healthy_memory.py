"""Healthy programs whose memory looks suspicious: it comes once, comes late, or is a number a step."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_finders import Deep, DetourWhenOdd, tokens
from tests.planted.healthy_models import next_token_loss
from tests.planted.plant import WIDTH, case, healthy, healthy_but

# A global, as the cache of a module often is.
masks: dict[tuple[int, int], Tensor] = {}


class CachesMasks(Deep):
    """Rotary tables and masks are made when first used, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        key = (len(tokens), tokens.shape[1])
        if key not in masks:
            masks[key] = torch.ones(*key).tril()
        if self.table is None:
            self.table = torch.arange(512 * WIDTH).view(512, WIDTH).float().cos()
        out = super().forward(tokens) * masks[key][..., None]
        return out + self.table[: tokens.shape[1]].mean()


@healthy
def caches_made_when_first_used() -> TrainingCase:
    return tokens("caches_made_when_first_used", model=CachesMasks)


def plain_sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@healthy
def optimizer_without_state() -> TrainingCase:
    return tokens("optimizer_without_state", optimizer=plain_sgd)


class Checkpointed(Deep):
    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False)
        out: Tensor = self.head(hidden)
        return out


@healthy
def activations_recomputed() -> TrainingCase:
    return tokens("activations_recomputed", model=Checkpointed)


class Averages:
    """A moving average of the weights from the first step on, and metrics of each step as numbers."""

    def __init__(self) -> None:
        self.average: Any = None
        self.of: Any = None
        self.metrics: list[float] = []
        self.last: collections.deque[Tensor] = collections.deque(maxlen=12)

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        if self.of is not optimizer:
            self.of, self.average = optimizer, [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        total = torch.zeros((), device=next(model.parameters()).device)
        for micro_batch in micro_batches:
            value = next_token_loss(model, micro_batch) / len(micro_batches)
            value.backward()
            total = total + value.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        self.metrics += [float(total), float(norm)]
        self.last.append(total)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(model.parameters()), 0.1)
        return total


@healthy
def average_of_the_weights_and_metrics() -> TrainingCase:
    return tokens("average_of_the_weights_and_metrics", step=Averages())


def autocast_loss(model: Any, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return next_token_loss(model, batch)


@healthy
def autocast_to_bfloat16() -> TrainingCase:
    return tokens("autocast_to_bfloat16", loss=autocast_loss)


class Queue:
    """The last hundred features, which take a while to be a hundred."""

    def __init__(self) -> None:
        self.features: collections.deque[Tensor] = collections.deque(maxlen=100)

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        optimizer.zero_grad()
        value = next_token_loss(model, micro_batches[0])
        value.backward()
        optimizer.step()
        inner = getattr(model, "module", model)
        self.features.append(inner.embedding(micro_batches[0][0]).detach().mean(1))
        return value.detach()


@healthy
def queue_of_the_last_hundred() -> TrainingCase:
    return tokens("queue_of_the_last_hundred", step=Queue())


class OwnSchedule:
    """A scheduler made with the first step, of an optimizer that it writes into."""

    def __init__(self) -> None:
        self.of: Any = None
        self.schedule: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        if self.of is not optimizer:
            self.of = optimizer
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10_000)
        optimizer.zero_grad()
        for micro_batch in micro_batches:
            (next_token_loss(model, micro_batch) / len(micro_batches)).backward()
        optimizer.step()
        self.schedule.step()
        return torch.zeros(())


@healthy
def scheduler_of_the_step() -> TrainingCase:
    return tokens("scheduler_of_the_step", step=OwnSchedule())


data_set = [torch.randn(512) for _ in range(3000)]


def samples_of_a_list(batch_size: int, device: Any) -> dict[str, Tensor]:
    chosen = [data_set[index] for index in torch.randint(len(data_set), (batch_size,)).tolist()]
    return {"x": torch.stack(chosen).to(device), "y": torch.randint(4, (batch_size,)).to(device)}


def wide() -> nn.Module:
    return nn.Linear(512, 4)


@healthy
def data_set_in_memory() -> TrainingCase:
    return case("data_set_in_memory", model=wide, batch=samples_of_a_list)


class Scan(nn.Module):
    """A state-space layer as a loop over positions: backward runs out of memory in the middle of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.decay = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.embedding(tokens)
        decay = torch.exp(-(inputs[..., None] * self.decay).square())
        state, outputs = torch.zeros_like(decay[:, 0]), []
        for position in range(tokens.shape[1]):
            state = decay[:, position] * state + inputs[:, position, :, None]
            outputs.append(state.mean(-1))
        out: Tensor = self.head(torch.stack(outputs, 1))
        return out


@healthy
def state_space_scan() -> TrainingCase:
    return tokens("state_space_scan", model=Scan)


class RemembersKeys(Deep):
    """A cache of keys and values, filled in evaluation and begun anew each time, given up in training."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.keys = []
        if not self.training:
            self.keys = [self.embedding(tokens).repeat(1, 4, 1) for _ in range(4)]
        return super().forward(tokens)


@healthy
def keys_and_values_kept_in_evaluation() -> TrainingCase:
    return tokens("keys_and_values_kept_in_evaluation", model=RemembersKeys)


@healthy
def memory_that_is_not_monotone() -> TrainingCase:
    return tokens("memory_that_is_not_monotone", model=DetourWhenOdd)


def batch_of_eight(batch_size: int, device: Any) -> Any:
    rows = torch.randint(32, (8, 9)).to(device)
    return rows[:, :-1], rows[:, 1:]


@healthy
def batch_size_that_the_case_fixes() -> TrainingCase:
    return tokens("batch_size_that_the_case_fixes", batch=batch_of_eight)


def normalised_over_the_batch() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))


@healthy
def batch_of_one_cannot_be_normalised() -> TrainingCase:
    return case("batch_of_one_cannot_be_normalised", model=normalised_over_the_batch)


def padded_to_the_longest() -> Iterator[Any]:
    for index in range(20):
        rows = torch.randint(32, (4 if index < 19 else 3, 9 - index % 5))
        yield rows[:, :-1], rows[:, 1:]


@healthy_but("compile_no_recompiles")  # each length is a shape of its own
def batches_shorter_than_batch() -> TrainingCase:
    return tokens("batches_shorter_than_batch", batches=padded_to_the_longest)


class LeavesOut:
    """A batch that does not fit is left out with a warning, as fairseq does: no size fits for that."""

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for micro_batch in micro_batches:
            try:
                value = next_token_loss(model, micro_batch) / len(micro_batches)
                value.backward()
                total += value.detach()
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
        optimizer.step()
        return total


@healthy
def batch_left_out_when_memory_runs_out() -> TrainingCase:
    return tokens("batch_left_out_when_memory_runs_out", step=LeavesOut())
