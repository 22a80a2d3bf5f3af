"""Weights after optimizer steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import on_two_ranks


@pytest.mark.parametrize("parallelize", [models.by_plan, models.by_hand], ids=["plan", "hand"])
def test_healthy_models_take_the_references_steps(parallelize: Any) -> None:
    record = on_two_ranks("compare_optimizers", parallelize)
    assert record.problem is None
    assert {result.name for result in record.results if not result.skipped} >= {"SGD", "Adam", "RMSprop"}
    assert record.worst < 1e-3


def test_a_wrong_gradient_is_seen_in_what_it_does_to_weights() -> None:
    broken = partial(models.by_hand, up={"copy": False})
    record = on_two_ranks("compare_optimizers", broken, {"names": ["SGD"]})
    assert record.problem.startswith("after 3 steps of SGD blocks.")


def test_an_unknown_optimizer_is_refused() -> None:
    from pytest_gputrain.tensor_parallel.golden_model import ComparisonError
    from pytest_gputrain.tensor_parallel.golden_optimizers import compare_optimizers

    with pytest.raises(ComparisonError) as caught:
        compare_optimizers(models.case(models.by_hand), None, ["Sophia"])
    assert str(caught.value) == (
        "optimizer 'Sophia' is not known; give names of torch.optim, such as SGD, Adam, RMSprop, AdamW, "
        "AdamW(foreach=True), AdamW(fused=True)"
    )
