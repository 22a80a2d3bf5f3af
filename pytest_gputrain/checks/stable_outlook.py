"""Whether a rank's memory, on the device and on the host, will last to the end of a run of given length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_gputrain.endurance.ahead import Outlook
from pytest_gputrain.endurance.findings import Finding
from pytest_gputrain.endurance.records import StepRecord

_Value = Callable[[StepRecord], float | None]


class Outlooks:
    """capacity: bytes that the rank may hold on the device, where that is enforced."""

    def __init__(self, device: Any, capacity: int | None, iterations: int | None) -> None:
        self._all: list[tuple[Outlook, _Value]] = []
        if iterations is None:
            return
        if capacity is not None:
            bounded = Outlook("memory", lambda taken: capacity - taken, iterations)
            self._all.append((bounded, lambda record: record.allocated_bytes or record.heap_bytes))
        elif device.type == "cuda":
            outlook = Outlook("memory of the GPU", lambda _: _left(device), iterations)
            self._all.append((outlook, lambda record: record.allocated_bytes))
        host = Outlook("host memory", lambda _: _left("cpu"), iterations)
        self._all.append((host, lambda record: record.rss_bytes or None))

    def add(self, record: StepRecord, rank: int) -> Finding | None:
        """After a step."""
        found = [outlook.add(record.step, value(record), rank) for outlook, value in self._all]
        return next(filter(None, found), None)


def _left(device: Any) -> float:
    from pytest_gputrain.memory.capacity import memory_of

    return memory_of(device)[0]
