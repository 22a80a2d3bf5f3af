"""Memory in a rank of a stability run: bytes on the device, the live tensors, and who holds those added.

Bytes in use are known at each step for microseconds. Live tensors are counted a few times only: Python has
hundreds of thousands of objects to go through. Tensors that only C++ holds are not seen among them.
"""

from __future__ import annotations

import gc
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from pytest_gputrain.checks.stable_containers import Lengths, holder_of
from pytest_gputrain.endurance.heap import heap_bytes
from pytest_gputrain.endurance.held import Held

_FIRST, _TIMES = 20, 5  # the steps of the first count, and how many times as many lie before each next one
_LEAST_BETWEEN = 25  # steps that have to lie between two counts that are compared
_COUNTS = 48  # in a run where nothing else tells of the memory
_MOST_NODES, _MOST_HOLDERS = 200_000, 64
_Kind = tuple[Any, tuple[int, ...]]


def device_memory(device: Any) -> dict[str, int]:
    """torch's allocator on a GPU, both numbers by one question, without waiting for the GPU."""
    if device.type != "cuda":
        return {}
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    return {
        "allocated_bytes": stats["allocated_bytes"]["all"]["current"],
        "reserved_bytes": stats["reserved_bytes"]["all"]["current"],
    }


@dataclass
class _Count:
    """The live tensors after a step. kinds: how many of each dtype and shape."""

    step: int
    num_bytes: int = 0
    nodes: int = 0
    kinds: Counter[_Kind] = field(default_factory=Counter)


class Census:
    """Counts a rank's live tensors now and then. known: by name, what may hold them beside variables."""

    def __init__(self, known: Mapping[str, Any], device: Any, limit: int) -> None:
        self._known, self._device = known, device
        self._next = _FIRST
        # Where neither malloc nor a device tells of each step's bytes, tensors are the only measure.
        blind = device.type == "cpu" and heap_bytes() is None
        self._every = max(1, limit // _COUNTS) if blind else None
        self._counts: list[_Count] = []
        self._lengths: list[Lengths] = []
        self._step = self._last = 0

    def look(self, step: int, in_use: int) -> dict[str, int]:
        """After a step: what is to be recorded of its live tensors, in most steps nothing. in_use: bytes."""
        self._step, self._last = step, in_use
        if step != self._next and (self._every is None or step % self._every):
            return {}
        count = _count(step, _live())
        if step == self._next:
            self._next = step * _TIMES
            self._counts = [*self._counts[-1:], count]
            self._lengths = [*self._lengths[-1:], Lengths(step)]
        return {
            "tensor_bytes": count.num_bytes,
            "tensor_count": count.kinds.total(),
            "graph_nodes": count.nodes,
        }

    def held(self) -> Held | None:
        """What was added since a count that lies long enough back; None where there is none."""
        objects = sys.getallocatedblocks()
        gc.collect()
        freed_objects = max(0, objects - sys.getallocatedblocks())
        # Against the last step: whatever came after it may have made the collector run already.
        freed = max(0, self._last - self._in_use())
        earlier = [one for one in self._counts if self._step - one.step >= _LEAST_BETWEEN]
        if not earlier:
            return None
        then, live = earlier[-1], _live()
        now = _count(self._step, live)
        # What is gone since does not count: it had only waited for the collector.
        kinds = now.kinds - then.kinds
        graph = now.nodes - then.nodes
        looked_at = _ends_of_graphs(live) if graph >= _LEAST_BETWEEN else self._added(live, kinds)
        del live
        return Held(
            steps=now.step - then.step,
            tensors=kinds.total(),
            tensor_bytes=sum(_size(kind, number) for kind, number in kinds.items()),
            graph_nodes=graph,
            freed_bytes=freed,
            freed_objects=freed_objects,
            collects=gc.isenabled(),
            holder=self._holder(looked_at),
            container=self._container(),
        )

    def _container(self) -> str:
        earlier = [one for one in self._lengths if self._step - one.step >= _LEAST_BETWEEN]
        return holder_of(earlier[-1].grown(self._step - earlier[-1].step), self._known) if earlier else ""

    def _in_use(self) -> int:
        in_use = device_memory(self._device).get("allocated_bytes")
        return (heap_bytes() or 0) if in_use is None else in_use

    def _added(self, live: list[Any], kinds: Counter[_Kind]) -> list[Any]:
        """Some tensors of the kind of which the most bytes were added, but the model's and optimizer's."""
        several = [kind for kind, number in kinds.items() if number > 1]
        if not several:
            return []
        most = max(several, key=lambda kind: _size(kind, kinds[kind]))
        own = {id(one) for one in _owned(self._known)}
        return [one for one in live if _kind(one) == most and id(one) not in own][-_MOST_HOLDERS:]

    def _holder(self, tensors: list[Any]) -> str:
        from pytest_gputrain.memory.references import Walk

        if not tensors:
            return ""
        walk = Walk()
        walk.near(self._known)
        if not any(walk.holder(one) for one in tensors):
            walk.far()
        found = [walk.holder(one) for one in tensors]
        # One variable holds many, each at another place.
        named = Counter(re.sub(r"\[\d+\]", "[…]", str(one)) for one in found if one is not None)
        return named.most_common(1)[0][0] if named else "no Python variable (autograd, or C++)"


def _size(kind: _Kind, number: int) -> int:
    return number * max(1, math.prod(kind[1])) * int(kind[0].itemsize)


def _live() -> list[Any]:
    """By type: isinstance would run the ``__class__`` of lazy objects."""
    is_tensor: dict[type, bool] = {}
    found = []
    for value in gc.get_objects():
        kind = type(value)
        known = is_tensor.get(kind)
        if known is None:
            known = is_tensor[kind] = issubclass(kind, torch.Tensor)
        if known:
            found.append(value)
    return found


def _count(step: int, live: Iterable[Any]) -> _Count:
    count, storages, ends = _Count(step), {}, []
    for one in live:
        count.kinds[_kind(one)] += 1
        with suppress(RuntimeError, NotImplementedError):  # sparse, fake and functional tensors have none
            storage = one.untyped_storage()
            if storage.device.type != "meta":
                storages[storage.data_ptr()] = storage.nbytes()
        if one.grad_fn is not None:
            ends.append(one)
    count.num_bytes = sum(storages.values())
    count.nodes = _num_nodes(ends)
    return count


def _kind(tensor: Any) -> _Kind:
    return tensor.dtype, tuple(tensor.shape)


def _num_nodes(ends: Iterable[Any]) -> int:
    return len(_nodes(ends)[0])


def _nodes(ends: Iterable[Any]) -> tuple[set[Any], set[Any]]:
    """The nodes of the autograd graphs that tensors hold, up to a bound; those that another one leads to."""
    seen: set[Any] = set()
    inner: set[Any] = set()
    left = [one.grad_fn for one in ends]
    while left and len(seen) < _MOST_NODES:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            following = [one for one, _ in node.next_functions if one is not None]
            inner.update(following)
            left += following
    return seen, inner


def _ends_of_graphs(live: Iterable[Any]) -> list[Any]:
    """The last of the tensors that hold a graph and are not themselves a part of another one's."""
    held = [one for one in live if one.grad_fn is not None]
    inner = _nodes(held)[1]
    return [one for one in held if one.grad_fn not in inner][-_MOST_HOLDERS:]


def _owned(known: Mapping[str, Any]) -> Iterable[Any]:
    """Parameters, their gradients, buffers and the optimizer's state."""
    from pytest_gputrain.trace.optimizers import optimizers_in, parameters_of

    modules = [one for one in known.values() if isinstance(one, torch.nn.Module)]
    optimizers = optimizers_in([one for one in known.values() if not isinstance(one, torch.nn.Module)])
    parameters = [p for module in modules for p in module.parameters()]
    parameters += [p for optimizer in optimizers for p in parameters_of(optimizer)]
    for parameter in parameters:
        yield parameter
        if parameter.is_leaf and parameter.grad is not None:
            yield parameter.grad
    for module in modules:
        yield from module.buffers()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (state.values() if isinstance(state, dict) else ())
