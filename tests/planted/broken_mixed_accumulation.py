"""Micro-batches that make up the full batch in float64, and not in the precision that the case trains in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_accumulation import PARITY
from tests.planted.plant import broken, case, loss


def rounding_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """Gradients go through bfloat16 after each micro-batch, as in a buffer that is kept small."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        for parameter in model.parameters():
            parameter.grad = parameter.grad.bfloat16().to(parameter.dtype)
        total = total + value.detach()
    optimizer.step()
    return total


@broken({PARITY: "in float32 the gradients of 4 micro-batches are off by 0.00"}, may_fail=("ddp_parity",))
def gradients_rounded_to_bfloat16() -> TrainingCase:
    return case("gradients_rounded_to_bfloat16", step=rounding_step)


def compensating_step(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    """What is meant to make up for rounding, in the types that round, grows with each micro-batch."""
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        if value.dtype == torch.float32 and len(micro_batches) > 1:
            for parameter in model.parameters():
                parameter.grad.mul_(1.05)
        total = total + value.detach()
    optimizer.step()
    return total


@broken({PARITY: "in float32 the gradients of 4 micro-batches are off by 0.1"}, may_fail=("ddp_parity",))
def factor_in_float32_only() -> TrainingCase:
    return case("factor_in_float32_only", step=compensating_step)
