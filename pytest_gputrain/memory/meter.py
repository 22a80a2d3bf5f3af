"""What a guard asks of a device's memory, and who answers for which device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from pytest_gputrain.memory.errors import OutOfMemory
from pytest_gputrain.memory.ledger import Record


class Meter(Protocol):
    """How memory of one device is measured and limited."""

    device: torch.device
    refused: OutOfMemory | None
    """The last operation that did not fit, where operations are watched: its caller may have gone on."""

    def start(self, roots: Sequence[Any]) -> None: ...
    def stop(self, *, drop_gradients: bool) -> None: ...
    def note_every_line(self) -> None: ...
    def uncounted(self) -> AbstractContextManager[None]: ...
    @property
    def in_use(self) -> int: ...
    @property
    def made_bytes(self) -> int: ...
    @property
    def peak_bytes(self) -> int: ...
    def by_category(self) -> dict[str, int]: ...
    def by_category_at_peak(self) -> dict[str, int]: ...
    def at_peak(self) -> list[Record]: ...
    def made_here(self) -> list[Record]: ...
    def notes(self) -> list[str]: ...
    def strangers(self) -> set[str]: ...


def meter_of(limit: int | None, device: torch.device) -> Meter:
    """A meter of that device, not started; ``limit`` in bytes."""
    if device.type == "cpu":
        from pytest_gputrain.memory.on_cpu import CpuMeter

        return CpuMeter(limit)
    from pytest_gputrain.memory.on_cuda import CudaMeter

    return CudaMeter(limit, device)
