"""What a discovery measured, kept without the answer: the margin is applied when the entry is read.

So that another margin or capacity uses the same measurements. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """peaks: batch size -> peak in bytes. ran_out: batch size -> the limit in bytes under which it ran out
    (a larger limit may do, so the limit belongs to it). capacity, free_bytes: of the device, in bytes, when
    this was measured.
    """

    peaks: Mapping[int, int]
    ran_out: Mapping[int, int] = field(default_factory=dict)
    capacity: int = 0
    free_bytes: int = 0

    @classmethod
    def measured(
        cls,
        probes: Iterable[tuple[int, float | None]],
        *,
        limit: float,
        capacity: int,
        free_bytes: int,
    ) -> Entry:
        """From a search's probes, ``(batch size, peak in bytes or None)``, that ran against ``limit``."""
        peaks: dict[int, int] = {}
        ran_out: dict[int, int] = {}
        for size, peak in probes:  # the last word on a size counts: it may have been tried again
            if peak is None:
                peaks.pop(size, None)
                ran_out[size] = int(limit)
            else:
                ran_out.pop(size, None)
                peaks[size] = int(peak)
        return cls(peaks, ran_out, int(capacity), int(free_bytes))

    def known(self, limit: float) -> dict[int, float | None]:
        """What holds under this limit, as ``find_maximum(known=…)`` takes it: size -> peak, or None.

        What ran out under a smaller limit is left out: it may fit now.
        """
        found: dict[int, float | None] = {
            size: None for size, under in self.ran_out.items() if under >= limit
        }
        return {**found, **self.peaks}

    def must_be_confirmed(self, free_bytes: int, limit: float, slack: float | None) -> bool:
        """Whether an answer from here needs one probe: less is free than when it was measured.

        Less by more than the fraction ``slack`` of it; any less where not even the limit is free. ``slack``
        None: only the latter counts, as what is free beside the limit has no say.
        """
        if free_bytes >= self.free_bytes:
            return False
        scarcer = slack is not None and free_bytes < self.free_bytes * (1 - slack)
        return scarcer or free_bytes < limit

    def merged(self, newer: Entry) -> Entry:
        """Both together, the newer's word first; capacity and free memory are the newer's."""
        tried = {*newer.peaks, *newer.ran_out}
        peaks = {size: peak for size, peak in self.peaks.items() if size not in tried}
        ran_out = {size: under for size, under in self.ran_out.items() if size not in tried}
        return Entry({**peaks, **newer.peaks}, {**ran_out, **newer.ran_out}, newer.capacity, newer.free_bytes)

    def as_json(self) -> dict[str, Any]:
        return {
            "peaks": {str(size): peak for size, peak in sorted(self.peaks.items())},
            "ran_out": {str(size): limit for size, limit in sorted(self.ran_out.items())},
            "capacity": self.capacity,
            "free_bytes": self.free_bytes,
        }

    @classmethod
    def from_json(cls, record: object) -> Entry:
        """Raises ValueError for anything that ``as_json`` does not write."""
        if not isinstance(record, dict) or set(record) != {"peaks", "ran_out", "capacity", "free_bytes"}:
            raise ValueError("not an entry")
        entry = cls(
            _sizes(record["peaks"]), _sizes(record["ran_out"]), _bytes(record["capacity"]),
            _bytes(record["free_bytes"]),
        )  # fmt: skip
        if not entry.peaks and not entry.ran_out:
            raise ValueError("an entry without measurements")
        return entry


def _sizes(record: object) -> dict[int, int]:
    if not isinstance(record, dict):
        raise ValueError("not a mapping")
    sizes = {int(size): _bytes(value) for size, value in record.items()}
    if any(size < 1 for size in sizes):
        raise ValueError("a batch size below 1")
    return sizes


def _bytes(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value
