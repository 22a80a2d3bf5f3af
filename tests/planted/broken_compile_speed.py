"""Loops that measure their speed wrongly: each meter is asked about eager and about compiled training."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain.case import TrainingCase
from tests.planted.plant import WIDTH, broken

SPEED = "compile_speed"
LENGTH, USEFUL, WARM_UP = 16, 10, 5


class Reader(nn.Module):
    """Tokens (batch, length) -> scores of the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(tokens)))
        return out


def documents(batch_size: int, device: Any) -> dict[str, Tensor]:
    """Padded to 16: the last 6 columns do not count."""
    tokens = torch.randint(32, (batch_size, LENGTH + 1))
    targets = tokens[:, 1:].clone()
    targets[:, USEFUL:] = -100
    return {"input_ids": tokens[:, :-1].to(device), "labels": targets.to(device)}


def masked_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def reader(name: str) -> TrainingCase:
    return TrainingCase(name=name, model=Reader, batch=documents, loss=masked_loss)


def said(seconds: float, steps: int, tokens: float) -> dict[str, float]:
    return {"seconds_per_step": seconds / steps, "tokens_per_second": tokens / seconds}


def unsynchronised(train_step: Any, batches: Any) -> dict[str, float]:
    for batch in batches[:WARM_UP]:
        train_step(batch)
    began = time.perf_counter()
    for batch in batches[WARM_UP:]:
        train_step(batch)
    steps = len(batches) - WARM_UP
    return said(time.perf_counter() - began, steps, steps * batches[0]["input_ids"].numel())


@broken({SPEED: "the clock is read without waiting for the device"}, meter=unsynchronised)
def timed_without_synchronisation() -> TrainingCase:
    return reader("timed_without_synchronisation")


def from_the_first_step(train_step: Any, batches: Any) -> dict[str, float]:
    began = time.perf_counter()
    for batch in batches:
        loss = train_step(batch)
    loss.item()
    steps = len(batches)
    return said(time.perf_counter() - began, steps, steps * batches[0]["input_ids"].numel())


@broken({SPEED: "likely: the first steps, which compile, are counted"}, meter=from_the_first_step)
def timed_from_the_first_step() -> TrainingCase:
    return reader("timed_from_the_first_step")


def with_evaluation(train_step: Any, batches: Any, evaluate: Any) -> dict[str, float]:
    for batch in batches[:WARM_UP]:
        train_step(batch).item()
    began = time.perf_counter()
    for step, batch in enumerate(batches[WARM_UP:]):
        train_step(batch).item()
        if step % 6 == 5:
            evaluate()
    steps = len(batches) - WARM_UP
    return {"seconds_per_step": (time.perf_counter() - began) / steps}


@broken({SPEED: "evaluation or saving is counted as training"}, meter=with_evaluation)
def timed_with_evaluation() -> TrainingCase:
    return reader("timed_with_evaluation")


def other_tokens(train_step: Any, batches: Any, compiled: bool) -> dict[str, float]:
    for batch in batches[:WARM_UP]:
        train_step(batch).item()
    began, tokens = time.perf_counter(), 0
    for batch in batches[WARM_UP:]:
        train_step(batch).item()
        tokens += batch["labels"].numel() if compiled else int((batch["labels"] != -100).sum())
    return said(time.perf_counter() - began, len(batches) - WARM_UP, tokens)


@broken(
    {SPEED: "tokens are counted differently: useful ones for eager, padded ones for compiled"},
    meter=other_tokens,
)
def tokens_counted_differently() -> TrainingCase:
    return reader("tokens_counted_differently")


def one_column_short(train_step: Any, batches: Any) -> dict[str, float]:
    for batch in batches[:WARM_UP]:
        train_step(batch).item()
    began, tokens = time.perf_counter(), 0
    for batch in batches[WARM_UP:]:
        train_step(batch).item()
        tokens += batch["input_ids"][:, 1:].numel()
    return said(time.perf_counter() - began, len(batches) - WARM_UP, tokens)


@broken(
    {SPEED: "a step has 40 tokens that count in the loss or 64 tokens in all, but the rate counts 60"},
    meter=one_column_short,
)
def tokens_counted_a_column_short() -> TrainingCase:
    return reader("tokens_counted_a_column_short")
