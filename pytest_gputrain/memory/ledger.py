"""The books of a guard: which storages are alive, what they are for, and what was alive at the peak.

A storage is charged once, however many tensors look at it, from when it is first seen until it is freed. What
it is for may turn out later (a tensor that backward made becomes a gradient), so nothing is summed up by
category while training runs: the books keep who was alive at the peak, and add up when they are asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from pytest_gputrain.memory import categories
from pytest_gputrain.memory.lines import Line, creating_lines

# Who made a smaller storage is not written down: walking frames costs more than such a tensor is worth.
NOTED_BYTES = 32 * 1024


class Record(weakref.ref[Any]):
    """One storage: its size now, when it was first seen, and what it is for."""

    __slots__ = ("born", "category", "inside", "key", "leaf", "lines", "num_bytes", "op", "shape")

    key: int
    leaf: int  # the id of the leaf of autograd that was last seen on it
    num_bytes: int
    born: int
    category: str
    inside: bool  # made under the guard; False: it was there before
    op: Any
    shape: tuple[Any, Any]  # shape and dtype of the tensor through which it was first seen
    lines: tuple[Line | None, Line | None] | None


class Ledger:
    """Charges storages of one device, which are known by the address of their ``StorageImpl``."""

    def __init__(self) -> None:
        self.noted_bytes = NOTED_BYTES
        self.records: dict[int, Record] = {}
        self.in_use = 0
        self.peak = 0
        self._clock = 0
        self._peak_clock = 0
        self._settled_clock = 0
        self._freed_since: list[Record] = []

    def charge(self, storage: Any, tensor: Any, category: str, op: Any = None) -> Record:
        """Write down a storage that is not in the books; ``op`` made it, None if it was there before."""
        record = Record(storage, self._on_free)
        record.key, record.leaf = storage._cdata, 0
        record.num_bytes = storage.nbytes()
        record.category, record.op, record.inside = category, op, op is not None
        record.shape = (_shape(tensor), tensor.dtype)
        record.lines = creating_lines() if op is not None and record.num_bytes >= self.noted_bytes else None
        self._clock += 1
        record.born = self._clock
        self.records[record.key] = record
        self.in_use += record.num_bytes
        return record

    def resize(self, record: Record, num_bytes: int) -> None:
        """A storage in the books has another size now."""
        change = num_bytes - record.num_bytes
        record.num_bytes += change
        self.in_use += change

    def settle(self) -> None:
        """What was charged stays: nobody refused it, so it counts for the peak."""
        self._settled_clock = self._clock
        if self.in_use > self.peak:
            self.peak = self.in_use
            self._peak_clock = self._clock
            self._freed_since.clear()

    def reset_peak(self) -> None:
        """From now on the peak is what is in use now, or what will be more."""
        self.peak, self._peak_clock = self.in_use, self._clock
        self._freed_since.clear()

    def at_peak(self) -> Iterator[Record]:
        """What was alive when most was in use."""
        yield from (record for record in self.records.values() if record.born <= self._peak_clock)
        yield from self._freed_since

    def by_category_at_peak(self) -> dict[str, int]:
        return _summed(self.at_peak())

    def by_category(self) -> dict[str, int]:
        """What is in use now, without what may yet be refused."""
        return _summed(record for record in self.alive() if record.born <= self._settled_clock)

    def alive(self) -> list[Record]:
        return [*self.records.values()]

    def recount(self) -> None:
        """Look at the size of every storage: one may have shrunk without an operation (FSDP does that)."""
        for record in self.alive():
            if (storage := record()) is not None and storage.nbytes() != record.num_bytes:
                self.resize(record, storage.nbytes())

    def _on_free(self, record: Record) -> None:
        if self.records.get(record.key) is record:
            del self.records[record.key]
            self.in_use -= record.num_bytes
            if record.born <= self._peak_clock:
                self._freed_since.append(record)


def _shape(tensor: Any) -> tuple[int, ...]:
    """The sizes of a tensor, -1 for one that is no number; nothing for a nested tensor, which has none."""
    try:
        return tuple(size if isinstance(size, int) else -1 for size in tensor.shape)
    except RuntimeError:
        return ()


def _summed(records: Iterable[Record]) -> dict[str, int]:
    sums = categories.nothing()
    for record in records:
        sums[record.category] += record.num_bytes
    return sums
