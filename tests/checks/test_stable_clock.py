"""A rank's own time: without what it waited for."""

from __future__ import annotations

import threading
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from pytest_gputrain.checks.stable_clock import Arrivals, Clock, Moment, Waits
from pytest_gputrain.launch import stacks

ASLEEP = 0.05


def test_what_others_had_or_were_waited_for_is_not_a_ranks_own() -> None:
    assert Moment(10.0, 3.0, 4.0).own_since(Moment(1.0, 1.0, 1.0)) == 4.0
    assert Moment(2.0, 3.0, 0.0).own_since(Moment(1.0, 1.0, 0.0)) == 0.0


def test_waiting_in_a_collective_is_counted_once_and_on_this_thread_alone() -> None:
    clock = Clock()
    waits = Waits(clock, Arrivals(clock))
    inner = waits._timed(time.sleep)
    outer = waits._timed(lambda: inner(ASLEEP))
    begun = clock.now()
    outer()
    ended = clock.now()
    assert ASLEEP <= clock.waited <= ended.at - begun.at
    assert ended.own_since(begun) <= ended.at - begun.at - ASLEEP
    before = clock.waited
    thread = threading.Thread(target=outer)
    thread.start()
    thread.join()
    assert clock.waited == before
    clock.close()


def test_a_rank_that_waits_is_seen_to_wait() -> None:
    frames = []
    clock = Clock()
    own = Waits(clock, Arrivals(clock))._timed(lambda: frames.extend(traceback.extract_stack()[-2:-1]))
    own()
    here = [stacks.Frame(one.filename, one.lineno or 0, one.name) for one in frames]
    torchs = stacks.Frame(distributed_c10d.__file__, 3000, "all_reduce")
    assert stacks.in_collective([*here, torchs])
    assert not stacks.in_collective([stacks.Frame(__file__, 1, "waits"), torchs])


def test_what_a_backward_waits_for_after_its_last_gradient_is_no_ranks_own() -> None:
    """And each backward of a step has one."""
    clock = Clock()
    arrivals = Arrivals(clock)
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    arrivals.look_at([layer.weight for layer in layers])
    late: Any = AfterGradients.apply
    with Waits(clock, arrivals):
        begun = clock.now()
        for layer in layers:
            late(layer(torch.ones(1, 2)).sum()).backward()
    ended = clock.now()
    assert clock.waited >= 1.5 * ASLEEP  # what the thread runs meanwhile does not count
    assert ended.own_since(begun) <= ended.at - begun.at - 1.5 * ASLEEP
    arrivals.close()
    clock.close()


class AfterGradients(torch.autograd.Function):
    """Sleeps when the engine has done everything else, as DistributedDataParallel waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: time.sleep(ASLEEP))
        return gradient


def test_torchs_own_functions_are_put_back() -> None:
    def those() -> tuple[Any, ...]:
        names = (dist, "_broadcast_coalesced"), (torch.autograd, "_engine_run_backward")
        return distributed_c10d.Work.wait, *(getattr(owner, name) for owner, name in names)

    own, clock = those(), Clock()
    with Waits(clock, Arrivals(clock)):
        assert all(now is not before for now, before in zip(those(), own, strict=True))
    assert those() == own
    clock.close()
