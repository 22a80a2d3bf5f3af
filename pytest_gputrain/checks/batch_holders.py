"""Which of the user's names keeps the tensors that pile up: found by walking back what refers to them."""

from __future__ import annotations

import gc
import sys
import types
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

# From a tensor to a name: tensor, tuple, list, dict, object, its dict, module. Each passes over all objects.
DEPTH = 6
# Of one level; what many refer to leads nowhere.
MANY = 100
PILES = 3
_PASSING = (list, tuple, set, frozenset, types.ModuleType)


def piling_up(known: Iterable[Any], at_least: int) -> list[str]:
    """Lines such as ``31 tensors (5, 4) in list history of module train``; none without a pile.

    known: tensors that belong where they are; at_least: how many of one shape are a pile.
    """
    import torch

    belongs = {id(tensor) for tensor in known}
    piles: dict[Any, list[Any]] = defaultdict(list)
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and id(thing) not in belongs:
            made_by = type(thing.grad_fn).__name__ if thing.grad_fn is not None else ""
            piles[tuple(thing.shape), made_by].append(thing)
    large = sorted((key for key in piles if len(piles[key]) >= at_least), key=lambda key: len(key[0]))
    lines: list[tuple[bool, str]] = []
    # The smallest shapes first: a loss that is kept holds its graph, and the graph all the others.
    for shape, made_by in large[:PILES]:
        pile = piles[shape, made_by]
        made = f" made by {made_by.removesuffix('0')}" if made_by else ""
        where = holder_of(pile[len(pile) // 2], hidden=[piles, pile])
        place = f" in {where}" if where else ""
        lines.append((where is None, f"{len(pile)} tensors {shape}{made}{place}"))
    # What only the graph of another one holds says less than who holds that.
    return [line for nameless, line in lines if not nameless] or [line for _, line in lines]


def holder_of(thing: Any, hidden: list[Any]) -> str | None:
    """The nearest thing with a name that keeps it: a variable of a module, an attribute, a closure."""
    seen, level = {id(thing), *map(id, hidden)}, [thing]
    for _ in range(DEPTH):
        if not 0 < len(level) <= MANY:
            return None
        below = {id(item) for item in level}
        above = []
        for referrer in gc.get_referrers(*level):
            if id(referrer) in seen or referrer is level or isinstance(referrer, types.FrameType):
                continue
            seen.add(id(referrer))
            if (name := _named(referrer, below)) is not None:
                return name
            above.append(referrer)
        level = above
    return None


def _named(referrer: Any, below: Collection[int]) -> str | None:
    if isinstance(referrer, types.CellType):
        return _closure(referrer)
    if isinstance(referrer, dict):
        owner = _owner(referrer)
        return _in(referrer, below, owner) if owner is not None else None
    if isinstance(referrer, _PASSING):
        return None
    attributes = getattr(referrer, "__dict__", None)
    if not isinstance(attributes, dict):
        return None
    return _in(attributes, below, f"a {type(referrer).__name__}")


def _owner(names: dict[Any, Any]) -> str | None:
    """What has these names: a module, or an object."""
    module = names.get("__name__")
    if isinstance(module, str) and getattr(sys.modules.get(module), "__dict__", None) is names:
        return f"module {module}"
    if not all(isinstance(name, str) for name in names):
        return None
    owners = (one for one in gc.get_referrers(names) if getattr(one, "__dict__", None) is names)
    return next((f"a {type(one).__name__}" for one in owners), None)


def _in(names: dict[Any, Any], below: Collection[int], owner: str) -> str | None:
    found = next((name for name, value in names.items() if id(value) in below), None)
    return f"{type(names[found]).__name__} {found} of {owner}" if found is not None else None


def _closure(cell: Any) -> str | None:
    for cells in gc.get_referrers(cell):
        for function in gc.get_referrers(cells) if isinstance(cells, tuple) else ():
            if isinstance(function, types.FunctionType) and function.__closure__ is cells:
                name = function.__code__.co_freevars[list(function.__closure__ or ()).index(cell)]
                code = function.__code__
                place = f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"
                kept = type(cell.cell_contents).__name__
                return f"{kept} {name} of the closure {function.__qualname__} ({place})"
    return None
