"""Shapes that do not fit in a parallel model: heads that ranks do not divide, or that were not divided."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from pytest_gputrain.tensor_parallel import heads

_SHAPES = re.compile(
    r"is invalid for input of size|size mismatch|must match the size|shapes cannot be multiplied"
    r"|must have same reduction dim"
)
_IN_CONFIG = ("num_attention_heads", "num_key_value_heads", "n_head")


def tell(error: RuntimeError, model: nn.Module, world_size: int) -> None:
    """Add to a shape error what is likely behind it; model: in one piece. Other errors stay as they are."""
    if _SHAPES.search(str(error)):
        found = next(iter([*_indivisible(model, world_size), *_undivided(error, world_size)]), None)
        if found is not None:
            first, newline, rest = str(error).partition("\n")
            error.args = (f"{first}; likely: {found}{newline}{rest}",)


def _indivisible(model: nn.Module, world_size: int) -> Iterator[str]:
    config = getattr(model, "config", None)
    for name in _IN_CONFIG:
        number = getattr(config, name, None)
        if isinstance(number, int) and number % world_size:
            yield (
                f"{name} = {number} is not divisible by {world_size} ranks "
                f"({number} = {number // world_size} x {world_size} + {number % world_size})"
            )
    for owner, module in model.named_modules():
        for name in heads.QUERY:
            number = vars(module).get(name)
            if type(number) is int and number % world_size:
                yield (
                    f"{owner or 'the model'} has {name} = {number}, not divisible by {world_size} ranks "
                    f"({number} = {number // world_size} x {world_size} + {number % world_size})"
                )


def indivisible(model: nn.Module, world_size: int) -> str | None:
    """Heads of a model in one piece that the ranks do not divide, as its modules or its config say."""
    return next(_indivisible(model, world_size), None)


def _undivided(error: RuntimeError, world_size: int) -> Iterator[str]:
    """From the innermost module with heads that the error came through."""
    modules: list[nn.Module] = []
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        modules += [owner] if isinstance(owner, nn.Module) else []
        trace = trace.tb_next
    for module in reversed(modules):
        for name in heads.QUERY:
            number = getattr(module, name, None)
            if isinstance(number, int) and number >= world_size > 1 and not number % world_size:
                yield (
                    f"{type(module).__name__} has {name} = {number}; where its projections are cut over "
                    f"{world_size} ranks it has to be told {number} / {world_size} = {number // world_size}"
                )
                return
