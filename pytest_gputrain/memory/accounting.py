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
from pytest_gputrain.memory.storages import storages_of

Refuse = Callable[[int, Any], None]
"""Given the bytes that an operation needs and the operation: raises if there is no room for them."""


class Accounting(TorchDispatchMode):
    """Charges what operations are given and what they make.

    ``category_of_result`` tells from an operation's arguments what its results are for; ``refuse`` is asked
    whenever more is in use than before.
    """

    def __init__(
        self, ledger: Ledger, device: torch.device, category_of_result: Callable[[Any], str], refuse: Refuse
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._device = device
        self._category_of_result = category_of_result
        self._refuse = refuse

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ledger = self._ledger
        before = ledger.in_use
        self._see(args, None, categories.OTHER)
        if kwargs:
            self._see(kwargs.values(), None, categories.OTHER)
        if ledger.in_use > before:
            self.settle(ledger.in_use - before, func)
        out = func(*args, **(kwargs or {}))
        before = ledger.in_use
        self._see((out,), func, self._category_of_result(args))
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
        """What a tensor is for; one that is not in the books is charged."""
        for storage in storages_of(tensor):
            if (record := self._touch(storage, tensor, None, category)) is not None:
                record.category = category

    def _see(self, values: Iterable[Any], op: Any, category: str) -> None:
        for value in values:
            if isinstance(value, torch.Tensor):
                for storage in storages_of(value):
                    self._touch(storage, value, op, category)
            elif isinstance(value, list | tuple):
                self._see(value, op, category)

    def _touch(self, storage: Any, tensor: torch.Tensor, op: Any, category: str) -> Record | None:
        record = self._ledger.records.get(storage._cdata)
        if record is None:
            if storage.device != self._device:
                return None
            record = self._ledger.charge(storage, tensor, category, op)
        elif record.num_bytes != storage.nbytes():
            self._ledger.resize(record, storage.nbytes())
        if record.category == categories.OTHER and isinstance(tensor, torch.nn.Parameter):
            record.category = categories.PARAMETERS
        return record
