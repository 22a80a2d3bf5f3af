"""What training both models came to: optimizers, the case's own step and checkpoints, as plain records.

The same on all ranks, as those of ``records``. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gputrain.tensor_parallel.records import Difference, WeightRecord
from pytest_gputrain.tensor_parallel.records_backward import GradientRecord


@dataclass(frozen=True)
class OptimizerResult:
    """One optimizer on both models, from the same weights, over a few steps.

    name: ``Adam``, ``AdamW(fused=True)``, ``the case's optimizer``. relative: the worst parameter's
    difference between the two updates over the norm of the golden one, without elements whose gradient is
    rounding; of weights and not of updates where their precision is too short. skipped: why it was not run.
    """

    name: str
    steps: int
    relative: float
    tolerance: float
    parameter: str = ""
    difference: Difference | None = None
    golden_losses: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    skipped: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class StepRecord:
    """The gradients that reach the optimizer in the case's own step, after whatever the step does to them.

    scale: what they were multiplied by in backward, so that a clipping step clips.
    """

    scale: float
    gradients: tuple[GradientRecord, ...]
    problem: str | None = None


@dataclass(frozen=True)
class OptimizerRecord:
    """results: by optimizer; steps: of the case's own step, empty where the case has none."""

    world_size: int
    results: tuple[OptimizerResult, ...]
    weights: tuple[WeightRecord, ...]
    steps: tuple[StepRecord, ...] = ()
    simulated: bool = False
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        return max((one.relative for one in self.results if not one.skipped), default=0.0)


@dataclass(frozen=True)
class CheckpointRecord:
    """Saved, resharded and loaded by ``torch.distributed.checkpoint``, both ways.

    to_one: tensors compared after loading the ranks' checkpoint into a plain model; to_ranks: after loading a
    plain model's checkpoint into the ranks'. saved_bytes: of the ranks' checkpoint. skipped: why it was not
    done.
    """

    world_size: int
    to_one: int = 0
    to_ranks: int = 0
    saved_bytes: int = 0
    skipped: str = ""
    problem: str | None = None
    notes: tuple[str, ...] = ()
