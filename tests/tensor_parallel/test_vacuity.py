"""Is anything parallel, and does it stay equal where it is replicated?"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import on_ranks, on_two_ranks


@pytest.mark.parametrize("parallelize", [models.by_plan, models.by_hand], ids=["plan", "hand"])
def test_nothing_is_found_on_a_healthy_model(parallelize: Any) -> None:
    findings = on_two_ranks("vacuity", parallelize)
    assert [finding for finding in findings if finding.fails] == []


PLANTED = {
    "not_parallel": models.not_parallel,
    "unused": models.whole_in_disguise,
    "dropout_differs": models.seeded_by_rank,
    "gradients_differ": partial(models.by_hand, up={"copy": False}),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_what_makes_a_comparison_worthless_is_found(kind: str) -> None:
    findings = on_two_ranks("vacuity", PLANTED[kind])
    assert kind in {finding.kind for finding in findings if finding.fails}, findings


def test_tied_weights_that_drift_apart_are_named() -> None:
    findings = on_two_ranks("vacuity", models.by_hand, model=partial(models.Transformer, tied=True))
    assert [str(finding) for finding in findings if finding.fails] == [
        "embedding.weight and head.weight are one parameter before parallelize and two after it, "
        "which differ after 2 steps: tie them again"
    ]


def test_clipping_by_each_ranks_own_norm_is_found() -> None:
    findings = on_two_ranks("vacuity", models.by_hand, step=models.clipping_step)
    message = next(finding.message for finding in findings if finding.kind == "clipping")
    first, count = message.splitlines()
    assert first.startswith(
        "in the case's step gradients that are large enough to be clipped reach the optimizer wrong: almost "
        "all are the right ones times "
    )
    assert first.endswith(
        " on rank 1; likely each rank clips by the norm of its own part: use torch's clip_grad_norm_ "
        "over DTensors, or sum the squared norms over the tensor-parallel ranks, replicated parameters "
        "counted once"
    )
    assert count.startswith("  35 of 37 gradients are wrong; embedding.weight.grad is off by ")


def test_accounts() -> None:
    accounts = on_two_ranks("account", models.by_plan)
    assert accounts.problem is None
    assert accounts.whole.total == 7936
    assert accounts.sharded.local == (3440, 3440)
    assert accounts.sharded.total == 2 * 3440
    assert accounts.overhead == pytest.approx((2 * 4496 - 7936) / 7936)
    layers = {layer.name: layer for layer in accounts.layers}
    assert layers["blocks.0"].imbalance == 0.0
    assert layers["norm"].overhead == 1.0
    assert all(need <= alive for need, alive in zip([4 * 4496] * 2, accounts.measured_bytes, strict=True))


def test_accounts_of_what_is_not_parallel() -> None:
    accounts = on_two_ranks("account", models.not_parallel)
    assert accounts.problem == (
        "nothing is sharded: each of the 2 ranks holds all 7,936 elements of all 37 parameters"
    )


def unused(case: Any, mesh: Any) -> list[Any]:
    """In each rank."""
    from pytest_gputrain.tensor_parallel.golden_pair import Pair
    from pytest_gputrain.tensor_parallel.golden_perturb import unused_shards

    pair = Pair(case, mesh)
    batch = pair.reference_batch()
    pair.parallelize()
    return unused_shards(pair, batch)


@pytest.mark.slow
def test_a_mesh_of_its_own_with_data_parallel_ranks_uses_its_shards() -> None:
    assert on_ranks(4, unused, partial(models.on_two_dimensions, models.by_plan, "average")) == []
