"""Weights after optimizer steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F

from tests.tensor_parallel import families, models
from tests.tensor_parallel.ranks import on_two_ranks, problem_on_two_ranks


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
    assert record.problem.endswith("parameters are off, first in embedding")


@pytest.mark.parametrize("activation", [F.gelu, F.relu])
def test_an_update_that_is_two_per_cent_off_is_never_taken_for_rounding(activation: Any) -> None:
    broken = models.one_gradient_too_large
    model = partial(models.with_activation, activation)
    problem = problem_on_two_ranks("compare_optimizers", broken, {"names": ["SGD"]}, model=model)
    assert problem.startswith("after 3 steps of SGD ")


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallelize", "fields"),
    [
        (partial(models.late, GATE, 0.9), {}),
        (partial(models.late, GATE, 1.02), {}),
        (partial(models.late, GATE, 1.0), {"optimizer": models.decay_on_one_rank}),
        (partial(models.late, GATE, 1.0), {"optimizer": models.forgets_the_past}),
    ],
    ids=["late, a tenth", "late, a fiftieth", "decay on one rank", "moments"],
)
def test_updates_of_a_llama_that_are_a_little_wrong(parallelize: Any, fields: dict[str, Any]) -> None:
    name = "the case's optimizer" if fields else "SGD"
    given = {"model": families.llama, "loss": models.loss_of_hf, **fields}
    problem = problem_on_two_ranks("compare_optimizers", parallelize, {"names": [name]}, **given)
    assert problem and problem.startswith(f"after 3 steps of {name} model.")


def test_a_gradient_that_is_wrong_for_one_sample_only_is_seen_by_two_shapes_and_by_steps() -> None:
    broken = models.careless_with_one_sample
    problem = on_two_ranks("compare_backward", broken).problem
    assert problem.startswith("for an input of (1, 5), unlike the first one: ")
    problem = problem_on_two_ranks("compare_optimizers", broken, {"names": ["SGD", "Adam"]})
    assert problem.startswith("after 3 steps of ")


def test_steps_see_a_nan_that_one_batch_does_not_make() -> None:
    broken = models.not_a_number_later
    problem = problem_on_two_ranks("compare_optimizers", broken, {"names": ["SGD", "Adam"]})
    assert problem.startswith("after 3 steps of ")


def in_half_precision() -> Any:
    return models.Transformer().half()


def test_float16_takes_steps_of_sgd_alone() -> None:
    record = on_two_ranks("compare_optimizers", models.by_hand, model=in_half_precision)
    assert record.problem is None
    assert "SGD" in {result.name for result in record.results if not result.skipped}
    assert {result.skipped for result in record.results if result.name.startswith("Adam")} == {
        "not here: float16 has no room for the squares of gradients; keep weights in float32"
    }


def test_ranks_that_draw_different_batches_are_told_so() -> None:
    drawn = models.drawn_by_rank
    problem = problem_on_two_ranks("compare_optimizers", models.by_hand, {"names": ["SGD"]}, batch=drawn)
    assert problem == (
        "rank 1 draws other batches than rank 0 under one seed; the ranks of a tensor-parallel group work on "
        "one batch: do not draw by rank, or broadcast rank 0's"
    )


def test_an_unknown_optimizer_is_refused() -> None:
    from pytest_gputrain.tensor_parallel.golden_model import ComparisonError
    from pytest_gputrain.tensor_parallel.golden_optimizers import compare_optimizers

    with pytest.raises(ComparisonError) as caught:
        compare_optimizers(models.case(models.by_hand), None, ["Sophia"])
    assert str(caught.value) == (
        "optimizer 'Sophia' is not known; give names of torch.optim, such as SGD, Adam, RMSprop, AdamW, "
        "AdamW(foreach=True), AdamW(fused=True)"
    )
