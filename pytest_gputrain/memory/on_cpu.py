"""A limit on the CPU: tensors are accounted for, and the operation that goes over the limit raises."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.accounting import Accounting
from pytest_gputrain.memory.errors import OutOfMemory
from pytest_gputrain.memory.ledger import Ledger, Record
from pytest_gputrain.memory.lines import creating_lines, location
from pytest_gputrain.memory.storages import storages_of
from pytest_gputrain.values import format_size

COMPILED = (
    "a function that torch.compile was given ran uncompiled, as torch does while operations are watched: "
    "the peak is that of eager execution"
)
# By this text accelerate's find_executable_batch_size and Lightning's tuner know an out-of-memory of a CPU.
WORDS_OF_TORCH = "; DefaultCPUAllocator: can't allocate memory"


class CpuMeter:
    """Measures and limits one block; see ``guard.Meter``."""

    device = torch.device("cpu")

    def __init__(self, limit: int | None) -> None:
        self.refused: OutOfMemory | None = None
        self._limit = limit
        self._ledger = Ledger()
        self._accounting = Accounting(self._ledger, self.device, self._refuse)
        self._stack = contextlib.ExitStack()
        self._drops_gradients = False

    def start(self, roots: Sequence[Any]) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._accounting.owners)
            for root in roots:
                self._accounting.owners.adopt(root)
            self._accounting.settle(self._ledger.in_use, None)
            stack.callback(self._wrap_up)
            stack.enter_context(self._accounting)
            self._stack = stack.pop_all()

    def stop(self, *, drop_gradients: bool) -> None:
        self._drops_gradients = drop_gradients
        self._stack.close()

    def _wrap_up(self) -> None:
        """Nothing is watched any more, and the owners still know what they have seen."""
        self._accounting.owners.refresh()
        if self._drops_gradients:
            self._accounting.owners.drop_gradients(self._is_of_here)

    def note_every_line(self) -> None:
        self._ledger.noted_bytes = 1

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        self._accounting.is_paused = True
        try:
            yield
        finally:
            self._accounting.is_paused = False

    @property
    def in_use(self) -> int:
        return self._ledger.in_use

    @property
    def made_bytes(self) -> int:
        return sum(record.num_bytes for record in self.made_here())

    @property
    def peak_bytes(self) -> int:
        return self._ledger.peak

    def by_category(self) -> dict[str, int]:
        return self._ledger.by_category()

    def at_peak(self) -> list[Record]:
        return [*self._ledger.at_peak()]

    def by_category_at_peak(self) -> dict[str, int]:
        return self._ledger.by_category_at_peak()

    def made_here(self) -> list[Record]:
        """What was made in the block and is still alive."""
        self._ledger.recount()
        return [record for record in self._ledger.alive() if record.inside and record.num_bytes]

    def notes(self) -> list[str]:
        return [COMPILED] if self._accounting.saw_compiled else []

    def strangers(self) -> set[str]:
        """Devices that the block used and that nobody measured."""
        return self._accounting.other_devices - {"meta"}

    def _is_of_here(self, tensor: torch.Tensor) -> bool:
        records = [self._ledger.records.get(storage._cdata) for storage in storages_of(tensor)]
        return all(record is not None and record.inside for record in records)

    def _refuse(self, requested: int, op: Any) -> None:
        if self._limit is None or self._ledger.in_use <= self._limit:
            return
        self._ledger.recount()
        if self._ledger.in_use <= self._limit:
            return
        self._accounting.owners.refresh()
        where = location(creating_lines())
        in_use = self._ledger.in_use - requested
        by_category = self._ledger.by_category()
        error = OutOfMemory(
            f"out of memory on {self.device}: {op or 'the model or optimizer given'} needs "
            f"{format_size(requested)} with {format_size(in_use)} in use, "
            f"of a limit of {format_size(self._limit)}{f', at {where}' if where else ''} "
            f"(in use: {categories.describe(by_category)}){WORDS_OF_TORCH}",
            requested=requested,
            in_use=in_use,
            limit=self._limit,
            device=str(self.device),
            by_category=by_category,
            location=where,
        )
        # A copy, which has no traceback to keep what ran out alive.
        self.refused = copy.copy(error)
        raise error
