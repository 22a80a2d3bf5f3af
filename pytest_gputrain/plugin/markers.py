"""The markers: their signatures, what is legal in them, and what they do to a test."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest

from pytest_gputrain.devices.sharing import lacking
from pytest_gputrain.devices.shortage import need, shortage
from pytest_gputrain.endurance.plan import StabilityPlan
from pytest_gputrain.plugin import properties
from pytest_gputrain.plugin.settings import settings_of
from pytest_gputrain.values import LEGAL_SIZE, parse_size

DESCRIPTIONS = (
    "requires_gpus(n=1, *, memory=None): hold n GPUs, each with that memory ('80GB'), while the test runs; "
    "skip unless there are so many; adds the marker gpu.",
    "gpu: runs on a GPU; requires_gpus adds it, so that -m gpu selects these tests.",
    "stability(depth=20, iterations=1000): a long run; skipped unless --stability is given or -m names it.",
    "distributed(world_size=2, backend=None, device=None, isolation='fresh', timeout=None, stall=None, "
    "env=None): the body runs on every rank, with the fixtures rank, world_size and device.",
)

_Read = TypeVar("_Read")


class GpuNeed(NamedTuple):
    """What ``requires_gpus`` asks for."""

    num_gpus: int
    memory: str | int | None

    def __str__(self) -> str:
        return need(self.num_gpus, self.memory)


def register(config: pytest.Config) -> None:
    """Declare the markers, with their full signatures."""
    for description in DESCRIPTIONS:
        config.addinivalue_line("markers", description)


_OURS = frozenset({"requires_gpus", "stability", "distributed", "gpu"})


def prepare(items: list[pytest.Item]) -> None:
    """Check the arguments of every marker and add ``gpu`` where it follows.

    Has to come before pytest's own ``-m``. Raises ``pytest.UsageError`` naming the test and what is legal.
    """
    for item in items:
        if _OURS.isdisjoint(mark.name for mark in item.iter_markers()):
            continue
        _validated(item, "requires_gpus", gpu_need)
        _validated(item, "stability", stability_plan)
        if item.get_closest_marker("distributed"):
            from pytest_gputrain.plugin.distributed_plan import distributed_plan, prepare_test

            _validated(item, "distributed", distributed_plan)
            prepare_test(item)
        if item.get_closest_marker("requires_gpus") and not item.get_closest_marker("gpu"):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu"):
            properties.add(item, properties.GPU, "yes")


def raise_too_late(item: pytest.Item) -> None:
    """Fail a test that a fixture has marked ``distributed``: its body would run here, as no rank at all."""
    __tracebackhide__ = True
    if item.get_closest_marker("distributed"):
        from pytest_gputrain.plugin.distributed_plan import HOOKS

        if not item.config.pluginmanager.has_plugin(HOOKS):
            why = "was added while the test ran, too late for its ranks; add the marker at collection"
            pytest.fail(f"distributed {why}", pytrace=False)


def _validated(item: pytest.Item, name: str, read: Callable[[pytest.Mark], object]) -> None:
    for mark in item.iter_markers(name):
        try:
            read(mark)
        except (TypeError, ValueError) as error:
            given = ", ".join(
                [*map(repr, mark.args), *(f"{key}={value!r}" for key, value in mark.kwargs.items())]
            )
            raise pytest.UsageError(f"{item.nodeid}: {name}({given}): {error}") from None


def gpu_need(mark: pytest.Mark) -> GpuNeed:
    """Read ``requires_gpus``. Raises ``ValueError`` or ``TypeError`` saying what is legal."""

    def requires_gpus(n: object = 1, *, memory: object = None) -> GpuNeed:
        num_gpus = _whole("n", n)
        if memory is None:
            return GpuNeed(num_gpus, None)
        if not isinstance(memory, (str, int)):
            raise ValueError(f"memory must be {LEGAL_SIZE}")
        try:
            parse_size(memory)
        except ValueError:
            raise ValueError(f"memory must be {LEGAL_SIZE}") from None
        return GpuNeed(num_gpus, memory)

    return bound(requires_gpus, mark, "requires_gpus(n=1, *, memory=None)")


def stability_plan(mark: pytest.Mark) -> StabilityPlan:
    """Read ``stability``. Raises ``ValueError`` or ``TypeError`` saying what is legal."""

    def stability(depth: object = 20, iterations: object = 1000) -> StabilityPlan:
        return StabilityPlan(_whole("depth", depth), _whole("iterations", iterations))

    return bound(stability, mark, "stability(depth=20, iterations=1000)")


def skip_reason(item: pytest.Item) -> str | None:
    """Return why this test must not run here and now, or None when it may."""
    if item.get_closest_marker("stability") and not _stability_asked(item.config):
        return "a stability run; ask for it with --stability or -m stability"
    if mark := item.get_closest_marker("requires_gpus"):
        needed = gpu_need(mark)
        return _lack_of_gpus(item, needed)
    return None


def _lack_of_gpus(item: pytest.Item, needed: GpuNeed) -> str | None:
    lack = shortage(needed.num_gpus, needed.memory)
    if lack is None:
        return None
    reason = lacking(needed.num_gpus, needed.memory, share_gpu=settings_of(item.config).share_gpu)
    if reason is None:
        # Here, not when it launches: whatever the test does with fewer GPUs, it proves nothing about more.
        properties.add(item, properties.SHARED, f"{lack}: shared, not a multi-GPU result")
        return None
    properties.add(item, properties.SHORTAGE, lack)
    return reason


def _stability_asked(config: pytest.Config) -> bool:
    expression = str(config.getoption("markexpr", "") or "")
    return settings_of(config).stability or re.search(r"\bstability\b", expression) is not None


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 up")
    return value


def bound(read: Callable[..., _Read], mark: pytest.Mark, signature: str) -> _Read:
    """Return what ``read`` makes of a marker's arguments; wrong ones get the signature."""
    try:
        return read(*mark.args, **mark.kwargs)
    except TypeError:
        raise TypeError(f"the marker is {signature}") from None
