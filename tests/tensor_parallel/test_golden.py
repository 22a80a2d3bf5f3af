"""The golden comparison on models made parallel by torch's plans and by hand, healthy and not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pytest_gputrain import launch
from tests.tensor_parallel import models


def compare(which: str, case: Callable[[], Any]) -> Any:
    """On a rank: ``forward`` or ``backward``."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from pytest_gputrain.tensor_parallel.golden_backward import compare_backward
    from pytest_gputrain.tensor_parallel.golden_forward import compare_forward

    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return (compare_forward if which == "forward" else compare_backward)(case(), mesh)


def on_two_ranks(which: str, parallelize: Any, **fields: Any) -> Any:
    result = launch(compare, which, partial(models.case, parallelize, **fields), world_size=2, timeout=120)
    assert result.values[0] == result.values[1]
    return result.values[0]


@pytest.mark.parametrize("parallelize", [models.by_plan, models.by_hand], ids=["plan", "hand"])
def test_a_healthy_model_agrees(parallelize: Any) -> None:
    record = on_two_ranks("backward", parallelize)
    assert record.problem is None
    assert len(record.gradients) == len(record.weights) == 37
    assert record.worst < 1e-5
    assert record.not_compared == ()
    kinds = {weight.name: weight.kind for weight in record.weights}
    assert kinds["blocks.0.mlp.up.weight"] == kinds["blocks.0.mlp.down.weight"] == "sharded"
    assert kinds["norm.weight"] == "replicated"


def test_several_input_shapes_are_compared() -> None:
    record = on_two_ranks("forward", models.by_hand)
    assert record.problem is None
    assert [one.input_shape for one in record.inputs] == [(1, 5), (2, 10), (4, 15), (1, 20)]
    assert record.worst < 1e-5
    assert record.worst_loss < 1e-5


def test_a_missing_backward_reduction_is_seen_in_backward_only() -> None:
    broken = partial(models.by_hand, up={"copy": False})
    assert on_two_ranks("forward", broken).problem is None
    record = on_two_ranks("backward", broken)
    first, second, third = record.problem.splitlines()
    assert first.startswith("logits agree (")
    assert "but blocks.1.mlp_norm.weight.grad is off by 75 % (28 of 37 gradients are wrong)" in first
    assert second == (
        "  first layer to depart, going backward: blocks.1.mlp.up "
        "(input gradient is not summed over the 2 ranks)"
    )
    assert third.startswith("  Largest absolute diff at (13,): Golden=")


def test_a_bias_added_on_every_rank_is_seen_although_it_starts_at_zero() -> None:
    record = on_two_ranks("forward", partial(models.by_hand, down={"bias_everywhere": True}))
    assert record.problem.startswith("logits for an input of (1, 5) are off by ")
    assert ". Largest absolute diff at (0, 0, " in record.problem
