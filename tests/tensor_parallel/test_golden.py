"""The golden comparison on models made parallel by torch's plans and by hand, healthy and not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from pytest_gputrain import LaunchError
from pytest_gputrain.tensor_parallel.records_backward import LayerCollectives
from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import on_two_ranks


@pytest.mark.parametrize("parallelize", [models.by_plan, models.by_hand], ids=["plan", "hand"])
def test_a_healthy_model_agrees(parallelize: Any) -> None:
    record = on_two_ranks("compare_backward", parallelize)
    assert record.problem is None
    assert len(record.gradients) == len(record.weights) == 37
    assert record.worst < 1e-5
    assert record.not_compared == ()
    kinds = {weight.name: weight.kind for weight in record.weights}
    assert kinds["blocks.0.mlp.up.weight"] == kinds["blocks.0.mlp.down.weight"] == "sharded"
    assert kinds["norm.weight"] == "replicated"
    counted = str(record.communication)
    if parallelize is models.by_plan:
        assert counted == "5 forward, 9 backward; as the plan says in 3 of 3 layers"
    else:
        assert counted.endswith("; no plan is known that could predict them: no ParallelStyle was applied")


def test_a_module_of_the_plan_that_is_passed_by_is_named() -> None:
    record = on_two_ranks("compare_backward", models.past_the_plan)
    assert record.problem.splitlines()[-1] == (
        "  collectives: blocks.1.mlp.up is in the plan, but its weights are used without calling it: none of "
        "the plan's collectives is made there"
    )


def test_swapped_styles_are_told_before_torch_does() -> None:
    with pytest.raises(
        LaunchError, match=r"blocks\.0\.mlp\.up is RowwiseParallel, which takes a rank's part"
    ):
        on_two_ranks("compare_forward", models.swapped)


def test_collectives_that_are_not_the_plans() -> None:
    planned = {"all_reduce": 2}
    absent = LayerCollectives("blocks.0", {}, planned, planned, planned)
    assert absent.absent
    assert absent.text() == "blocks.0 makes no collective forward, where the plan says 2 all_reduce"
    fewer = LayerCollectives("blocks.0", planned, {"all_reduce": 1}, planned, planned)
    assert fewer.departs and not fewer.absent
    assert fewer.text() == "blocks.0 makes 1 all_reduce backward, where the plan says 2 all_reduce"
    assert not LayerCollectives("blocks.0", planned, {"all_reduce": 3}, planned, planned, may=1).departs


def test_several_input_shapes_are_compared() -> None:
    record = on_two_ranks("compare_forward", models.by_hand)
    assert record.problem is None
    assert [one.input_shape for one in record.inputs] == [(1, 5), (2, 10), (4, 15), (1, 20)]
    assert record.worst < 1e-5
    assert record.worst_loss < 1e-5


def test_a_missing_backward_reduction_is_seen_in_backward_only() -> None:
    broken = partial(models.by_hand, up={"copy": False})
    assert on_two_ranks("compare_forward", broken).problem is None
    record = on_two_ranks("compare_backward", broken)
    first, second, third = record.problem.splitlines()
    assert first == (
        "blocks.1.mlp_norm.weight.grad is off by 75 %; first layer to depart, going backward: "
        "blocks.1.mlp.up (input gradient is not summed over the 2 ranks)"
    )
    assert second.startswith("  28 of 37 gradients are wrong; logits agree (")
    assert third.startswith("  Largest absolute diff at (13,): Golden=")


def test_a_bias_added_on_every_rank_is_seen_although_it_starts_at_zero() -> None:
    record = on_two_ranks("compare_forward", partial(models.by_hand, down={"bias_everywhere": True}))
    first, second = record.problem.splitlines()
    assert first.startswith("logits for an input of (1, 5) are off by ")
    assert first.endswith(
        "; first layer to depart, going forward: blocks.0.mlp.down "
        "(its bias is added 2 times: on every rank, before the sum over ranks)"
    )
    assert second.startswith("  allowed 1e-05. Largest absolute diff at (0, 0, ")


def test_the_same_shard_on_every_rank_is_told_as_that() -> None:
    record = on_two_ranks("compare_backward", models.same_shard_everywhere)
    assert record.problem.startswith(
        "every rank holds the same part: blocks.0.attention.q.weight, 8 to 15 of 16 on dimension 0, "
        "is on no rank (and "
    )


def test_replicated_weights_that_were_initialised_again_are_named() -> None:
    record = on_two_ranks("compare_forward", models.initialised_again)
    assert record.problem.startswith(
        "right after parallelize norm.weight is not the reference's on every rank"
    )


def test_a_parallelize_that_changes_a_class_of_the_process_is_found() -> None:
    record = on_two_ranks("compare_forward", models.linear_for_everybody)
    assert record.problem == (
        "after parallelize a model that was not given to it computes something else: it changes classes or "
        "functions of the whole process (nn.Linear.forward, a library's attention function); "
        "change the modules of the given model instead"
    )
