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
from tests.planted.plant import WIDTH, case, healthy

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


@healthy
def batches_shorter_than_batch() -> TrainingCase:
    return tokens("batches_shorter_than_batch", batches=padded_to_the_longest)
