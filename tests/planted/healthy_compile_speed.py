"""Loops that measure their speed rightly, each in a manner of its own."""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch

from pytest_gputrain.case import TrainingCase
from tests.planted.broken_compile_speed import WARM_UP, reader, said
from tests.planted.plant import healthy_by


def synchronised(train_step: Any, batches: Any) -> dict[str, float]:
    """Synchronised around all steps; counts what counts in the loss."""
    for batch in batches[:WARM_UP]:
        train_step(batch)
    torch.accelerator.synchronize()
    began, tokens = time.perf_counter(), 0
    for batch in batches[WARM_UP:]:
        train_step(batch)
        tokens += int((batch["labels"] != -100).sum())
    torch.accelerator.synchronize()
    return said(time.perf_counter() - began, len(batches) - WARM_UP, tokens)


@healthy_by(synchronised)
def timed_synchronised() -> TrainingCase:
    return reader("timed_synchronised")


def by_step(train_step: Any, batches: Any, evaluate: Any, device: Any) -> SimpleNamespace:
    """The median of single steps, evaluation in between; waits on a GPU only."""
    seconds = []
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        train_step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if step % 6 == 5:
            evaluate()
    return SimpleNamespace(seconds_per_step=statistics.median(seconds[WARM_UP:]))


@healthy_by(by_step)
def timed_by_step() -> TrainingCase:
    return reader("timed_by_step")


def logging_the_loss(train_step: Any, batches: Any) -> dict[str, float]:
    """Prints nothing, but reads each loss, which waits; tokens a second only, padding included."""
    seconds = 0.0
    for step, batch in enumerate(batches):
        began = time.perf_counter()
        f"{train_step(batch):.3f}"
        seconds += (time.perf_counter() - began) * (step >= WARM_UP)
    steps = len(batches) - WARM_UP
    return {"tokens_per_second": steps * batches[0]["labels"].numel() / seconds}


@healthy_by(logging_the_loss)
def timed_by_reading_the_loss() -> TrainingCase:
    return reader("timed_by_reading_the_loss")
