"""Healthy ways to accumulate with autocast in the step, around a loss that knows nothing of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_accumulation import accumulate
from tests.planted.plant import case, healthy, loss


def in_bfloat16(model: Any, batch: Any) -> Tensor:
    with torch.autocast(batch["x"].device.type, torch.bfloat16):
        return loss(model, batch)


def autocast_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = accumulate(model, micro_batches, 1.0 / len(micro_batches), in_bfloat16)
    optimizer.step()
    return total


@healthy
def autocast_in_the_step() -> TrainingCase:
    return case("autocast_in_the_step", step=autocast_step)


class ScaledHalf:
    """float16 autocast and the loss scaler that it needs; clips what has been unscaled."""

    def __init__(self) -> None:
        self.scaler: Any = None

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> float:
        self.scaler = self.scaler or torch.amp.GradScaler("cpu", init_scale=65536.0)
        optimizer.zero_grad()
        total = 0.0
        for index, batch in enumerate(micro_batches):
            with nullcontext() if index == len(micro_batches) - 1 else model.no_sync():
                with torch.autocast(batch["x"].device.type, torch.float16):
                    value = loss(model, batch) / len(micro_batches)
                self.scaler.scale(value).backward()
            total += value.item()
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()
        return total


@healthy
def half_autocast_and_scaler_in_the_step() -> TrainingCase:
    return case("half_autocast_and_scaler_in_the_step", step=ScaledHalf())
