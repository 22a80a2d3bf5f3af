"""What a replay needs of its rank beside weights, buffers and data: the random state, and its number."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

_MOST_STATES = 64  # of 5 kB each; a step with more forward passes draws the rest from its own
_VARIABLES = ("RANK", "LOCAL_RANK")


def random_state() -> dict[str, Any]:
    """Of torch's default generators."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    import torch

    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def before_forward(wanted: Callable[[], Any], act: Callable[[Any], None]) -> Iterator[None]:
    """Within the block, ``act(module)`` before each forward of the module that ``wanted()`` returns.

    By a global hook: a step may copy or pickle the model, and what acts here holds process groups.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook

    def hook(module: Any, args: Any) -> None:
        if module is wanted():
            act(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def keep_state(states: list[dict[str, Any]]) -> None:
    """Before a forward on a rank."""
    if len(states) < _MOST_STATES:
        states.append(random_state())


@contextlib.contextmanager
def same_random_states(model: Any, states: list[dict[str, Any]]) -> Iterator[None]:
    """Each forward of the model begins with the random state it had on the rank, however that was seeded."""
    left = iter(states)

    def restore(module: Any) -> None:
        if (state := next(left, None)) is not None:
            _set_random_state(state)

    with before_forward(lambda: model, restore):
        yield


@contextlib.contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """``get_rank()`` and RANK say ``rank`` to whoever asks, but for torch; the world size stays."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    original = dist.get_rank
    environ = {name: os.environ.get(name) for name in _VARIABLES}

    def get_rank(group: Any = None) -> int:
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        return original(group) if group is not None or caller.partition(".")[0] == "torch" else rank

    try:
        dist.get_rank = distributed_c10d.get_rank = get_rank
        os.environ.update(dict.fromkeys(_VARIABLES, str(rank)))
        yield
    finally:
        dist.get_rank = distributed_c10d.get_rank = original
        for name, value in environ.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
