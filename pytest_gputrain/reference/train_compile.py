"""Compiling in the training script: the model once, at one shape, before data parallel wraps it.

torch takes ``DistributedDataParallel`` inside of ``torch.compile``, too. This way round the graph is the one
of a single rank, and gradients are reduced after the compiled backward rather than during it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pytest_gputrain.compile.backend import standing_in, validate_backend
from pytest_gputrain.reference.train_arguments import TrainUsageError
from pytest_gputrain.reference.train_case import ClippedStep
from pytest_gputrain.reference.train_job import Job
from pytest_gputrain.reference.train_length import Length
from pytest_gputrain.reference.train_options import Options

INDUCTOR = "inductor"


@contextmanager
def backend_of(options: Options, device: torch.device) -> Iterator[None]:
    """As long as this lasts, the backend that was asked for compiles in place of inductor.

    Raises TrainUsageError where nothing can be compiled with it here.
    """
    if not options.compile:
        yield
        return
    name = options.compile_backend or INDUCTOR
    try:
        lack = validate_backend(name, device.type)
    except ValueError as error:
        raise TrainUsageError(f"--compile_backend: {error}") from None
    if lack:
        raise TrainUsageError(f"--compile: {lack}")
    with standing_in(name):
        yield


def as_trained(options: Options, job: Job, model: nn.Module) -> nn.Module:
    """The model as its case compiles it; the model itself is what is evaluated and saved."""
    if not options.compile:
        return model
    compiled: nn.Module = job.case.compile(model)
    return compiled


def num_rows(options: Options, job: Job, length: Length) -> int | None:
    """To how many samples a short micro-batch is filled up, so that there is one shape; None: as it is.

    With rows that do not count. What a user's case would make of such rows nobody knows.
    """
    sizes = {*length.plan.micro_batches(), *length.last_plan.micro_batches()}
    if not options.compile or job.config is None or len(sizes) == 1:
        return None
    return length.plan.device_batch_size


def step_for(job: Job, rows: int | None) -> Any:
    """The job's step; where batches are filled up, one that counts tokens: some rows are none."""
    if rows is None:
        return job.step
    assert isinstance(job.step, ClippedStep)
    return replace(job.step, loss_reduction="token_mean")
