"""What a block leaves behind, and who holds it, in programs that keep tensors in all the ways people do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pytest_gputrain.memory.guard import OomGuard

kept: list[Any] = []


class Net(torch.nn.Module):
    """64 KiB of activations a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 64)
        self.rest = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(64, 64))
        self.keeps = False

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.first(x)
        if self.keeps:
            self.rest[0].last = hidden
        return self.rest(hidden)


def make() -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    return net, torch.optim.Adam(net.parameters())


def step(net: Net, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    x = torch.randn(256, 64)
    loss: torch.Tensor = (net(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.fixture(autouse=True)
def _nothing_kept() -> Any:
    yield
    kept.clear()


def test_a_loop_that_keeps_nothing() -> None:
    net, optimizer = make()
    with OomGuard() as guard:
        for _ in range(3):
            loss = step(net, optimizer)
    assert guard.leaks == ()
    guard.assert_nothing_left()
    in_hand = next(str(left) for left in guard.left if left.in_hand)
    assert in_hand.startswith("4 bytes (float32[]) held by `loss` in test_a_loop_that_keeps_nothing at ")
    assert loss is not None


def test_losses_in_a_list_with_their_graphs() -> None:
    net, _ = make()
    history = []
    with OomGuard() as guard:
        for _ in range(3):
            history.append(net(torch.randn(256, 64)).sum())
    with pytest.raises(AssertionError) as caught:
        guard.assert_nothing_left()
    text = str(caught.value)
    assert "192.0 KiB (3 x float32[256, 64], made at test_left.py:" in text
    assert "held by the autograd graph of `history`[0] in test_losses_in_a_list_with_their_graphs at " in text


def test_a_running_total_with_its_graph() -> None:
    net, _ = make()
    total: Any = 0
    with OomGuard() as guard:
        for _ in range(3):
            total = total + net(torch.randn(256, 64)).sum()
    assert {leak.count for leak in guard.leaks if leak.num_bytes > 1000} == {3}
    assert all("the autograd graph of `total`" in leak.held_by for leak in guard.leaks)


def in_a_global(net: Net, optimizer: torch.optim.Optimizer) -> object:
    kept.append(step(net, optimizer))
    return None


def on_a_module(net: Net, optimizer: torch.optim.Optimizer) -> object:
    net.keeps = True
    step(net, optimizer)
    return None


def in_a_traceback(net: Net, optimizer: torch.optim.Optimizer) -> object:
    def fails() -> None:
        wanted = torch.randn(256, 64)
        raise KeyError(wanted.shape)

    try:
        fails()
    except KeyError as error:
        kept.append(error)
    return None


def in_a_closure(net: Net, optimizer: torch.optim.Optimizer) -> object:
    x = torch.randn(256, 64)
    kept.append(lambda: x)
    return None


def in_a_cache(net: Net, optimizer: torch.optim.Optimizer) -> object:
    @functools.lru_cache
    def positions(size: int) -> torch.Tensor:
        return torch.randn(size, 64)

    positions(256)
    kept.append(positions)
    return None


def in_a_generator(net: Net, optimizer: torch.optim.Optimizer) -> object:
    def batches() -> Any:
        batch = torch.randn(256, 64)
        yield 1
        yield batch

    kept.append(batches())
    next(kept[0])
    return None


@pytest.mark.parametrize(
    ("program", "holder"),
    [
        (in_a_global, "global `kept`[0] in test_left.py"),
        (on_a_module, "`net`.rest[0].last in test_who_holds_it at test_left.py:"),
        (in_a_traceback, "global `kept`[0].__traceback__ > `wanted` in fails at test_left.py:"),
        (
            in_a_closure,
            "global `kept`[0] > `x` in the closure of in_a_closure.<locals>.<lambda> in test_left.py",
        ),
        (in_a_cache, "global `kept`[0] > _lru_cache_wrapper positions"),
        (in_a_generator, "global `kept`[0] > suspended batches in test_left.py"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_who_holds_it(program: Callable[[Net, torch.optim.Optimizer], object], holder: str) -> None:
    net, optimizer = make()
    with OomGuard() as guard:
        program(net, optimizer)
    assert len(guard.leaks) == 1
    assert guard.leaks[0].held_by.startswith(holder)


def test_training_state_of_a_model_from_outside_is_none() -> None:
    net, optimizer = make()
    with OomGuard() as guard:
        net(torch.randn(8, 64)).sum().backward()
        optimizer.step()
    assert net.first.weight.grad is not None
    assert guard.left == ()


def test_models_in_a_list_are_left_and_the_one_in_use_is_in_hand() -> None:
    with OomGuard() as guard:
        net = Net()
        kept.extend(Net() for _ in range(2))
    weights = [left for left in guard.left if left.shape == (64, 64)]
    assert sorted((left.count, left.in_hand) for left in weights if "`net`" in left.held_by) == [(2, True)]
    assert {left.in_hand for left in weights if "`kept`" in left.held_by} == {False}
    assert net is not None


def test_no_verdict_without_a_run() -> None:
    guard = OomGuard()
    with pytest.raises(
        RuntimeError, match=r"^oom_guard cannot tell what is left: the block has not run yet$"
    ):
        guard.assert_nothing_left()
    with pytest.raises(KeyError), guard:
        raise KeyError
    with pytest.raises(
        RuntimeError, match=r"^oom_guard cannot tell what is left: the block ended with KeyError$"
    ):
        guard.assert_nothing_left()
