"""Sees every operation under a guard and writes the storages that it touches into the books.

Does not see: memory that a kernel takes and gives back within one operation (the workspace of a convolution);
operations in other threads, unless autograd runs them; memory that is no tensor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.ledger import Ledger, Record
from pytest_gputrain.memory.lines import is_of_ddp, is_under_compile
from pytest_gputrain.memory.owners import Owners
from pytest_gputrain.memory.storages import storages_of

Refuse = Callable[[int, Any], None]
"""Given the bytes that an operation needs and the operation: raises if there is no room for them."""

# What is computed from these is an activation, also without autograd.
_CARRIED_ON = frozenset((categories.PARAMETERS, categories.BUFFERS, categories.ACTIVATIONS))

# What torch's C++ allocates with.
_ALLOCATES = frozenset((torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default))


class Accounting(TorchDispatchMode):
    """Charges what operations are given and what they make; ``refuse`` is asked when more is in use then."""

    def __init__(self, ledger: Ledger, device: torch.device, refuse: Refuse) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = Owners(self.mark, self.knows)
        self.other_devices: set[str] = set()
        self.saw_compiled = False
        self.is_paused = False
        self._ledger = ledger
        self._device = device
        self._refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        ledger = self._ledger
        before = ledger.in_use
        carries_on = self._see_arguments(args)
        if kwargs:
            carries_on |= self._see_arguments(kwargs.values())
        if ledger.in_use > before:
            self.settle(ledger.in_use - before, func)
        out = func(*args, **(kwargs or {}))
        before = ledger.in_use
        self._see_results((out,), func, carries_on)
        if ledger.in_use > before:
            made = ledger.in_use - before
            try:
                self._refuse(made, func)
            except BaseException:
                del out  # a refused operation keeps nothing
                raise
            ledger.settle()
        return out

    def settle(self, num_bytes: int, op: Any) -> None:
        """Bytes were charged: they stay, or ``refuse`` raises."""
        self._refuse(num_bytes, op)
        self._ledger.settle()

    def mark(self, tensor: torch.Tensor, category: str) -> None:
        """Write down what a tensor is for; one that is not in the books is charged."""
        for storage in storages_of(tensor):
            record = self._touched(storage) or self._charged(storage, tensor, category, None)
            if record is not None:
                record.category = category

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in the books."""
        return any(storage._cdata in self._ledger.records for storage in storages_of(tensor))

    def _see_arguments(self, values: Iterable[Any]) -> bool:
        """Charge what is new; whether something computed from these values is an activation."""
        carries_on = False
        for value in values:
            if isinstance(value, torch.Tensor):
                for storage in storages_of(value):
                    record = self._touched(storage) or self._charged(storage, value, categories.OTHER, None)
                    if record is None:
                        continue
                    if value.requires_grad:
                        carries_on = True
                        if record.leaf != id(value) and value.is_leaf:
                            record.leaf = id(value)
                            self.owners.adopt_parameter(value)
                    elif record.category in _CARRIED_ON:
                        carries_on = True
            elif isinstance(value, list | tuple):
                carries_on |= self._see_arguments(value)
        return carries_on

    def _see_results(self, values: Iterable[Any], op: Any, carries_on: bool) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                for storage in storages_of(value):
                    if self._touched(storage) is None:
                        self._charged(storage, value, self._category_of_result(op, carries_on), op)
            elif isinstance(value, list | tuple):
                self._see_results(value, op, carries_on)

    def _category_of_result(self, op: Any, carries_on: bool) -> str:
        """What a result is for, until an owner says otherwise."""
        if op in _ALLOCATES and is_of_ddp():
            return categories.GRADIENTS  # the buckets, which outlive every block
        if torch._C._current_graph_task_id() != -1:  # backward is running
            return categories.ACTIVATIONS
        # Inside a step only a closure differentiates; what the step itself computes are its temporaries.
        differentiates = torch.is_grad_enabled() or not self.owners.stepping
        return categories.ACTIVATIONS if carries_on and differentiates else categories.OTHER

    def _touched(self, storage: Any) -> Record | None:
        """The storage in the books, with the size that it has now."""
        record = self._ledger.records.get(storage._cdata)
        if record is not None and record.num_bytes != storage.nbytes():
            self._ledger.resize(record, storage.nbytes())
        return record

    def _charged(self, storage: Any, tensor: torch.Tensor, category: str, op: Any) -> Record | None:
        if storage.device != self._device:
            self.other_devices.add(str(storage.device))
            return None
        record = self._ledger.charge(storage, tensor, category, op)
        if record.lines is not None and not self.saw_compiled:
            self.saw_compiled = is_under_compile()
        return record
