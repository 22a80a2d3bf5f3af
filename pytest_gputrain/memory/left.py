"""What a block leaves behind: tensors made in it that are still alive, who made them, and who holds them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.ledger import Record
from pytest_gputrain.memory.lines import location
from pytest_gputrain.memory.references import Holder, Walk
from pytest_gputrain.memory.storages import storages_of
from pytest_gputrain.values import format_size

# A model's whole graph, and no more: the walk is for a message.
_MOST_NODES = 20_000


@dataclass(frozen=True)
class Left:
    """Tensors of one shape that one line made and one variable holds.

    ``num_bytes`` of them all; ``location`` is the user's line, None for small tensors. ``in_hand``: a
    variable of a function that still runs names it, or holds a single one of the kind, as one does with the
    last loss.
    """

    count: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    category: str
    location: str | None
    held_by: str
    in_hand: bool

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        made = f", made at {self.location}" if self.location else ""
        what = f"{times}{self.dtype}{[*self.shape]}"
        return f"{format_size(self.num_bytes)} ({what}{made}) held by {self.held_by}"


def what_is_left(records: Sequence[Record], known: Mapping[str, Any]) -> tuple[Left, ...]:
    """What is alive of these storages and who holds it, the largest first.

    known: objects by name that hold things, too, and that no variable of the user's names.
    """
    if not records:
        return ()
    finder = _Finder({record.key for record in records}, known)
    groups: dict[Any, list[Record]] = {}
    for record in records:
        key = (*finder.variable(record.key), record.shape, record.category, record.lines)
        groups.setdefault(key, []).append(record)
    found = [_left(group, finder) for group in groups.values()]
    return tuple(sorted(found, key=lambda left: -left.num_bytes))


def _left(group: Sequence[Record], finder: _Finder) -> Left:
    shape, dtype = group[0].shape
    return Left(
        count=len(group),
        num_bytes=sum(record.num_bytes for record in group),
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
        category=group[0].category,
        location=location(group[0].lines) if group[0].lines else None,
        held_by=finder.held_by(group[0].key),
        in_hand=all(finder.in_hand(record, len(group)) for record in group),
    )


class _Finder:
    """Who holds each of some storages: a variable, or the autograd graph of one."""

    def __init__(self, keys: set[int], known: Mapping[str, Any]) -> None:
        tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
        self._named = [(key, tensor) for tensor in tensors for key in _keys(tensor) if key in keys]
        self._roots = [tensor for tensor in tensors if _graph_of(tensor) is not None]
        self._keys = keys
        self._direct: dict[int, Holder] = {}
        self._by_graph: dict[int, Holder] = {}
        walk = Walk()
        walk.near(known)
        self._resolve(walk)
        if len(self._direct.keys() | self._by_graph.keys()) < len(keys):
            walk.far()
            self._resolve(walk)
        self._named.clear()
        self._roots.clear()

    def _resolve(self, walk: Walk) -> None:
        for key, tensor in self._named:
            if key not in self._direct and (holder := walk.holder(tensor)):
                self._direct[key] = holder
        seen: set[Any] = set()
        for tensor in self._roots:
            if holder := walk.holder(tensor):
                for key in _saved_keys(_graph_of(tensor), seen):
                    if key in self._keys and key not in self._direct:
                        self._by_graph.setdefault(key, holder)

    def variable(self, key: int) -> tuple[str, str, bool]:
        """(name, place, by its graph) of the variable that holds it; empty where there is none."""
        holder = self._direct.get(key) or self._by_graph.get(key)
        return (holder.name, holder.place, key in self._by_graph) if holder else ("", "", False)

    def held_by(self, key: int) -> str:
        if key in self._direct:
            return str(self._direct[key])
        if key in self._by_graph:
            return f"the autograd graph of {self._by_graph[key]}"
        return "no Python variable (autograd, or C++)"

    def in_hand(self, record: Record, count: int) -> bool:
        holder = self._direct.get(record.key)
        if holder is None or not holder.is_local:
            return False
        if issubclass(holder.root, torch.nn.Module):
            return record.category in (categories.PARAMETERS, categories.BUFFERS)
        return not holder.way or count == 1


def _graph_of(tensor: torch.Tensor) -> Any:
    """The autograd node of a tensor, or that of its gradient (``create_graph=True``)."""
    if not tensor.is_leaf:
        return tensor.grad_fn
    return tensor.grad.grad_fn if tensor.grad is not None else None


def _saved_keys(node: Any, seen: set[Any]) -> Iterator[int]:
    todo = [node]
    while todo and len(seen) < _MOST_NODES:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [parent for parent, _ in node.next_functions]
        for tensor in _saved_of(node):
            yield from _keys(tensor)


def _saved_of(node: Any) -> Iterator[torch.Tensor]:
    for name in dir(node):
        if not name.startswith("_saved_") and name not in ("saved_tensors", "variable"):
            continue
        try:
            value = getattr(node, name)
        except Exception:  # freed by backward
            continue
        for tensor in value if isinstance(value, list | tuple) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield tensor


def _keys(tensor: torch.Tensor) -> list[int]:
    try:
        return [storage._cdata for storage in storages_of(tensor)]
    except Exception:  # a subclass of the user's
        return []
