"""Healthy models that are not easy to tell from broken ones, and broken ones that hide in a short type."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import on_two_ranks

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
