"""Healthy models that are not easy to tell from broken ones, and broken ones that hide in a short type."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from pytest_gputrain import LaunchError, launch
from tests.planted.tp_megatron import SequenceParallel
from tests.planted.tp_model import tp_case
from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import body, on_two_ranks

HEALTHY: dict[str, dict[str, Any]] = {
    "float64": {"model": models.in_float64},
    "bfloat16": {"model": models.in_bfloat16},
    "frozen": {"model": models.partly_frozen},
    "renamed": {"parallelize": models.renamed},
    "fused": {"parallelize": models.fused},
    "summing": {"parallelize": models.sequence_parallel, "step": models.summing_step},
}


@pytest.mark.parametrize("name", HEALTHY)
def test_gradients_of_healthy_models_agree(name: str) -> None:
    fields = dict(HEALTHY[name])
    record = on_two_ranks("compare_backward", fields.pop("parallelize", models.by_hand), **fields)
    assert record.problem is None
    assert record.not_compared == ()
    assert len(record.gradients) == 36 + (name != "frozen")
    assert record.worst < {"float64": 1e-10, "bfloat16": 0.1}.get(name, 1e-5)


def test_a_step_that_sums_what_backward_left_is_told_from_one_that_forgets() -> None:
    record = on_two_ranks("compare_backward", models.sequence_parallel)
    assert record.first_layer == "blocks.1.mlp_norm"
    assert record.first_cause == "gradient is not summed over the 2 ranks"
    healthy = on_two_ranks("compare_optimizers", models.sequence_parallel, step=models.summing_step)
    assert healthy.problem is None


def test_lengths_that_do_not_divide_are_left_out_where_the_sequence_is_cut() -> None:
    record = on_two_ranks("compare_forward", models.sequence_parallel)
    assert record.problem is None
    assert [one.input_shape for one in record.inputs] == [(2, 10), (1, 20)]
    assert record.notes == (
        "the sequence is cut over the ranks: inputs of (1, 5), (4, 15), whose length does not divide by 2, "
        "were left out",
    )


def test_bfloat16_hides_no_missing_reduction() -> None:
    broken = partial(models.by_hand, up={"copy": False})
    record = on_two_ranks("compare_backward", broken, model=models.in_bfloat16)
    assert "blocks.1.mlp_norm.weight.grad is off by 75 %" in record.problem
    assert record.first_layer == "blocks.1.mlp.up"


def on_one_rank(which: int, model: Any, mesh: Any) -> Any:
    """One block has its norm on one rank only: the other one computes with a constant of the same values."""
    norm = models.by_hand(model, mesh).blocks[1].mlp_norm
    if mesh.get_local_rank() != which:
        for name, parameter in list(norm.named_parameters(recurse=False)):
            delattr(norm, name)
            norm.register_buffer(name, parameter.detach().clone())
    return model


@pytest.mark.parametrize("which", [0, 1])
def test_a_parameter_may_be_on_some_ranks_only(which: int) -> None:
    record = on_two_ranks("compare_backward", partial(on_one_rank, which))
    assert record.problem is None
    assert len(record.gradients) == 37
    (weight,) = [one for one in record.weights if one.name == "blocks.1.mlp_norm.weight"]
    assert weight.kind == "sharded"


def backwards(model: Any, mesh: Any) -> Any:
    """One rank has its modules in another order."""
    model = models.by_hand(model, mesh)
    if mesh.get_local_rank():
        model.embedding, embedding = None, model.embedding
        del model.embedding
        model.embedding = embedding
    return model


def test_ranks_with_modules_in_another_order_are_refused_in_one_line() -> None:
    with pytest.raises(LaunchError, match="rank 1 has its parameters in another order than rank 0: "):
        on_two_ranks("compare_backward", backwards)


def wrong_norm(model: Any, mesh: Any) -> Any:
    """Between attention and MLP each rank has a part of the sequence; one block's norm is wrong there."""
    model = SequenceParallel(mesh)(model)
    model.blocks[1].norm1.register_forward_hook(lambda module, args, output: 1.1 * output)
    return model


def test_a_layer_that_sees_a_part_of_the_sequence_is_named() -> None:
    case = partial(tp_case, "wrong_norm", wrong_norm)
    records = launch(body, "compare_forward", case, {}, world_size=2, timeout=120).values
    assert [record.first_layer for record in records] == ["blocks.1.norm1"] * 2
