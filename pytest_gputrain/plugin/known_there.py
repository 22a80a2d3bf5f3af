"""What only a rank knows: ``rank`` and ``device``, as they stand in the pytest process.

The fixtures of a test run there once, before any rank is started. Its placeholder may be kept in what a
fixture returns, at any depth: it becomes the rank's own value where it arrives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_gputrain.plugin.settings import settings_of

if TYPE_CHECKING:
    import torch

    from pytest_gputrain.plugin.distributed_plan import DistributedPlan

VALUES: dict[str, Any] = {}
"""In a rank: its own values, set before anything of the test is read."""


def arrive(name: str) -> Any:
    """What the placeholder of ``name`` becomes in a rank."""
    return VALUES[name]


class KnownThere:
    """Stands for ``name``. Used in the pytest process in any way but kept, it says what is the matter."""

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return arrive, (self.name,)

    def __repr__(self) -> str:
        return f"<{self.name}, known on the ranks>"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # asked by protocols, copy and pytest itself
            raise AttributeError(name)
        self._refuse()

    def _refuse(self, *_: object) -> NoReturn:
        __tracebackhide__ = True
        raise pytest.UsageError(
            f"{self.name} is known on the ranks only, and fixtures run once, before these start: "
            "keep it in what the fixture returns, or use it in the test"
        )

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = _refuse
    __int__ = __index__ = __float__ = __str__ = __format__ = __iter__ = __setattr__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = __neg__ = _refuse


def rank_of(node: pytest.Item) -> Any:
    """The value of the fixture ``rank``."""
    _plan_of(node, "rank")
    return 0 if settings_of(node.config).alone else KnownThere("rank")


def world_size_of(node: pytest.Item) -> int:
    """The value of the fixture ``world_size``."""
    plan = _plan_of(node, "world_size")
    return 1 if settings_of(node.config).alone else plan.world_size


def device_of(node: pytest.Item) -> Any:
    """The value of the fixture ``device``."""
    plan = _plan_of(node, "device")
    if not settings_of(node.config).alone:
        return KnownThere("device")
    import torch

    return torch.device(alone_device(node, plan))


def device_name(node: pytest.Item, plan: DistributedPlan) -> str:
    """``cpu`` or ``cuda``: what the marker says, else whether the test asks for GPUs."""
    return plan.device or ("cuda" if node.get_closest_marker("requires_gpus") else "cpu")


def alone_device(node: pytest.Item, plan: DistributedPlan) -> str:
    """``cpu``, or the first GPU that the test holds, by its name in this process: others are others'."""
    from pytest_gputrain.plugin import leasing

    held = leasing.held(node)
    return held.devices[0] if held and device_name(node, plan) == "cuda" else "cpu"


def torch_device(name: str) -> torch.device:
    """The device that a process uses: of several GPUs its own."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def _plan_of(node: pytest.Item, fixture: str) -> DistributedPlan:
    mark = node.get_closest_marker("distributed")
    if mark is None:
        pytest.fail(
            f"the fixture {fixture!r} means something on a rank only: mark the test "
            "@pytest.mark.distributed(world_size=2), or take ddp_launcher",
            pytrace=False,
        )
    from pytest_gputrain.plugin.distributed_plan import distributed_plan

    return distributed_plan(mark)
