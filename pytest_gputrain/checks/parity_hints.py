"""Causes of a wrong gradient that ``ddp_parity`` can test: each is named only where the numbers say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_gputrain.checks.averages import Average, Tensors, distance
from pytest_gputrain.checks.parity_replay import read
from pytest_gputrain.trace.steps import AT_STEP

# A cause that is none leaves tens of percent.
CLOSE = 1e-2


def explain(
    folder: Path, device: Any, step: int, world_size: int, moments: dict[str, str], *, token_mean: bool
) -> str | None:
    """What makes the ranks' gradients of these parameters out of the replays', or None.

    moments: by parameter, the moment whose gradient is wrong.
    """
    actual = read(folder / f"gradients-{step}.pt", device)
    own = [read(folder / f"replay-{rank}-{step}.pt", device) for rank in range(world_size)]
    for rank, gradients in enumerate(own):
        if _equal(actual, gradients, moments):
            return f"rank {rank}'s gradients are used on every rank, and no other's"
    plain = Average([1.0 / world_size] * world_size)
    for gradients in own:
        plain.add(gradients)
    if not _equal(actual, plain.total, moments):
        return None
    if token_mean:
        return (
            "a plain average of each rank's token mean, though ranks have different numbers of targets; "
            "weight by num_targets over all ranks"
        )
    if set(moments.values()) == {AT_STEP}:
        return "each rank clips or scales its own gradients, and they are averaged after that"
    return None


def _equal(actual: dict[str, Tensors], wanted: dict[str, Tensors], moments: dict[str, str]) -> bool:
    return all(
        distance(wanted[moment].get(name), actual[moment].get(name)) < CLOSE
        for name, moment in moments.items()
    )
