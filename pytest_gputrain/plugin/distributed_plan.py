"""What ``distributed`` asks for, and which tests can be asked: all of it known before anything runs."""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Mapping
from typing import NamedTuple

import pytest

from pytest_gputrain.launch import request
from pytest_gputrain.plugin.markers import bound, gpu_need
from pytest_gputrain.plugin.settings import settings_of

SIGNATURE = (
    "distributed(world_size=2, backend=None, device=None, isolation='fresh', timeout=None, stall=None, "
    "env=None)"
)
HOOKS = "gputrain-distributed"


class DistributedPlan(NamedTuple):
    """How the body of a test is launched; None leaves it to the session's settings."""

    world_size: int
    backend: str | None
    device: str | None
    isolation: str
    timeout: float | None
    stall: float | None
    env: Mapping[str, str | None] | None


def distributed_plan(mark: pytest.Mark) -> DistributedPlan:
    """Read ``distributed``. Raises ``ValueError`` or ``TypeError`` saying what is legal."""

    def distributed(
        world_size: object = 2,
        backend: str | None = None,
        device: str | None = None,
        isolation: str = "fresh",
        timeout: float | None = None,
        stall: float | None = None,
        env: Mapping[str, str | None] | None = None,
    ) -> DistributedPlan:
        size = request.whole("world_size", world_size, most=512)
        if backend is not None:
            request.one_of("backend", backend, request.BACKENDS)
        if device is not None:
            request.one_of("device", device, request.DEVICES)
        if device == "cpu":
            request.placement(device, backend, size, {}, share_gpu=False)  # whether they fit; no GPU is asked
        request.one_of("isolation", isolation, request.ISOLATIONS)
        for name, value in (("timeout", timeout), ("stall", stall)):
            if value is not None:
                request.seconds(name, value)
        request.environment(env)
        return DistributedPlan(size, backend, device, isolation, timeout, stall, env)

    return bound(distributed, mark, SIGNATURE)


def prepare_test(item: pytest.Item) -> None:
    """See that the body of a test can run on ranks, and have it run there. Raises ``pytest.UsageError``.

    ``device="cuda"`` means ``requires_gpus(world_size)`` too, so that the test skips where they are missing.
    """
    mark = item.get_closest_marker("distributed")
    assert mark is not None
    plan = distributed_plan(mark)
    if why := _unfit(item) or _gpus_do_not_fit(item, plan):
        raise pytest.UsageError(f"{item.nodeid}: distributed: {why}")
    if plan.device == "cuda" and not item.get_closest_marker("requires_gpus"):
        item.add_marker(pytest.mark.requires_gpus(plan.world_size))
    if not item.config.pluginmanager.has_plugin(HOOKS):
        from pytest_gputrain.plugin.distributed import DistributedHooks

        item.config.pluginmanager.register(DistributedHooks(), HOOKS)


def _unfit(item: pytest.Item) -> str | None:
    if not isinstance(item, pytest.Function):
        return "marks test functions; this is not one"
    if item.cls is not None and issubclass(item.cls, unittest.TestCase):
        return "a method of unittest.TestCase cannot run on ranks; write a plain function or class, or take "\
            "ddp_launcher"  # fmt: skip
    if inspect.iscoroutinefunction(item.function) or inspect.isasyncgenfunction(item.function):
        return "an async function cannot run on ranks; write a plain function that calls asyncio.run"
    if getattr(item.function, "is_hypothesis_test", False):
        return "hypothesis would draw other examples on every rank; draw in the test and take ddp_launcher"
    if item.config.getoption("trace", False) and not settings_of(item.config).alone:
        return "--trace cannot enter ranks; add --gputrain-alone to run the body as one rank in this process"
    return None


def _gpus_do_not_fit(item: pytest.Item, plan: DistributedPlan) -> str | None:
    mark = item.get_closest_marker("requires_gpus")
    if mark is None:
        if plan.device != "cuda" and plan.backend not in (None, "gloo"):
            return (
                f"backend={plan.backend!r} needs device='cuda' or the marker requires_gpus({plan.world_size})"
            )
        return None
    num_gpus = gpu_need(mark).num_gpus
    if plan.device == "cpu" or num_gpus == plan.world_size:
        return None
    return (
        f"requires_gpus({num_gpus}) and world_size={plan.world_size}: each rank has one GPU, so the two "
        "numbers must be the same, or device='cpu'"
    )
