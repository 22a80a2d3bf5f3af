"""Does a model go through the same collectives on all ranks, to its end? Found out without hanging.

Where one rank raises, the others wait, and where parts are of different sizes, gloo aborts. So before each
collective ranks tell each other, in a group of their own, which one they are about to make.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gputrain.case import pytree
from pytest_gputrain.tensor_parallel.golden_counting import is_collective
from pytest_gputrain.tensor_parallel.golden_world import World, is_dtensor_class


class _OutOfStep(RuntimeError):
    """The ranks are about to make different collectives."""


class _InStep(TorchDispatchMode):
    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world, self.over = world, False

    def meet(self, doing: Any) -> bool:
        """Whether all ranks do the same; never again after they did not. Collective."""
        if self.over:
            return False
        by_rank = self.world.merged(dict.fromkeys(self.world.held, doing))
        self.over = any(one != by_rank[0] for one in by_rank)
        return not self.over

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_dtensor_class(kind) for kind in types):
            return NotImplemented  # it comes again as what it is made of
        if is_collective(func):
            shapes = [tuple(tensor.shape) for tensor in pytree.tensors([args, kwargs or {}])]
            if not self.meet((func.name(), shapes)):
                raise _OutOfStep("ranks are about to make different collectives")
        return func(*args, **(kwargs or {}))


def in_step(world: World, call: Callable[[], Any]) -> bool:
    """Whether ``call()`` makes the same collectives, of equal parts, on all ranks and raises on none.

    Collective. False where ranks are simulated: there nothing is sent.
    """
    if world.simulated:
        return False
    mode = _InStep(world)
    raised = False
    try:
        with mode:
            call()
    except Exception:
        raised = True
    return mode.meet(("end", raised)) and not raised
