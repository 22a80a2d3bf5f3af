"""Figures of the default step, and what the accumulation checks remark without failing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain import launch
from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks import CheckResult, run_checks
from tests.planted import healthy_accumulation, healthy_loops
from tests.planted.broken_averages import num_targets, ragged_draw, token_loss
from tests.planted.plant import Net, case, draw, loss


def sum_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


REDUCTIONS = {
    "mean": case("mean"),
    "sum": case("sum", loss=sum_loss, loss_reduction="sum"),
    "token_mean": case(
        "token_mean", batch=ragged_draw, loss=token_loss, loss_reduction="token_mean", num_targets=num_targets
    ),
}


def accumulation(case: TrainingCase, check: str) -> CheckResult:
    (result,) = run_checks(case, checks=[check])
    return result


def worst_error(case: TrainingCase, sizes: list[int]) -> float:
    """On each rank micro-batches of these sizes, against the joined batch of all ranks in one process."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = case.model().double()
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    reference = type(model)().double()
    reference.load_state_dict(model.state_dict())
    every = [
        [pytree.map_tensors(as_double, case.batch(size, torch.device("cpu"))) for size in sizes]
        for _ in range(dist.get_world_size())
    ]
    case.step(wrapped, torch.optim.SGD(model.parameters(), lr=0.0), every[dist.get_rank()])
    case.loss(reference, pytree.join([batch for own in every for batch in own])).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    wanted = [p.grad for p in reference.parameters() if p.grad is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


WINDOWS = {"1": [4], "2": [4, 4], "3": [4] * 3, "4": [4] * 4, "8": [4] * 8, "16": [4] * 16}
RAGGED = {"2 ragged": [4, 1], "3 ragged": [4, 4, 3], "8 ragged": [4] * 7 + [2], "16 ragged": [4] * 15 + [1]}


def all_windows(case: TrainingCase) -> dict[str, float]:
    return {name: worst_error(case, sizes) for name, sizes in {**WINDOWS, **RAGGED}.items()}


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_default_step_is_the_full_batch_on_any_number_of_ranks(reduction: str, world_size: int) -> None:
    for errors in launch(all_windows, REDUCTIONS[reduction], world_size=world_size).values:
        assert len(errors) == 10
        assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_errors_are_reported_beside_their_bounds(reduction: str) -> None:
    result = accumulation(REDUCTIONS[reduction], "accumulation_parity")
    assert (result.outcome, result.message) == ("passed", "")
    figures = result.figures
    assert figures["precision"] == "float64"
    assert figures["micro-batches"] == [1, 2, 3, 4, 8]
    assert figures["worst"] < 1e-12 < figures["tolerance"] == 1e-6
    assert 0 < figures["float32 error"] < figures["float32 bound"] < 1e-4


@pytest.mark.parametrize(
    ("case", "remark"),
    [
        (healthy_accumulation.batchnorm_accumulated(), "BatchNorm normalises each micro-batch by its own"),
        (healthy_accumulation.dropout_warm_up_and_clipping(), "dropout draws another mask for each"),
        (
            healthy_accumulation.experts_with_capacity_and_noise(),
            "the model draws random numbers (router noise",
        ),
        (
            healthy_accumulation.another_loss_in_the_step(),
            "micro-batches of 6, 6, 6, 3 samples count the same",
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_rightly_differs_is_remarked(case: TrainingCase, remark: str) -> None:
    result = accumulation(case, "accumulation_parity")
    assert result.outcome == "passed", str(result)
    assert remark in result.message


def every_one_synchronised(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    total = torch.zeros(())
    for batch in micro_batches:
        value = loss(model, batch) / len(micro_batches)
        value.backward()
        total = total + value.detach()
    optimizer.step()
    return total


def test_missing_no_sync_is_remarked_with_its_cost() -> None:
    result = accumulation(case("no no_sync", step=every_one_synchronised), "accumulation_schedule")
    num_bytes = 4 * sum(parameter.numel() for parameter in Net().parameters())
    assert result.outcome == "passed", str(result)
    assert result.message == (
        "gradients are synchronised 4 times in a window of 4 micro-batches: no_sync() would save 3 of 4 "
        "all-reduces, 27.3 kB a step and rank"
    )
    assert result.figures["all-reduces a step"] == 4
    assert result.figures["bytes saved by no_sync"] == 3 * num_bytes


def test_default_step_reduces_once_a_step() -> None:
    result = accumulation(case("default"), "accumulation_schedule")
    assert (result.outcome, result.message) == ("passed", "")
    assert (result.figures["all-reduces a step"], result.figures["bytes a step"]) == (1, 9104)


@pytest.mark.parametrize("check", ["accumulation_parity", "accumulation_schedule"])
def test_step_that_does_not_accumulate_is_skipped(check: str) -> None:
    result = accumulation(healthy_loops.closure_in_the_optimizer(), check)
    assert (result.outcome, result.message) == (
        "skipped",
        "the step takes the first micro-batch that it is given and never looks for more: it does not "
        "accumulate",
    )


def one_only(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    (batch,) = micro_batches
    return every_one_synchronised(model, optimizer, [batch])


def test_step_that_refuses_more_than_one_is_skipped() -> None:
    result = accumulation(case("one", step=one_only), "accumulation_parity")
    assert result.outcome == "skipped"
    assert result.message.startswith(
        "the step takes one micro-batch and refuses more, so it does not accumulate"
    )


def joins(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    wide = torch.cat([batch["x"] for batch in micro_batches], dim=-1)
    return every_one_synchronised(model, optimizer, [{**micro_batches[0], "x": wide}])


def test_step_that_raises_on_several_fails() -> None:
    result = accumulation(case("joins", step=joins), "accumulation_parity")
    assert result.outcome == "failed"
    assert result.message.startswith("the step raises on 4 micro-batches: RuntimeError: ")


def broken_on_any(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    raise RuntimeError("no data")


def test_step_that_never_works_is_left_to_other_checks() -> None:
    result = accumulation(case("raises", step=broken_on_any), "accumulation_parity")
    assert result.outcome == "skipped"
    assert result.message.startswith("with one micro-batch the step raises RuntimeError: no data")


class Coarse(nn.Module):
    """Rounds its input as it comes to bfloat16: no float64 inside, whatever the parameters are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.bfloat16().to(x.dtype)).bfloat16().to(x.dtype)
        return out


def test_tolerance_follows_the_rounding_of_the_model() -> None:
    result = accumulation(case("coarse", model=Coarse), "accumulation_parity")
    assert result.outcome == "passed", str(result)
    assert result.figures["tolerance"] > 1e-6


def test_batch_that_cannot_be_split_is_skipped() -> None:
    def refuse(batch: Any, parts: int) -> list[Any]:
        raise ValueError("packed")

    result = accumulation(case("packed", split=refuse), "accumulation_parity")
    assert result.outcome == "skipped"
    assert "no window of 4 micro-batches: split raised ValueError: packed" in result.message


def test_a_defect_in_training_mode_is_seen_behind_dropout() -> None:
    """Random masks hide the full batch; the pieces alone and eval mode do not let anything hide."""
    plant = healthy_accumulation.dropout_warm_up_and_clipping()
    result = accumulation(
        dataclasses.replace(plant, name="undivided", step=undivided, batch=draw), "accumulation_parity"
    )
    assert result.outcome == "failed"
    assert result.message.startswith("gradients of 4 micro-batches are 4.000 x those of the full batch")


def undivided(model: Any, optimizer: Any, micro_batches: Any) -> None:
    optimizer.zero_grad()
    for batch in micro_batches:
        loss(model, batch).backward()
    optimizer.step()
