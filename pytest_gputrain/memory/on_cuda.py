"""A limit on a CUDA device: torch's allocator refuses, for real, and counts the peak itself.

Nothing watches the operations here, so that they run at full speed and compiled ones stay compiled. What
the peak was for is therefore known as far as modules and optimizers tell; the rest counts as activations.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.errors import OutOfMemory
from pytest_gputrain.memory.ledger import Ledger, Record
from pytest_gputrain.memory.owners import Owners
from pytest_gputrain.memory.storages import storages_of
from pytest_gputrain.values import format_size

REMAINDER = "on CUDA activations are what modules and optimizers do not account for, at the peak"


class CudaMeter:
    """Measures and limits one block; see ``guard.Meter``."""

    # A peak can only be reset for everybody: those that are measuring already take down what it was.
    _measuring: ClassVar[list[CudaMeter]] = []

    def __init__(self, limit: int | None, device: torch.device) -> None:
        self.device = device
        # Never: torch's own kernels try memory and do with less, which is no sign of a caller that went on.
        self.refused: OutOfMemory | None = None
        self._limit = limit
        self._ledger = Ledger()
        self._owners = Owners(self._mark, self._is_here)
        self._peak = self._in_use_before = 0
        self._there_before: set[int] = set()
        self._stack = contextlib.ExitStack()

    def start(self, roots: Sequence[Any]) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._owners)
            for root in roots:
                self._owners.adopt(root)
            self._there_before = {key for _, key in self._live()}
            self._in_use_before = self.in_use
            if self._limit is not None:
                stack.enter_context(self._limited(self._limit))
            for meter in self._measuring:
                meter._note_peak()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._measuring.append(self)
            stack.callback(self._measuring.remove, self)
            self._stack = stack.pop_all()

    def stop(self, *, drop_gradients: bool) -> None:
        with self._stack:  # closed also where the device is beyond help and synchronizing raises
            torch.cuda.synchronize(self.device)
            self._note_peak()
            self._owners.refresh()
            if drop_gradients:
                self._owners.drop_gradients(self._is_of_here)

    def note_every_line(self) -> None:
        """Lines are not known here: the allocator is not watched."""

    def uncounted(self) -> contextlib.AbstractContextManager[None]:
        """The allocator counts everything."""
        return contextlib.nullcontext()

    @property
    def in_use(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @property
    def made_bytes(self) -> int:
        return self.in_use - self._in_use_before

    @property
    def peak_bytes(self) -> int:
        return self._peak

    def by_category(self) -> dict[str, int]:
        return self._with_remainder(self._ledger.by_category(), self.in_use)

    def by_category_at_peak(self) -> dict[str, int]:
        return self._with_remainder(self._ledger.by_category_at_peak(), self._peak)

    def at_peak(self) -> list[Record]:
        return [*self._ledger.at_peak()]

    def made_here(self) -> list[Record]:
        """What was made in the block and is still alive."""
        for tensor, key in [*self._live()]:
            if key not in self._there_before and key not in self._ledger.records:
                self._mark(tensor, categories.OTHER)
        return [record for record in self._ledger.alive() if record.key not in self._there_before]

    def notes(self) -> list[str]:
        return [REMAINDER]

    def strangers(self) -> set[str]:
        return set()

    def _mark(self, tensor: torch.Tensor, category: str) -> None:
        for storage in storages_of(tensor):
            if storage.device == self.device:
                record = self._ledger.records.get(storage._cdata)
                record = record or self._ledger.charge(storage, tensor, category)
                record.category = category
        self._ledger.settle()

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return all(storage.device == self.device for storage in storages_of(tensor))

    def _note_peak(self) -> None:
        self._peak = max(self._peak, torch.cuda.max_memory_allocated(self.device))

    def _live(self) -> Iterator[tuple[torch.Tensor, int]]:
        for value in gc.get_objects():
            if issubclass(type(value), torch.Tensor):
                for storage in storages_of(value):
                    if storage.device == self.device:
                        yield value, storage._cdata

    def _is_of_here(self, tensor: torch.Tensor) -> bool:
        return all(storage._cdata not in self._there_before for storage in storages_of(tensor))

    @contextlib.contextmanager
    def _limited(self, limit: int) -> Iterator[None]:
        total = torch.cuda.get_device_properties(self.device).total_memory
        if limit > total:
            raise ValueError(
                f"a limit of {format_size(limit)} cannot be held on {self.device}, which has "
                f"{format_size(total)}; leave the limit out for all of it"
            )
        # Cached blocks count for the allocator's limit, whoever left them there.
        torch.cuda.empty_cache()
        if (allocated := torch.cuda.memory_allocated(self.device)) > limit:
            raise OutOfMemory(
                f"out of memory on {self.device}: {format_size(allocated)} are in use before the block, "
                f"of a limit of {format_size(limit)}",
                in_use=allocated,
                limit=limit,
                device=str(self.device),
            )
        before = _fraction(self.device)
        torch.cuda.set_per_process_memory_fraction(min(limit / total, before), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)

    def _with_remainder(self, told: dict[str, int], total: int) -> dict[str, int]:
        told[categories.ACTIVATIONS] += max(total - sum(told.values()), 0)
        return told


def _fraction(device: torch.device) -> float:
    """What this process may take of the device."""
    return float(torch.cuda.memory.get_per_process_memory_fraction(device))
