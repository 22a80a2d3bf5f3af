"""Figures of the default step, and what the accumulation checks remark without failing."""

from __future__ import annotations

import copy
import dataclasses
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytest_gputrain import launch
from pytest_gputrain.case import TrainingCase, pytree
from pytest_gputrain.checks import CheckResult, run_checks
from pytest_gputrain.checks.accumulation_native import distance, rounding_bound
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


def step_on_ranks(case: TrainingCase, model: nn.Module, sizes: list[int]) -> list[Any]:
    """Leaves the gradients of micro-batches of these sizes on each rank in ``model``; all ranks' batches."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    kind = next(model.parameters()).dtype
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    every = [
        [as_kind(case.batch(size, torch.device("cpu")), kind) for size in sizes]
        for _ in range(dist.get_world_size())
    ]
    case.step(wrapped, torch.optim.SGD(model.parameters(), lr=0.0), every[dist.get_rank()])
    return [batch for own in every for batch in own]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: one.grad for name, one in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def own_gradients(case: TrainingCase, model: nn.Module, batch: Any, kind: torch.dtype) -> dict[str, Tensor]:
    """Of the case's loss, by a copy of the model in this type."""
    copied = copy.deepcopy(model).to(kind)
    copied.zero_grad()
    case.loss(copied, as_kind(batch, kind)).backward()
    return gradients(copied)


def worst_error(case: TrainingCase, sizes: list[int]) -> float:
    """On each rank micro-batches of these sizes, against the joined batch of all ranks in one process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = case.model().double()
    every = step_on_ranks(case, model, sizes)
    wanted = own_gradients(case, model, pytree.join(every), torch.float64)
    found = gradients(model)
    return max(float((found[name] - grad).norm() / grad.norm()) for name, grad in wanted.items())


def single_error_and_bound(case: TrainingCase, sizes: list[int]) -> tuple[float, float]:
    """The same in float32, beside what its distance to float64 allows."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = case.model()
    every = step_on_ranks(case, model, sizes)

    def rounding(batch: Any) -> float:
        return distance(*(own_gradients(case, model, batch, kind) for kind in (torch.float32, torch.float64)))

    full = pytree.join(every)
    error = distance(gradients(model), own_gradients(case, model, full, torch.float32))
    pieces = max(rounding(batch) for batch in every)
    return error, rounding_bound(rounding(full), pieces, len(every), torch.finfo(torch.float32).eps)


def as_kind(batch: Any, kind: torch.dtype) -> Any:
    return pytree.map_tensors(lambda one: one.to(kind) if one.is_floating_point() else one, batch)


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


def all_windows_in_single(cases: dict[str, TrainingCase]) -> dict[str, tuple[float, float]]:
    return {
        f"{reduction}, {name}": single_error_and_bound(case, sizes)
        for reduction, case in cases.items()
        for name, sizes in {**WINDOWS, **RAGGED}.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_default_step_is_the_full_batch_in_float32_within_its_bound(world_size: int) -> None:
    for found in launch(all_windows_in_single, REDUCTIONS, world_size=world_size).values:
        assert len(found) == 30
        wrong = {name: pair for name, pair in found.items() if not pair[0] <= pair[1] < 1e-4}
        assert not wrong
        assert any(error for error, _ in found.values())


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
            "micro-batches of 6, 6, 6, 3 samples count the same; weigh them, or drop a smaller last one",
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


def sum_returned(model: Any, optimizer: Any, micro_batches: Any) -> Tensor:
    optimizer.zero_grad()
    losses = []
    for index, batch in enumerate(micro_batches):
        with nullcontext() if index == len(micro_batches) - 1 else model.no_sync():
            losses.append(loss(model, batch))
            (losses[-1] / len(micro_batches)).backward()
    optimizer.step()
    return torch.stack(losses).detach().sum()


def test_sum_of_losses_is_remarked_once() -> None:
    result = accumulation(case("sum returned", step=sum_returned), "accumulation_schedule")
    assert result.outcome == "passed", str(result)
    found = re.fullmatch(
        r"the step returns (\S+) as its loss, the sum of 4 micro-batches' losses, "
        r"where the window's is (\S+)",
        result.message,
    )
    assert found, result.message
    assert float(found[1]) == pytest.approx(4 * float(found[2]), rel=1e-3)


def nothing_returned(model: Any, optimizer: Any, micro_batches: Any) -> None:
    sum_returned(model, optimizer, micro_batches)


def test_missing_loss_is_remarked_once() -> None:
    result = accumulation(case("nothing returned", step=nothing_returned), "accumulation_schedule")
    assert result.message == "the step returns no loss, so its logging was not judged"


class Counts:
    """As accelerate with a fixed number of accumulation steps, whatever window it gets."""

    def __init__(self, num: int) -> None:
        self.num, self.count = num, 0

    def __call__(self, model: Any, optimizer: Any, micro_batches: Any) -> None:
        for batch in micro_batches:
            self.count += 1
            (loss(model, batch) / self.num).backward()
            if self.count % self.num == 0:
                optimizer.step()
                optimizer.zero_grad()


def test_fixed_number_of_micro_batches_is_not_taken_for_a_step_inside_the_loop() -> None:
    result = accumulation(case("counts", step=Counts(4)), "accumulation_schedule")
    assert result.outcome == "failed"
    assert result.message == (
        "the optimizer steps once in a window of 4 micro-batches, and 0 times in one of a single "
        "micro-batch\n"
        "  likely: a fixed number of micro-batches is counted up to; step after the last one that is given"
    )
    result = accumulation(case("counts", step=Counts(2)), "accumulation_parity")
    assert result.outcome == "failed"
    assert result.message.startswith(
        "the optimizer steps 2 times in a window of 4 micro-batches, and 0 on one\n"
        "  likely: a fixed number of micro-batches is counted up to"
    )


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
