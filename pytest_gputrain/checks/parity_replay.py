"""One rank's steps once more, in one process without any data-parallel code.

Before each step the weights and buffers are set to what the rank had, so errors do not add up and each step
is judged by itself. Every replay has a process of its own: what a step keeps in Python then is what the
rank's step kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks.context import CheckContext
from pytest_gputrain.checks.parity_rank import as_rank, same_random_states
from pytest_gputrain.trace.names import named_buffers
from pytest_gputrain.trace.steps import AFTER_BACKWARD, AT_STEP, StepRecord, StepRecorder

Tensors = dict[str, Any]


@dataclass
class Replay:
    """What is kept of one rank's replay beside its gradients, which are in files.

    backwards_before: by step, how many backward passes preceded each parameter's update.
    processed: parameters whose gradient the step itself changes between backward and the optimizer.
    """

    backwards_before: list[dict[str, int]] = field(default_factory=list)
    processed: set[str] = field(default_factory=set)


def replay_rank(
    case: TrainingCase,
    ctx: CheckContext,
    folder: Path,
    rank: int,
    packed: list[bytes],
    label: str,
    numbered: bool = False,
) -> Replay:
    """Leaves ``<label>-<step>.pt`` in ``folder``: gradients by moment, by parameter.

    numbered: tell the step that it is on its rank; else it is on rank 0 of 1.
    """
    with as_rank(rank) if numbered else contextlib.nullcontext():
        return _replay(Replica(case, ctx, folder), rank, packed, label)


def _replay(replica: Replica, rank: int, packed: list[bytes], label: str) -> Replay:
    kept, folder = Replay(), replica.folder
    for step, data in enumerate(packed):
        record = replica.take(step, rank, replica.unpacked(data))
        kept.backwards_before.append(record.backwards_before)
        kept.processed |= processed(record)
        write(folder / f"{label}-{step}.pt", record.gradients)
    return kept


class Replica:
    """A bare model and its optimizer, taking recorded steps from recorded weights."""

    def __init__(self, case: TrainingCase, ctx: CheckContext, folder: Path) -> None:
        from pytest_gputrain.checks.session import build_alone, device_of, trained_parameters

        self.case, self.ctx, self.folder = case, ctx, folder
        self.device = device_of(ctx)
        self.model = build_alone(case, ctx)
        self.optimizer = case.optimizer(self.model)
        self.parameters = trained_parameters(self.model, self.model, self.optimizer)

    def unpacked(self, data: bytes) -> list[Any]:
        """Micro-batches as a rank sent them, on this process's device."""
        import cloudpickle

        batches: list[Any] = pytree.to_device(cloudpickle.loads(data), self.device)
        return batches

    def take(
        self,
        step: int,
        rank: int,
        micro_batches: list[Any],
        after_backward: Callable[[StepRecord], None] | None = None,
    ) -> StepRecord:
        from pytest_gputrain.checks.session import seed_for, take_step

        self.load(f"parameters-{step}")
        copy_into(read(self.folder / f"buffers-{step}-{rank}.pt", self.device), named_buffers(self.model))

        def after_update(record: StepRecord) -> None:
            # What follows in this step (a second optimizer's loss) has to see the ranks' update, not ours.
            if (self.folder / f"update-{record.optimizer_steps - 1}-{step}.pt").exists():
                self.load(f"update-{record.optimizer_steps - 1}-{step}")

        recorder = StepRecorder(
            self.parameters, self.optimizer, after_backward=after_backward, after_update=after_update
        )
        states = read(self.folder / f"random-{step}-{rank}.pt", "cpu")
        with recorder.step() as record, same_random_states(self.model, states):
            take_step(self.case, self.model, self.optimizer, micro_batches, seed_for(self.ctx, step, rank))
        return record

    def load(self, name: str) -> None:
        copy_into(read(self.folder / f"{name}.pt", self.device), self.parameters)


def copy_into(tensors: Tensors, values: Tensors) -> None:
    """What has the same name and shape on both sides; buffers may have been made or grown in forward."""
    import torch

    with torch.no_grad():
        for name, value in tensors.items():
            if name in values and value is not None and values[name].shape == value.shape:
                values[name].copy_(value)


def read(path: Path, device: Any) -> Any:
    import torch

    return torch.load(path, map_location=device, weights_only=True)


def write(path: Path, tensors: Any) -> None:
    import torch

    torch.save(tensors, path)


def processed(record: StepRecord) -> set[str]:
    """Parameters whose gradient the step changes between backward and the optimizer."""
    before, after = record.gradients[AFTER_BACKWARD], record.gradients[AT_STEP]
    return {name for name, gradient in after.items() if name in before and gradient is not before[name]}
