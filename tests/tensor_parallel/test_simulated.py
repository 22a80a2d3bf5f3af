"""Eight ranks in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from pytest_gputrain import launch
from tests.tensor_parallel import models


def eight(parallelize: Any) -> Any:
    """On one rank of its own: the simulation must leave that rank's group as it was."""
    import torch
    import torch.distributed as dist

    from pytest_gputrain.tensor_parallel.golden_backward import compare_backward
    from pytest_gputrain.tensor_parallel.golden_forward import compare_forward
    from pytest_gputrain.tensor_parallel.simulated import simulated, simulated_world

    torch.set_num_threads(1)
    models.HEADS = 8
    case = models.case(parallelize)
    with simulated(8) as mesh:
        forward = compare_forward(case, mesh, [(2, 10)])
    with simulated(8) as mesh:  # again: nothing may be left of the first
        backward = compare_backward(case, mesh)
    assert simulated_world() is None
    assert dist.get_world_size() == 1
    dist.all_reduce(torch.ones(1))
    return forward, backward


def test_eight_ranks_agree_with_the_reference() -> None:
    forward, backward = launch(eight, models.by_plan, world_size=1, timeout=120).values[0]
    assert forward.problem is None and backward.problem is None
    assert forward.simulated and backward.simulated
    assert forward.world_size == backward.world_size == 8
    up = next(record for record in backward.weights if record.name == "blocks.0.mlp.up.weight")
    assert up.local_shapes == ((8, 16),) * 8
    assert backward.worst < 1e-5


def refused(parallelize: Any) -> str:
    from pytest_gputrain.tensor_parallel.golden_forward import compare_forward
    from pytest_gputrain.tensor_parallel.simulated import SimulationError, simulated

    with simulated(4) as mesh, pytest.raises(SimulationError) as caught:
        compare_forward(models.case(parallelize), mesh)
    return str(caught.value)


def test_a_model_that_asks_for_its_rank_is_refused_with_the_line() -> None:
    message = launch(refused, partial(models.by_hand), world_size=1, timeout=120).values[0]
    assert message.startswith("the model's code asks for its rank (")
    assert "models.py:" in message
    assert message.endswith(
        "), which simulated ranks, being one process, do not have; use real ranks, or DTensor plans"
    )
