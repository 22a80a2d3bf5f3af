"""The tracer sees every gradient and changes none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_gputrain.launch import Launcher
from pytest_gputrain.trace.gradients import GradTracer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.unused = nn.Linear(3, 1, bias=False)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.frozen(self.first(x)))
        return out


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def backward(model: Any) -> None:
    model(torch.ones(2, 3)).sum().backward()


def test_what_arrived_what_is_missing_and_in_which_order() -> None:
    model = net()
    with GradTracer(model) as trace:
        backward(model)
    assert trace.arrived == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert trace.missing == ["unused.weight"]
    assert {name.split(".")[0] for name in trace.order[:2]} == {"second"}
    with pytest.raises(AssertionError) as raised:
        trace.assert_all_arrived()
    assert str(raised.value).splitlines()[0] == (
        "1 of 5 trainable parameters got no gradient: unused.weight (in unused, Linear)"
    )


def test_a_new_step_forgets_what_arrived_before() -> None:
    model = net()
    with GradTracer(model) as trace:
        backward(model)
        trace.step()
        assert trace.arrived == set()
        assert "first.weight" in trace.arrived_ever
        assert trace.missing_ever == ["unused.weight"]


def test_gradients_are_bitwise_the_same_with_and_without() -> None:
    plain, traced = net(), net()
    backward(plain)
    with GradTracer(traced):
        backward(traced)
    for one, other in zip(plain.parameters(), traced.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or (other.grad is not None and torch.equal(one.grad, other.grad))


def test_hooks_are_gone_afterwards_and_not_doubled_within() -> None:
    model = net()
    with GradTracer(model) as trace, trace:
        backward(model)
        assert len(model.first.weight._post_accumulate_grad_hooks or ()) == 1
    backward(model)
    assert len(trace._order) == 4
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_names_are_the_inner_models() -> None:
    model: Any = torch.compile(net(), backend="eager")
    with GradTracer(model) as trace:
        backward(model)
    assert trace.missing == ["unused.weight"]
    wrapped = nn.DataParallel(net())
    assert GradTracer(wrapped).trainable == trace.trainable


def test_tied_parameter_has_one_name() -> None:
    model = net()
    model.second.weight = nn.Parameter(torch.ones(1, 3))
    model.unused.weight = model.second.weight
    with GradTracer(model) as trace:
        backward(model)
    trace.assert_all_arrived()
    assert "unused.weight" not in trace.trainable


def trace_wrapped() -> list[str]:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net(), find_unused_parameters=True)
    with GradTracer(model) as trace:
        backward(model)
    return trace.missing


def test_it_works_on_ranks() -> None:
    assert Launcher()(trace_wrapped, world_size=2).values == [["unused.weight"], ["unused.weight"]]


def test_a_frozen_model_is_no_model_whose_gradients_all_arrived() -> None:
    with GradTracer(torch.nn.Linear(2, 2).requires_grad_(False)) as trace:
        pass
    with pytest.raises(AssertionError, match="none of 2 parameters is trainable, so no gradient can arrive"):
        trace.assert_all_arrived()
    with GradTracer(torch.nn.ReLU()) as trace:
        pass
    trace.assert_all_arrived()
