"""Collectives against the plan's: one that was not carried out, and data parallel beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from pytest_gputrain import LaunchError, launch
from tests.tensor_parallel import models
from tests.tensor_parallel.ranks import on_ranks, on_two_ranks

ABSENT = "blocks.1 makes no collective forward, where the plan says 2 all_reduce"


def test_a_plan_that_was_not_carried_out_is_seen_by_its_collectives_though_every_value_is_right() -> None:
    record = on_two_ranks("compare_backward", models.put_back_whole)
    assert record.problem == ABSENT
    assert record.worst < 1e-5


def blind(case: Any, mesh: Any) -> Any:
    """The comparison without what the test above is about."""
    from pytest_gputrain.tensor_parallel import records_backward as records
    from pytest_gputrain.tensor_parallel.golden_backward import compare_backward

    records.LayerCollectives.absent = property(lambda self: False)  # type: ignore[assignment, method-assign]
    return compare_backward(case, mesh)


@pytest.mark.nightly
def test_nothing_else_sees_it() -> None:
    record = on_two_ranks(blind, models.put_back_whole)
    assert record.problem is None
    assert any(ABSENT in note for note in record.notes)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["average", "fsdp"])
def test_data_parallels_collectives_on_the_other_dimension_are_not_the_plans(how: str) -> None:
    healthy = partial(models.on_two_dimensions, models.by_plan, how)
    record = on_ranks(4, "compare_backward", healthy)
    assert record.problem is None
    assert not [note for note in record.notes if note.startswith("collectives: ")]
    counted = str(record.communication)
    assert counted.startswith("5 forward, 9 backward, ") and counted.endswith(
        " in other groups than the plan's; as the plan says in 3 of 3 layers"
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["average", "fsdp"])
def test_data_parallels_collectives_do_not_stand_for_the_plans(how: str) -> None:
    broken = partial(models.on_two_dimensions, models.put_back_whole, how)
    assert on_ranks(4, "compare_backward", broken).problem == ABSENT


def accumulated(model: Any, mesh: Any) -> Any:
    """Sums what has accumulated, and not what came last."""
    import torch.distributed as dist

    model = models.sequence_parallel(model, mesh)
    for name, parameter in model.named_parameters():
        if "mlp_norm." in name:
            parameter.register_post_accumulate_grad_hook(lambda held: dist.all_reduce(held.grad))
    return model


def test_a_gradient_that_does_not_accumulate_is_noted() -> None:
    record = on_two_ranks("compare_backward", accumulated)
    assert record.problem is None
    (note,) = [note for note in record.notes if note.startswith("do not accumulate micro-batches: ")]
    assert (
        "blocks.1.mlp_norm.weight.grad after two backward passes of one batch is 3 times that of one" in note
    )


def hasty(model: Any, mesh: Any) -> Any:
    """Reads a sum forward before it has come."""
    import torch.distributed as dist

    def summed(module: Any, args: Any, output: Any) -> Any:
        total = output.detach().clone()
        dist.all_reduce(total, async_op=True)
        return output + 0 * total

    models.by_hand(model, mesh).blocks[1].mlp.register_forward_hook(summed)
    return model


def test_a_result_that_is_read_before_it_is_waited_for_is_seen_though_every_value_is_right() -> None:
    problem = on_two_ranks("compare_backward", hasty).problem
    assert problem.startswith(
        "blocks.1.mlp: the all_reduce started at tests/tensor_parallel/test_collectives.py"
    )
    assert problem.endswith(" before it is waited for; call wait() on what async_op=True returns")


@pytest.mark.parametrize("as_views", [False, True])
def test_collectives_for_which_ddp_waits_in_its_own_code_are_not_taken_for_early(as_views: bool) -> None:
    def early() -> tuple[int, list[str]]:
        import torch
        from torch.nn.parallel import DistributedDataParallel

        from pytest_gputrain.tensor_parallel.golden_counting import Counting

        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_views)
        counting = Counting(model, [])
        for _ in range(3):
            with counting.pending, counting:
                wrapped(torch.randn(4, 8)).sum().backward()
            counting.pending.left_in(one.grad for one in model.parameters())
        made = counting.made.values()
        return sum(one.backward.total() + one.elsewhere for one in made), counting.pending.early

    for num_collectives, told in launch(early, world_size=2).values:
        assert num_collectives > 0
        assert told == []


def with_entry(name: str, model: Any, mesh: Any) -> Any:
    """A plan of torch's with one more entry."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(models.by_plan(model, mesh), mesh, {name: ColwiseParallel()})


def test_a_name_that_torch_skips_is_a_failure_and_one_of_some_layers_is_not() -> None:
    assert on_two_ranks("account", partial(with_entry, "blocks.*.mlp.upp")).problem == (
        "the plan of parallelize names 'upp', and no module of the model is called so: torch only warns, and "
        "leaves it whole; near: blocks.0.mlp.up"
    )
    assert on_two_ranks("account", partial(with_entry, "blocks.*.attention.up")).problem is None


def test_a_style_that_does_not_fit_names_the_module() -> None:
    wanted = "the plan of parallelize gives 'blocks.1.mlp_norm', a LayerNorm, the style ColwiseParallel: "
    with pytest.raises(LaunchError, match=wanted):
        on_two_ranks("account", partial(with_entry, "blocks.1.mlp_norm"))
