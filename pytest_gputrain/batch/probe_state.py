"""A model and an optimizer as they were before a probe, put back bit by bit.

Training happens in place, on the user's own parameters: a copy would need its memory a second time, and what
was compiled, wrapped or hooked is bound to the originals. So values are kept on the host, outside of any
budget (on a CPU device that is one more copy of the parameters in host memory), and copied back into the same
storages.

Covered: everything reachable from the roots through modules, optimizers, containers and plain objects:
values, gradients, flags, hooks, attributes, random generators; and the state of training that the loop's
functions keep (``probe_kept.py``). Not covered: what hangs elsewhere, such as a list in a module's globals.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pytest_gputrain.batch.probe_kept import STATE, kept_by

# A longer container is data (a data set, a vocabulary), not state of training: walking it would take seconds.
MOST_ITEMS = 10_000
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
# Of these libraries only modules and optimizers are walked: the rest are handles, such as process groups.
_NOT_WALKED = ("torch", "builtins", "numpy", "logging", "threading", "weakref", "enum", "abc", "functools")
_LEAVES = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_MISSING = object()

Undo = Callable[[], None]


class Snapshot:
    """``with Snapshot(model, optimizer) as snapshot``: on leaving, everything is as it was on entering.

    ``rewind()`` does the same in between, except for gradients, which are None until the end.
    """

    def __init__(self, *roots: object, functions: Sequence[object] = ()) -> None:
        self._containers: list[Undo] = []
        self._storages: dict[int, Undo] = {}
        self._tensors: list[Undo] = []
        self._leaves: list[torch.Tensor] = []
        self._grads: list[_Parked] = []
        self._seen: dict[int, object] = {}  # the objects too, so that no id is given twice
        todo: list[object] = list(roots)
        for function in functions:
            state, undo = kept_by(function)
            todo += state
            self._containers += undo
        while todo:
            todo += self._take(todo.pop())
        self._seen.clear()

    def __enter__(self) -> Snapshot:
        self._grads = [_Parked(leaf) for leaf in self._leaves if leaf.grad is not None]
        return self

    def __exit__(self, *exc: object) -> None:
        self.rewind()
        for parked in self._grads:
            parked.give_back()

    def rewind(self) -> None:
        """Put back all but the gradients."""
        for undo in (*self._containers, *self._tensors, *self._storages.values()):
            undo()
        for leaf in self._leaves:
            leaf.grad = None

    def _take(self, value: Any) -> list[object]:
        """Remember one object; returns what it leads to."""
        if id(value) in self._seen or isinstance(value, _LEAVES):
            return []
        if isinstance(value, torch.Tensor):
            self._seen[id(value)] = value
            return self._take_tensor(value)
        if isinstance(value, torch.Generator):
            self._seen[id(value)] = value
            self._tensors.append(_generator_undo(value))
            return []
        held = vars(value) if _is_walked(value) else value
        if not isinstance(held, dict | list | set | tuple | collections.deque) or len(held) > MOST_ITEMS:
            return []
        self._seen[id(value)] = value
        if not isinstance(held, tuple):
            self._containers.append(_container_undo(held))
        # An optimizer's state has the parameters as its keys.
        return [*held, *held.values()] if isinstance(held, dict) else list(held)

    def _take_tensor(self, tensor: torch.Tensor) -> list[object]:
        parts = _inner_tensors(tensor)
        if parts:  # a wrapper (DTensor, quantised): its parts hold the values
            self._tensors.append(_flags_undo(tensor))
        elif tensor.layout == torch.strided and not tensor.is_meta:
            self._tensors += [_place_undo(tensor), _flags_undo(tensor)]
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages and storage.nbytes():
                self._storages[storage._cdata] = _storage_undo(storage)
        if tensor.is_leaf:
            self._leaves.append(tensor)
        return [*parts, *vars(tensor).values()]


class _Parked:
    """A gradient set aside: on a GPU its values wait on the host, so that they take nothing of the budget."""

    def __init__(self, leaf: torch.Tensor) -> None:
        assert leaf.grad is not None
        self._leaf, self._grad = leaf, leaf.grad
        self._values: torch.Tensor | None = None
        leaf.grad = None
        if self._grad.is_cuda and self._grad.layout == torch.strided and not _inner_tensors(self._grad):
            self._values = self._grad.detach().cpu()
            self._grad.data = torch.empty(0, dtype=self._grad.dtype, device=self._grad.device)

    def give_back(self) -> None:
        if self._values is not None:
            self._grad.data = self._values.to(self._grad.device)
        self._leaf.grad = self._grad


def _is_walked(value: object) -> bool:
    """Whether this object's attributes are state of training."""
    if isinstance(value, STATE):
        return not isinstance(value, torch.Tensor)
    if isinstance(value, dict | list | set | tuple | collections.deque):  # OrderedDict has a __dict__ as well
        return False
    return hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in _NOT_WALKED


def _inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _storage_undo(storage: torch.UntypedStorage) -> Undo:
    """By bytes: views, tied weights, expanded buffers and every dtype are one case."""

    def as_bytes() -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    saved = as_bytes().to("cpu", copy=True)

    def undo() -> None:
        if storage.nbytes() != saved.nbytes:
            storage.resize_(saved.nbytes)
        with torch.no_grad():
            as_bytes().copy_(saved)

    return undo


def _place_undo(tensor: torch.Tensor) -> Undo:
    """Where the tensor looks: ``parameter.data = other`` and ``model.to(dtype)`` make it look elsewhere."""
    original = tensor.detach()

    def undo() -> None:
        moved = tensor.untyped_storage()._cdata != original.untyped_storage()._cdata
        if moved or tensor.shape != original.shape or tensor.stride() != original.stride():
            tensor.data = original

    return undo


def _flags_undo(tensor: torch.Tensor) -> Undo:
    requires_grad = tensor.requires_grad
    hooks = {name: _copied(getattr(tensor, name, None)) for name in _TENSOR_HOOKS}

    def undo() -> None:
        if tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        for name, saved in hooks.items():
            now = getattr(tensor, name, None)
            if now is not None and not _same_mapping(now, saved or {}):
                now.clear()  # the mapping itself is what autograd holds
                now.update(saved or {})

    return undo


def _copied(hooks: dict[int, Any] | None) -> dict[int, Any] | None:
    return None if hooks is None else dict(hooks)


def _generator_undo(generator: torch.Generator) -> Undo:
    state = generator.get_state()

    def undo() -> None:
        generator.set_state(state)

    return undo


def _container_undo(held: Any) -> Undo:
    """Puts the same objects back into the same container, which stays untouched where nothing changed."""
    if isinstance(held, dict):
        items = dict(held)

        def undo_mapping() -> None:
            if not _same_mapping(held, items):
                held.clear()
                held.update(items)

        return undo_mapping
    entries = list(held)

    def undo_sequence() -> None:
        if isinstance(held, set):
            changed = len(held) != len(entries) or not held.issuperset(entries)
        else:
            changed = len(held) != len(entries) or any(a is not b for a, b in zip(held, entries, strict=True))
        if changed:
            held.clear()
            held.update(entries) if isinstance(held, set) else held.extend(entries)

    return undo_sequence


def _same_mapping(now: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    # By identity, never by ==: values are tensors. The order of hooks is the order in which they run.
    return len(now) == len(saved) and all(
        key is other and value is saved[other] for (key, value), other in zip(now.items(), saved, strict=True)
    )
