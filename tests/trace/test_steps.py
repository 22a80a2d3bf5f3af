"""What a step recorder sees of clipping, closures, several optimizers and foreign ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad

from pytest_gputrain.trace.optimizers import OptimizerWatch, optimizers_in
from pytest_gputrain.trace.steps import AFTER_BACKWARD, AT_STEP, BEFORE_CLIP, StepRecord, StepRecorder

Take = Callable[[nn.Module, Any], None]


def record(
    take: Take, optimizer: Callable[[Any], Any] = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)
) -> StepRecord:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = optimizer(model)
    with StepRecorder(dict(model.named_parameters()), opt).step() as seen:
        take(model, opt)
    return seen


def backward(model: nn.Module) -> None:
    (model(torch.ones(2, 3)).sum() * 10).backward()


def test_moments_before_and_after_clipping() -> None:
    def take(model: nn.Module, optimizer: Any) -> None:
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    seen = record(take)
    after, clip, at = (seen.gradients[moment]["weight"] for moment in (AFTER_BACKWARD, BEFORE_CLIP, AT_STEP))
    assert torch.equal(after, clip)
    assert at.norm() < 1.01 < after.norm()
    assert (seen.backwards, seen.optimizer_steps) == (1, 1)


def test_unchanged_gradient_is_kept_once() -> None:
    def take(model: nn.Module, optimizer: Any) -> None:
        backward(model)
        optimizer.step()

    seen = record(take)
    assert seen.gradients[AT_STEP]["weight"] is seen.gradients[AFTER_BACKWARD]["weight"]
    assert seen.gradients[BEFORE_CLIP] == {}


def test_closure_is_seen_at_its_first_call() -> None:
    def take(model: nn.Module, optimizer: Any) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            backward(model)
            return torch.zeros(())

        optimizer.step(closure)

    seen = record(take, lambda model: torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3))
    assert torch.equal(seen.gradients[AFTER_BACKWARD]["weight"], torch.full((1, 3), 20.0))
    assert seen.gradients[AT_STEP] == {}


def test_two_optimizers_keep_the_update_between_them() -> None:
    def take(model: nn.Module, optimizers: Any) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
            backward(model)
            optimizer.step()

    def each(model: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)]

    seen = record(take, each)
    assert seen.backwards_before == {"weight": 1, "bias": 2}
    assert [list(update) for update in seen.updates] == [["weight"]]


class Foreign:
    """No torch optimizer, and tells nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter -= 0.1 * parameter.grad


def test_foreign_optimizer_is_seen_and_left_as_it_was() -> None:
    kept: list[Any] = []

    def take(model: nn.Module, optimizer: Any) -> None:
        kept.append(optimizer)
        backward(model)
        optimizer.step()

    seen = record(take, Foreign)
    assert set(seen.gradients[AT_STEP]) == {"weight", "bias"}
    assert "step" not in vars(kept[0])


def test_nothing_stays_patched_even_after_an_error() -> None:
    before = torch.autograd.backward, clip_grad.clip_grad_norm_, vars(clip_grad).get("_get_total_norm")

    def take(model: nn.Module, optimizer: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        record(take)
    assert before == (
        torch.autograd.backward,
        clip_grad.clip_grad_norm_,
        vars(clip_grad).get("_get_total_norm"),
    )


def test_a_step_within_a_step_counts_once() -> None:
    class Ahead(torch.optim.SGD):
        inner: torch.optim.Optimizer

        def step(self, closure: Any = None) -> Any:
            return self.inner.step()

    parameter = nn.Parameter(torch.ones(2))
    outer = Ahead([parameter], lr=0.1)
    outer.inner = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    with OptimizerWatch(outer) as watch:
        outer.step()
    assert watch.steps == 1


def test_optimizers_are_found_in_lists_and_wrappers() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)

    class Wrapper:
        def __init__(self) -> None:
            self.optimizers = [inner]

    assert optimizers_in(inner) == optimizers_in([inner]) == optimizers_in(Wrapper()) == [inner]
    assert optimizers_in(object()) == []
