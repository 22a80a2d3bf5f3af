"""State of training that the loop's own functions keep: an average of the weights, a gradient scaler.

Looked for in the closure of a function, and among the attributes of the object that it is or belongs to. Only
state of training: what a function counts or records there is its author's to read afterwards.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

STATE = (
    torch.Tensor,
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
)

# Averages lie in a list of tensors, or in a dictionary of models; what is longer is data.
DEPTH, MOST = 2, 10_000

Variable = tuple[Callable[[], Any], Callable[[Any], None]]


def kept_by(function: Any) -> tuple[list[Any], list[Callable[[], None]]]:
    """Return (state that is there, what puts the same objects back where they were)."""
    variables = [(get, put, get()) for get, put in _variables(function)]
    found = [value for _, _, value in variables if isinstance(value, STATE)]
    return found, [*(_undo(*variable) for variable in variables), *_undo_of_new(function)]


def _undo_of_new(function: Any) -> Iterator[Callable[[], None]]:
    """What takes state away that a call makes under a new name (``if not hasattr(self, "average")``)."""
    if isinstance(function, functools.partial):
        yield from _undo_of_new(function.func)
        return
    holder = function.__self__ if isinstance(function, types.MethodType) else function
    held = getattr(holder, "__dict__", None)
    if isinstance(held, dict):
        known = {*held}

        def undo() -> None:
            for name in [name for name in held if name not in known and _is_state(held[name])]:
                del held[name]

        yield undo


def _is_state(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, STATE):
        return True
    if depth == 0 or not isinstance(value, list | tuple | dict) or len(value) > MOST:
        return False
    items = value.values() if isinstance(value, dict) else value
    return any(_is_state(item, depth - 1) for item in items)


def _variables(function: Any) -> Iterator[Variable]:
    """(get, put) of everything that is kept from one call to the next."""
    if isinstance(function, functools.partial):
        yield from _variables(function.func)
    elif isinstance(function, types.MethodType):
        yield from _attributes(function.__self__)
        yield from _variables(function.__func__)
    elif isinstance(function, types.FunctionType):
        yield from (_cell(cell) for cell in function.__closure__ or ())
    else:
        yield from _attributes(function)


def _attributes(holder: Any) -> Iterator[Variable]:
    held = getattr(holder, "__dict__", None)
    if isinstance(held, dict):  # not the proxy of a class
        yield from (_item(held, name) for name in [*held])


def _item(held: dict[str, Any], name: str) -> Variable:
    def put(value: Any) -> None:
        held[name] = value

    return lambda: held.get(name), put


def _cell(cell: types.CellType) -> Variable:
    def get() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # not yet filled
            return None

    def put(value: Any) -> None:
        cell.cell_contents = value

    return get, put


def _undo(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Callable[[], None]:
    def undo() -> None:
        now = get()
        if now is not value and (_is_state(now) or _is_state(value)):
            put(value)

    return undo
