"""What torch's CPU allocator really hands out while a case trains: the measure of predictions.

The profiler reports every allocation and release of the allocator, kernels' own temporaries included, so
this knows nothing of tensors, categories or predictions. Memory that libraries take past torch's allocator
(oneDNN's scratchpads, BLAS buffers) is not in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pytest_gputrain.case import TrainingCase

STEPS = 2


def measured_peak(case: TrainingCase, batch_size: int, *, checkpointing: bool = False) -> int:
    """Peak in bytes over building the model and two steps, for real, on the CPU, with one seed."""
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        _train(case, batch_size, checkpointing)
    events = [event for event in _events(profiler) if event.name() == "[memory]"]
    in_use = peak = 0
    for event in sorted(events, key=lambda one: int(one.start_ns())):
        in_use += event.nbytes()
        peak = max(peak, in_use)
    return peak


def _train(case: TrainingCase, batch_size: int, checkpointing: bool) -> None:
    model = case.model().train()
    if checkpointing:
        assert callable(case.set_checkpointing)
        case.set_checkpointing(model, None)
    optimizer = case.optimizer(model)
    for _ in range(STEPS):
        case.step(model, optimizer, [case.batch(batch_size, torch.device("cpu"))])


def _events(profiler: Any) -> Any:
    return profiler.profiler.kineto_results.events()
