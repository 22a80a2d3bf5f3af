"""Weights in float32 that autocast computes with in bfloat16: its rounding is no bug, and hides none."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import on_two_ranks

on_ranks = partial(on_two_ranks, loss=models.loss_under_autocast)


@pytest.mark.parametrize("comparison", ["compare_forward", "compare_backward", "compare_optimizers"])
def test_autocast_is_healthy(comparison: str) -> None:
    record = on_ranks(comparison, models.by_hand)
    assert record.problem is None
    # Else nothing was rounded, and this is a test of nothing.
    if comparison != "compare_forward":
        assert record.worst > 1e-4


@pytest.mark.slow
def test_autocast_is_healthy_with_a_plan() -> None:
    assert on_ranks("compare_backward", models.by_plan).problem is None


@pytest.mark.parametrize(
    ("changes", "layer", "cause"),
    [
        ({"up": {"copy": False}}, "blocks.1.mlp.up", "input gradient is not summed over the 2 ranks"),
        ({"out": {"bias_everywhere": True}}, "blocks.0.attention.out", "its bias is added 2 times"),
    ],
    ids=["backward", "forward"],
)
def test_autocast_hides_no_bug(changes: Any, layer: str, cause: str) -> None:
    record = on_ranks("compare_backward", partial(models.by_hand, **changes))
    assert record.first_layer == layer
    assert record.first_cause.startswith(cause)


def one_norms_gradient_halved(model: Any, mesh: Any) -> Any:
    model = models.by_hand(model, mesh)
    model.blocks[0].mlp_norm.weight.register_hook(lambda gradient: gradient / 2)
    return model


def test_an_update_that_is_half_as_large_is_seen_under_autocast() -> None:
    problem = on_ranks("compare_optimizers", one_norms_gradient_halved, {"names": ("SGD",)}).problem
    assert "after 3 steps of SGD blocks.0.mlp_norm.weight is not where the reference's is" in problem
